"""Releases: every way to be refused has its own sentence, and the way that is allowed stays open."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from sluice.infra.errors import ConflictError, GateRefused, InputError
from sluice.provenance.canonical import digest_bytes, short
from sluice.provenance.ledger import Ledger
from sluice.provenance.release_state import Verdict
from sluice.provenance.releases import (
    authorize,
    promote,
    read_state,
    record_approval,
    record_failure,
    record_rejection,
    record_rollout_step,
)
from tests.provenance.release_actions import BASE, LATER, NOW, REPORT, A, B, admit, decide, make_champion, step


def test_the_whole_way_of_a_release(ledger: Ledger) -> None:
    make_champion(ledger, BASE)
    admit(ledger, A)
    assert not authorize(ledger, A, now=NOW).standing
    for number, weight in enumerate((5, 25, 100), start=1):
        step(ledger, A, weight, "pending", number)
        step(ledger, A, weight, "pass", number)
        assert read_state(ledger).weight(A) == weight
    promote(ledger, release=A, expected_champion=BASE, actor="ann", now=NOW)
    state = read_state(ledger)
    assert state.champion() == A
    assert state.previous_champions() == [BASE]
    assert [(c.release, c.previous, c.kind) for c in state.history()] == [
        (BASE, None, "promotion"),
        (A, BASE, "promotion"),
    ]
    assert (state.weight(A), state.weight(BASE)) == (100, 0)
    approval, decision = state.approval_for(A), state.decision_for(A)
    assert approval is not None
    assert decision is not None
    assert (approval.approver, approval.decision) == ("ann", decision.entry.digest)


def test_nothing_known_is_refused(ledger: Ledger) -> None:
    with pytest.raises(GateRefused, match=f"{short(A)} has no gate decision"):
        authorize(ledger, A, now=NOW)
    with pytest.raises(GateRefused, match="has no gate decision"):
        step(ledger, A, 1)
    with pytest.raises(GateRefused, match="has no gate decision"):
        promote(ledger, release=A, expected_champion=None, actor="ann", now=NOW)
    with pytest.raises(GateRefused, match="has no gate decision"):
        record_approval(ledger, adapter=A, approver="ann", now=NOW)
    with pytest.raises(GateRefused, match="no gate decision to reject"):
        record_rejection(ledger, adapter=A, approver="ann", reason="")
    assert ledger.entries() == []


@pytest.mark.parametrize("verdict", ["fail", "inconclusive"])
def test_only_a_pass_is_a_pass(ledger: Ledger, verdict: Verdict) -> None:
    decide(ledger, A, verdict)
    for attempt in (
        lambda: record_approval(ledger, adapter=A, approver="ann", now=NOW),
        lambda: authorize(ledger, A, now=NOW),
    ):
        with pytest.raises(GateRefused, match=f"verdict about release {short(A)} is '{verdict}'"):
            attempt()


def test_a_later_decision_replaces_an_earlier_one_and_its_approval(ledger: Ledger) -> None:
    admit(ledger, A)
    decide(ledger, A, "inconclusive")
    with pytest.raises(GateRefused, match="'inconclusive'"):
        authorize(ledger, A, now=NOW)
    decide(ledger, A, report=digest_bytes(b"another report"))
    with pytest.raises(GateRefused, match="has no approval of its decision"):
        authorize(ledger, A, now=NOW)


def test_an_expired_decision_admits_nobody_but_the_champion_stays(ledger: Ledger) -> None:
    admit(ledger, A)
    authorize(ledger, A, now=NOW + timedelta(days=7) - timedelta(microseconds=1))
    with pytest.raises(GateRefused, match=f"expired at {LATER}"):
        authorize(ledger, A, now=NOW + timedelta(days=7))
    with pytest.raises(GateRefused, match="expired"):
        record_approval(ledger, adapter=A, approver="bob", now=NOW + timedelta(days=7))
    promote(ledger, release=A, expected_champion=None, actor="ann", now=NOW)
    assert authorize(ledger, A, now=NOW + timedelta(days=70)).standing


@pytest.mark.parametrize("expires", ["", "soon", "2026-03-08T12:00:00", "NaN"])
def test_a_decision_without_a_plain_time_of_expiry_is_refused(ledger: Ledger, expires: str) -> None:
    with pytest.raises(InputError, match="expires = "):
        decide(ledger, A, expires=expires)
    # Written past the rule by somebody else's program: it still admits nobody.
    body = {"adapter": A, "verdict": "pass", "report": REPORT, "expires": expires, "holdout": None, "champion": None}
    ledger.append("decision", body, "gate", expected_head=None)
    with pytest.raises(GateRefused, match="does not say when it expires"):
        authorize(ledger, A, now=NOW)


def test_a_decision_against_a_former_champion_is_stale(ledger: Ledger) -> None:
    make_champion(ledger, BASE)
    admit(ledger, A)
    make_champion(ledger, B)
    with pytest.raises(GateRefused, match=f"compared with {short(BASE)}, but the champion is {short(B)} now"):
        authorize(ledger, A, now=NOW)


def test_an_override_needs_leave_a_person_and_a_reason(ledger: Ledger) -> None:
    with pytest.raises(GateRefused, match="overriding it is not allowed here"):
        decide(ledger, A, "overridden", person="ann", reason="outage")
    for person, reason in (("", "outage"), ("ann", " ")):
        with pytest.raises(GateRefused, match="needs a named person and a reason"):
            decide(ledger, A, "overridden", person=person, reason=reason, allow_override=True)
    decide(ledger, A, "overridden", person="ann", reason="outage", allow_override=True)
    with pytest.raises(GateRefused, match="not allowed here"):
        record_approval(ledger, adapter=A, approver="bob", now=NOW)
    record_approval(ledger, adapter=A, approver="bob", now=NOW, allow_override=True)
    with pytest.raises(GateRefused, match="not allowed here"):
        authorize(ledger, A, now=NOW)
    granted = authorize(ledger, A, now=NOW, allow_override=True)
    assert granted.decision is not None
    assert granted.decision.person == "ann"


def test_an_override_written_past_the_rule_is_refused(ledger: Ledger) -> None:
    body = {"adapter": A, "verdict": "overridden", "report": REPORT, "expires": LATER}
    ledger.append("decision", body, "gate", expected_head=None)
    with pytest.raises(GateRefused, match="needs a named person"):
        authorize(ledger, A, now=NOW, allow_override=True)


def test_a_rejected_candidate_needs_a_new_decision(ledger: Ledger) -> None:
    admit(ledger, A)
    record_rejection(ledger, adapter=A, approver="bob", reason="too wordy")
    for attempt in (
        lambda: authorize(ledger, A, now=NOW),
        lambda: record_approval(ledger, adapter=A, approver="ann", now=NOW),
    ):
        with pytest.raises(GateRefused, match=r"rejected by bob at .*: too wordy"):
            attempt()
    decide(ledger, A)
    with pytest.raises(GateRefused, match="no approval"):
        authorize(ledger, A, now=NOW)
    record_approval(ledger, adapter=A, approver="ann", now=NOW)
    authorize(ledger, A, now=NOW)


def test_an_approval_of_a_decision_that_is_not_the_latest_is_refused(ledger: Ledger) -> None:
    seen = decide(ledger, A)
    decide(ledger, A, report=digest_bytes(b"another"))
    with pytest.raises(ConflictError, match="There is a later decision"):
        record_approval(ledger, adapter=A, approver="ann", decision=seen.digest, now=NOW)
    with pytest.raises(InputError, match="approver is empty"):
        record_approval(ledger, adapter=A, approver=" ", now=NOW)


def test_unknown_verdicts_are_refused(ledger: Ledger) -> None:
    with pytest.raises(InputError, match="verdict = 'passed' is none of"):
        decide(ledger, A, "passed")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="verdict = 'overridden' is none of"):
        step(ledger, A, 5, "overridden")


def test_two_people_have_to_approve_where_the_decision_asks_for_two(ledger: Ledger) -> None:
    make_champion(ledger, BASE)
    decide(ledger, A, approvers=2)
    first = record_approval(ledger, adapter=A, approver="ann", reason="read 20 answers", now=NOW)
    state = read_state(ledger)
    assert [one.approver for one in state.approvals_for(A)] == ["ann"]
    assert state.approval_for(A) is None
    half = rf"approved by ann alone \(at {first.time}\): its decision asks for 2 people"
    with pytest.raises(GateRefused, match=half):
        authorize(ledger, A, now=NOW)
    # The same person again, in whatever letters, adds nothing.
    for name in ("ann", "Ann", " ANN "):
        assert record_approval(ledger, adapter=A, approver=name, now=NOW) == first
    with pytest.raises(GateRefused, match=half):
        step(ledger, A, 5, "pending")
    with pytest.raises(GateRefused, match=half):
        promote(ledger, release=A, expected_champion=BASE, actor="ann", now=NOW)
    record_approval(ledger, adapter=A, approver="bob", now=NOW)
    granted = authorize(ledger, A, now=NOW)
    assert [one.approver for one in granted.approvals] == ["ann", "bob"]
    # More approvals change nothing about which ones let it through.
    completed = read_state(ledger).approval_for(A)
    record_approval(ledger, adapter=A, approver="carol", now=NOW)
    assert read_state(ledger).approval_for(A) == completed
    step(ledger, A, 100, "pending")
    step(ledger, A, 100, "pass")
    promote(ledger, release=A, expected_champion=BASE, actor="ann", now=NOW)
    assert read_state(ledger).reigns()[-1].approver == "ann and bob"


def test_a_name_that_nobody_checked_is_one_anonymous_person_at_most(ledger: Ledger) -> None:
    decide(ledger, A, approvers=2)
    for name in ("Ann", "Bob", "somebody in MLflow"):
        record_approval(ledger, adapter=A, approver=name, account="", now=NOW)
    assert [one.approver for one in read_state(ledger).approvals_for(A)] == ["Ann"]
    # Ann herself may be the one who typed it.
    record_approval(ledger, adapter=A, approver="ann", now=NOW)
    with pytest.raises(GateRefused, match="approved by Ann alone"):
        authorize(ledger, A, now=NOW)
    record_approval(ledger, adapter=A, approver="carol", now=NOW)
    authorize(ledger, A, now=NOW)


def test_an_administrator_who_acts_for_others_is_one_person(ledger: Ledger) -> None:
    decide(ledger, A, approvers=2)
    record_approval(ledger, adapter=A, approver="ann", account="root", now=NOW)
    for name, account in (("bob", "root"), ("root", "root"), ("ann", "ann")):
        record_approval(ledger, adapter=A, approver=name, account=account, now=NOW)
        assert read_state(ledger).approval_for(A) is None
    record_approval(ledger, adapter=A, approver="bob", now=NOW)
    authorize(ledger, A, now=NOW)


def test_half_an_approval_ends_with_its_decision(ledger: Ledger) -> None:
    decide(ledger, A, approvers=2)
    record_approval(ledger, adapter=A, approver="ann", now=NOW)
    late = NOW + timedelta(days=7)
    for name in ("ann", "bob"):
        with pytest.raises(GateRefused, match=f"expired at {LATER}"):
            record_approval(ledger, adapter=A, approver=name, now=late)
    # Anybody's rejection ends it, and the half before it does not count for a later decision.
    record_rejection(ledger, adapter=A, approver="carol", reason="too wordy")
    with pytest.raises(GateRefused, match="rejected by carol"):
        record_approval(ledger, adapter=A, approver="bob", now=NOW)
    decide(ledger, A, approvers=2, report=digest_bytes(b"another report"))
    record_approval(ledger, adapter=A, approver="bob", now=NOW)
    with pytest.raises(GateRefused, match="approved by bob alone"):
        authorize(ledger, A, now=NOW)


@pytest.mark.parametrize("approvers", [0, 3, True, "two", 1.5])
def test_a_decision_asks_for_one_or_two_people(ledger: Ledger, approvers: object) -> None:
    with pytest.raises(InputError, match="approvers = "):
        decide(ledger, A, approvers=approvers)
    if approvers is True:
        return
    # Written past the rule by somebody else's program: it admits nobody.
    body = {"adapter": A, "verdict": "pass", "report": REPORT, "expires": LATER, "approvers": approvers}
    entry = ledger.append("decision", body, "gate", expected_head=None)
    body = {"adapter": A, "decision": entry.digest, "approver": "ann", "account": "ann", "reason": ""}
    ledger.append("approval", body, "ann", expected_head=entry.digest)
    for attempt in (
        lambda: authorize(ledger, A, now=NOW),
        lambda: record_approval(ledger, adapter=A, approver="b", now=NOW),
    ):
        with pytest.raises(GateRefused, match="approvers"):
            attempt()


def test_what_compared_with_a_former_champion_cannot_be_approved(ledger: Ledger) -> None:
    make_champion(ledger, BASE)
    decide(ledger, A)
    make_champion(ledger, B)
    with pytest.raises(GateRefused, match=f"compared with {short(BASE)}, but the champion is {short(B)} now"):
        record_approval(ledger, adapter=A, approver="ann", now=NOW)


def test_an_approval_whose_answer_was_lost_is_found_again_whatever_came_of_it(ledger: Ledger) -> None:
    make_champion(ledger, BASE)
    decide(ledger, A)
    given = record_approval(ledger, adapter=A, approver="ann", now=NOW)
    promote(ledger, release=A, expected_champion=BASE, actor="release", now=NOW)
    late = NOW + timedelta(days=70)
    assert record_approval(ledger, adapter=A, approver="ann", now=late) == given


def test_a_step_passes_by_order_of_a_person_and_no_failure_does(ledger: Ledger) -> None:
    make_champion(ledger, BASE)
    admit(ledger, A)
    step(ledger, A, 10, "pending")
    with pytest.raises(GateRefused, match="holds at weight 10"):
        promote(ledger, release=A, expected_champion=BASE, actor="release", now=NOW)
    passed: dict[str, Any] = {"release": A, "step": 1, "weight": 10, "analysis": None, "actor": "release", "now": NOW}
    with pytest.raises(InputError, match="says why"):
        record_rollout_step(ledger, verdict="pass", ordered_by="ann", **passed)
    with pytest.raises(InputError, match="an order lets a step pass"):
        record_rollout_step(ledger, verdict="inconclusive", ordered_by="ann", reason="it leaks", **passed)
    record_rollout_step(ledger, verdict="pass", ordered_by="ann", reason="it leaks", **passed)
    last = read_state(ledger).rollout_steps(A)[-1]
    assert (last.ordered_by, last.reason) == ("ann", "it leaks")
    promote(ledger, release=A, expected_champion=BASE, actor="release", now=NOW)
    record_failure(ledger, release=A, reason="errors", actor="release", analysis=REPORT)
    with pytest.raises(GateRefused, match="failed at"):
        record_rollout_step(ledger, verdict="pass", ordered_by="ann", reason="it leaks", **passed)
    with pytest.raises(GateRefused, match="failed at"):
        record_approval(ledger, adapter=A, approver="bob", now=NOW)
