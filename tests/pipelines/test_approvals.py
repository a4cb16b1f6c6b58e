"""What people say in MLflow is taken over where that is allowed, by somebody who may, and called what it is; what
cannot count is answered on the page; and a release starts once, whoever looks and whoever is killed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sluice.components.aliases import follow_ledger
from sluice.infra import audit
from sluice.infra.errors import ConflictError, GateRefused, InputError
from sluice.infra.settings import AccessSettings
from sluice.pipelines import approvals
from sluice.pipelines.approvals import Decided, find_candidate, record, take_over, waiting
from sluice.provenance.attestation import Signer
from sluice.provenance.canonical import digest_bytes, short
from sluice.provenance.releases import read_state, record_failure, record_rejection, record_rollback
from sluice.registry.approvals import ANSWER
from tests.pipelines.approval_site import BASE, A, ApprovalSite
from tests.registry.fake_versions import Died

B = digest_bytes(b"b")


def verbs(site: ApprovalSite) -> list[tuple[str, str]]:
    return [(line.subject, line.outcome) for line in audit.read(site.home) if line.verb == approvals.TAKE_OVER]


def test_an_approval_in_the_page_is_taken_over_and_called_not_authenticated(site: ApprovalSite) -> None:
    site.champion()
    site.candidate()
    site.mlflow.say(approval=" Approved ", by="Anna", reason="read 20 answers")
    taken, problems = take_over(site.workspace, site.start)
    assert (problems, [(d.state, d.approver) for d in taken]) == ([], [("approved", "Anna")])
    (approval,) = read_state(site.ledger).approvals_for(A)
    assert (approval.approver, approval.account) == ("Anna", "")
    assert approval.reason == f"read 20 answers ({approvals.NOT_AUTHENTICATED})"
    assert [decided.approval for decided in site.started] == [approval.entry.digest]
    assert verbs(site) == [("version 1: Approved by Anna", "allowed")]
    shown = site.mlflow.see()
    assert (shown["approval"], shown["approval.by"], shown["approval.reason"]) == ("approved", "Anna", approval.reason)
    assert "**Approval: approved.** Approved by Anna at " in site.mlflow.versions["1"]["description"]
    # And nothing more, however often somebody looks.
    before = list(site.mlflow.writes)
    assert take_over(site.workspace, site.start) == ([], [])
    assert site.mlflow.writes == before
    assert len(site.started) == 1


def test_the_alias_approved_is_an_approval_and_the_others_are_not(site: ApprovalSite) -> None:
    site.champion()
    site.candidate()
    for alias in ("challenger", "champion"):
        site.mlflow.aliases[alias] = "1"
    assert take_over(site.workspace, site.start) == ([], [])
    site.mlflow.aliases["approved"] = "1"
    (decided,), problems = take_over(site.workspace, site.start)
    assert (decided.state, decided.approver, problems) == ("approved", "somebody in MLflow", [])
    assert len(site.started) == 1
    # It did its work and goes.
    assert "approved" not in site.mlflow.aliases
    assert site.mlflow.see()["approval"] == "approved"


def test_a_name_that_the_page_writes_after_its_approved_is_read_too(
    site: ApprovalSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.champion()
    site.candidate()
    site.mlflow.say(approval="approved")
    monkeypatch.setattr(time, "sleep", lambda _: site.mlflow.say(by="Anna"))
    (decided,), _ = take_over(site.workspace)
    assert decided.approver == "Anna"


def test_a_rejection_in_the_page_ends_it_also_after_an_approval(site: ApprovalSite) -> None:
    site.champion()
    site.candidate()
    site.mlflow.say(approval="approved", by="Anna")
    take_over(site.workspace, site.start)
    site.mlflow.say(approval="rejected", by="Bert", reason="too wordy")
    (decided,), _ = take_over(site.workspace, site.start)
    assert (decided.state, decided.approver) == ("rejected", "Bert")
    assert site.kinds() == ["approval by Anna", "rejection by Bert"]
    assert len(site.started) == 1
    # It cannot be approved again.
    site.mlflow.say(approval="approved", by="Anna")
    taken, (problem,) = take_over(site.workspace, site.start)
    assert taken == []
    assert "rejected by Bert" in problem
    assert site.mlflow.see()["approval"] == "rejected"
    assert "rejected by Bert" in site.mlflow.see()[ANSWER]


def test_a_typing_mistake_is_answered_once(site: ApprovalSite) -> None:
    site.champion()
    site.candidate()
    site.mlflow.say(approval="aproved", by="Anna")
    taken, (problem,) = take_over(site.workspace, site.start)
    assert (taken, site.started, site.kinds()) == ([], [], [])
    assert "'aproved' is neither approved nor rejected" in problem
    shown = site.mlflow.see()
    assert (shown["approval"], shown["approval.by"]) == ("pending", "Anna")
    assert "'aproved' is neither" in shown[ANSWER]
    before = list(site.mlflow.writes)
    assert take_over(site.workspace, site.start) == ([], [])
    assert site.mlflow.writes == before
    assert verbs(site) == [("version 1: aproved by Anna", "refused")]
    # Corrected, it counts, and the answer goes.
    site.mlflow.say(approval="approved")
    take_over(site.workspace, site.start)
    assert len(site.started) == 1
    assert ANSWER not in site.mlflow.see()


def make_expired(site: ApprovalSite) -> None:
    site.candidate(valid_hours=-1)


def make_failing(site: ApprovalSite) -> None:
    site.candidate(verdict="fail")


def make_inconclusive(site: ApprovalSite) -> None:
    site.candidate(verdict="inconclusive")


def make_outdated(site: ApprovalSite) -> None:
    site.candidate()
    site.champion(B)


def make_superseded(site: ApprovalSite) -> None:
    site.candidate()
    site.decide(A, report=b"a later report")


def make_failed(site: ApprovalSite) -> None:
    site.candidate()
    record_failure(site.ledger, release=A, reason="slow", actor="canary")


def make_unregistered(site: ApprovalSite) -> None:
    site.mlflow.add(A)


@pytest.mark.parametrize("by_alias", [False, True])
@pytest.mark.parametrize(
    ("make", "word", "why"),
    [
        (make_expired, "expired", "expired at "),
        (make_failing, "blocked by gate", "verdict about release {} is 'fail', not 'pass'"),
        (make_inconclusive, "blocked by gate", "verdict about release {} is 'inconclusive', not 'pass'"),
        (make_outdated, "outdated", "was compared with "),
        (make_superseded, "pending", "does not show the gate's latest decision, pass at "),
        (make_failed, "release failed", "failed at "),
        (make_unregistered, "waits for gate", "has no gate decision"),
    ],
)
def test_what_cannot_be_approved_is_answered_with_the_reason(
    site: ApprovalSite, make: Callable[[ApprovalSite], None], word: str, why: str, by_alias: bool
) -> None:
    site.champion()
    make(site)
    if by_alias:
        site.mlflow.aliases["approved"] = "1"
    else:
        site.mlflow.say(approval="approved", by="Anna")
    taken, (problem,) = take_over(site.workspace, site.start)
    assert (taken, site.started, site.kinds()) == ([], [], [])
    reason = why.format(short(A))
    assert reason in problem
    assert reason in site.mlflow.see()[ANSWER]
    assert site.mlflow.see()["approval"] == word
    assert site.mlflow.aliases.get("approved") is None
    before = list(site.mlflow.writes)
    assert take_over(site.workspace, site.start) == ([], [])
    assert site.mlflow.writes == before
    # The command is refused for the same reason.
    with pytest.raises((GateRefused, ConflictError), match=reason.replace("(", r"\(")):
        record(site.workspace, find_candidate(site.workspace, "1"), "approved", "ann", "", site.start)
    assert site.kinds() == []


def test_a_page_tells_by_itself_that_its_decision_has_expired(site: ApprovalSite) -> None:
    site.champion()
    site.candidate(valid_hours=-1)
    assert take_over(site.workspace) == ([], [])
    shown = site.mlflow.see()
    assert shown["approval"] == "expired"
    assert "expired at" in shown[ANSWER]
    ((version, standing),) = waiting(site.workspace)
    assert (version.number, standing.word) == (1, "expired")
    with pytest.raises(InputError, match="no version waits"):
        find_candidate(site.workspace, "candidate")


def test_two_people_approve_in_the_page_and_on_the_command_line(site: ApprovalSite) -> None:
    site.champion()
    version = site.candidate(approvers=2)
    site.mlflow.say(approval="approved", by="Anna", reason="fine")
    (half,), _ = take_over(site.workspace, site.start)
    assert (half.state, site.started) == ("half", [])
    shown = site.mlflow.see()
    assert shown["approval"] == "1 of 2"
    assert "approval.by" not in shown, "the second person gives another name"
    assert "Another person must approve it with `sluice approve`" in shown[ANSWER]
    assert "**Approval: 1 of 2.** Approved by Anna at " in site.mlflow.versions["1"]["description"]
    ((_, standing),) = waiting(site.workspace)
    assert (standing.word, standing.by) == ("1 of 2", "Anna")
    # Whatever name is typed there: it may be the same person.
    site.mlflow.say(approval="approved", by="Bert")
    (again,), _ = take_over(site.workspace, site.start)
    assert (again.state, site.kinds(), site.started) == ("half", ["approval by Anna"], [])
    assert site.mlflow.see()["approval"] == "1 of 2"
    # Nor does Anna with her account, who may be the one who typed her name.
    assert record(site.workspace, version, "approved", "anna", "", site.start).state == "half"
    done = record(site.workspace, version, "approved", "bert", "yes", site.start)
    assert (done.state, len(site.started)) == ("approved", 1)
    shown = site.mlflow.see()
    assert (shown["approval"], shown["approval.by"]) == ("approved", "Anna and bert")
    assert ANSWER not in shown
    assert site.mlflow.versions["1"]["description"].count("**Approval:") == 1
    assert take_over(site.workspace, site.start) == ([], [])
    assert len(site.started) == 1


def test_the_second_person_may_be_the_one_in_mlflow(site: ApprovalSite) -> None:
    site.champion()
    version = site.candidate(approvers=2)
    assert record(site.workspace, version, "approved", "ann", "", site.start).state == "half"
    assert site.mlflow.see()["approval"] == "1 of 2"
    site.mlflow.say(approval="approved", by="Bert")
    (decided,), _ = take_over(site.workspace, site.start)
    assert decided.state == "approved"
    assert [one.approval for one in site.started] == [read_state(site.ledger).approval_for(A).entry.digest]  # type: ignore[union-attr]


def test_half_an_approval_that_expires_stays_half(site: ApprovalSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site.champion()
    site.candidate(approvers=2, valid_hours=0.0004)
    site.mlflow.say(approval="approved", by="Anna")
    (half,), _ = take_over(site.workspace, site.start)
    assert half.state == "half"
    threading.Event().wait(1.5)
    with pytest.raises(GateRefused, match="expired at"):
        record(site.workspace, find_candidate(site.workspace, "1"), "approved", "bert", "", site.start)
    assert take_over(site.workspace, site.start) == ([], [])
    assert (site.mlflow.see()["approval"], site.started) == ("expired", [])


def test_a_new_decision_and_a_rollback_ask_again(site: ApprovalSite) -> None:
    site.champion()
    version = site.candidate()
    record(site.workspace, version, "approved", "ann", "", site.start)
    record_rollback(site.ledger, release=A, to=BASE, reason="by hand", actor="ann")
    assert take_over(site.workspace, site.start) == ([], [])
    assert site.mlflow.see()["approval"] == "pending"
    site.mlflow.say(approval="approved", by="Anna")
    take_over(site.workspace, site.start)
    assert [len({one.approval for one in site.started}), len(site.started)] == [2, 2]


def test_our_own_words_are_nobodys_approval(site: ApprovalSite) -> None:
    """Somebody slow shows an approval of before: it must not pass for one of the decision that came since."""
    site.champion()
    version = site.candidate()
    record(site.workspace, version, "approved", "ann", "", site.start)
    late = dict(site.mlflow.see())
    shown = site.decide(A, report=b"another")
    tags = site.mlflow.versions["1"]["tags"]
    tags.update({"release.decision": shown, "approval": "pending"})
    tags.pop("approval.recorded")
    tags.update(late)
    assert take_over(site.workspace, site.start) == ([], [])
    assert (site.mlflow.see()["approval"], len(site.started)) == ("pending", 1)
    assert read_state(site.ledger).approvals_for(A) == ()


def test_where_mlflow_is_not_asked_nothing_is_taken_over(tmp_path: Path, signer: Signer, site: ApprovalSite) -> None:
    closed = ApprovalSite(tmp_path / "closed", signer, site.mlflow, approve_in_mlflow=False)
    cluster = ApprovalSite(tmp_path / "cluster", signer, site.mlflow)
    # On a cluster it is off unless somebody turns it on.
    cluster.workspace.settings.__dict__["profile"] = "cluster"
    for number, one in enumerate((closed, cluster), start=1):
        one.candidate(digest_bytes(one.home.name.encode()))
        one.mlflow.say(number, approval="approved", by="Anna")
        taken, problems = take_over(one.workspace, one.start, only=number)
        assert (taken, one.started) == ([], [])
        assert "counts for nothing here" in problems[0]
        assert site.mlflow.see(number)["approval"] == "pending"
        assert "counts for nothing here" in site.mlflow.see(number)[ANSWER]


def test_who_is_no_approver_takes_nothing_over_and_answers_nobody(site: ApprovalSite) -> None:
    site.champion()
    site.candidate()
    site.workspace.settings.__dict__["access"] = AccessSettings(default=["operator"])
    site.mlflow.say(approval="approved", by="Anna")
    taken, problems = take_over(site.workspace, site.start)
    assert (taken, site.started, site.kinds()) == ([], [], [])
    assert "needs the role approver" in problems[0]
    # An approver who looks next finds it as it was.
    assert site.mlflow.see() == {"approval": "approved", "approval.by": "Anna"}


def test_many_who_look_at_once_record_it_once(site: ApprovalSite) -> None:
    site.champion()
    site.candidate()
    site.mlflow.say(approval="approved", by="Anna")
    barrier = threading.Barrier(6)
    failures: list[BaseException] = []

    def look() -> None:
        barrier.wait()
        try:
            take_over(site.workspace, site.start)
        except BaseException as error:  # noqa: BLE001  (told by the assertion below)
            failures.append(error)

    threads = [threading.Thread(target=look) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert site.kinds() == ["approval by Anna"]
    # Each may ask for the release; all ask for the same one (`start_run` gives it once).
    assert len({decided.approval for decided in site.started}) == 1
    assert site.mlflow.see()["approval"] == "approved"


@pytest.mark.parametrize("approvers", [1, 2])
def test_killed_after_any_write_the_next_look_finishes_it(
    tmp_path: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch, approvers: int
) -> None:
    monkeypatch.setattr(approvals, "SETTLE_S", 0.0)
    deaths = 0
    for dies_after in range(1, 40):
        site = _fresh(tmp_path / f"{approvers}-{dies_after}", signer, monkeypatch)
        site.champion()
        version = site.candidate(approvers=approvers)
        if approvers == 2:
            record(site.workspace, version, "approved", "carol", "")
        site.mlflow.say(approval="approved", by="Anna")
        site.mlflow.writes.clear()
        site.mlflow.dies_after = dies_after
        try:
            take_over(site.workspace, site.start)
        except Died:
            deaths += 1
        else:
            break
        site.mlflow.dies_after = 0
        assert take_over(site.workspace, site.start)[1] == []
        _assert_approved_once(site)
    assert deaths >= 3


def test_killed_between_the_ledger_and_the_start_the_next_look_starts_it(site: ApprovalSite) -> None:
    site.champion()
    site.candidate()
    site.mlflow.say(approval="approved", by="Anna")

    def die(_: Decided) -> Any:
        raise Died

    for _ in range(2):
        with pytest.raises(Died):
            take_over(site.workspace, die)
    take_over(site.workspace, site.start)
    assert len(site.started) == 1
    _assert_approved_once(site)


@pytest.mark.parametrize(("state", "write"), [("approved", "record_approval"), ("rejected", "record_rejection")])
def test_a_decision_that_comes_in_between_is_not_decided_unseen(
    site: ApprovalSite, monkeypatch: pytest.MonkeyPatch, state: Any, write: str
) -> None:
    site.champion()
    version = site.candidate()
    real = getattr(approvals, write)

    def late(*given: Any, **named: Any) -> Any:
        site.decide(A, report=b"another")
        return real(*given, **named)

    monkeypatch.setattr(approvals, write, late)
    with pytest.raises(ConflictError, match="There is a later decision"):
        record(site.workspace, version, state, "ann", "", site.start)
    assert (site.kinds(), site.started) == ([], [])


def test_an_approval_by_command_is_for_the_command_to_finish(site: ApprovalSite) -> None:
    """`--no-release` must not be undone by somebody who watches."""
    site.champion()
    version = site.candidate()
    record(site.workspace, version, "approved", "ann", "")
    site.mlflow.versions["1"]["tags"].update(approval="pending")
    take_over(site.workspace, site.start)
    assert (site.started, site.mlflow.see()["approval"]) == ([], "approved")


def test_a_name_is_no_markup_of_the_page(site: ApprovalSite) -> None:
    site.champion()
    site.candidate()
    site.mlflow.say(approval="rejected", by="Eve\n\n### Gate: PASS\n\n[more](http://evil.example)" + "x" * 4000)
    take_over(site.workspace, site.start)
    page = site.mlflow.versions["1"]["description"]
    assert page.startswith("### Gate: PASS\n\n**Approval: rejected.** Rejected by Eve ")
    assert page.count("\n### ") == 0
    assert "](http" not in page


@pytest.mark.parametrize("other", ["Ren\u00e9e", " RENE\u0301E ", "re\u200bn\u00e9e", "\uff32en\u00e9e"])
def test_one_name_written_otherwise_is_one_person(site: ApprovalSite, other: str) -> None:
    site.champion()
    version = site.candidate(approvers=2)
    record(site.workspace, version, "approved", "ren\u00e9e", "", site.start)
    assert record(site.workspace, version, "approved", other, "", site.start).state == "half"
    assert site.started == []


@pytest.mark.parametrize("text", ["\u00b2", "1.5", "-1", "\u0663"])
def test_a_version_that_is_no_number_is_told(site: ApprovalSite, text: str) -> None:
    with pytest.raises(InputError, match="is not a number"):
        find_candidate(site.workspace, text)


def test_a_version_of_somebody_else_holds_up_no_other(site: ApprovalSite) -> None:
    site.champion()
    site.candidate()
    site.mlflow.add("edited by hand")
    site.mlflow.aliases["candidate"] = "2"
    site.mlflow.say(approval="approved", by="Anna")
    site.mlflow.say(2, approval="approved", by="Anna")
    follow_ledger(site.workspace)
    taken, problems = take_over(site.workspace, site.start)
    assert ([one.version.number for one in taken], problems) == ([1], [])
    assert waiting(site.workspace) == []
    with pytest.raises(InputError, match="no release"):
        find_candidate(site.workspace, "2")


def test_a_rejected_version_is_no_candidate(site: ApprovalSite) -> None:
    site.champion()
    site.candidate()
    assert find_candidate(site.workspace, "candidate").number == 1
    record_rejection(site.ledger, adapter=A, approver="bob", reason="no")
    with pytest.raises(InputError, match="no version waits"):
        find_candidate(site.workspace, "candidate")
    with pytest.raises(InputError, match="'seven' is not a number"):
        find_candidate(site.workspace, "seven")


def _fresh(home: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch) -> ApprovalSite:
    from tests.registry.fake_versions import FakeVersions

    mlflow = FakeVersions()
    monkeypatch.setattr(approvals, "registry_of", lambda _: mlflow)
    monkeypatch.setattr("sluice.registry.mlflow_registry.MlflowRegistry", lambda _: mlflow)
    return ApprovalSite(home, signer, mlflow)


def _assert_approved_once(site: ApprovalSite) -> None:
    assert site.kinds().count("approval by Anna") == 1
    assert len({decided.approval for decided in site.started}) == 1
    assert site.mlflow.see()["approval"] == site.mlflow.see()["approval.recorded"] == "approved"
