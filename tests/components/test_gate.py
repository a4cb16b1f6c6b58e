"""A decision that nobody used in its time is made anew; one that was used, or refused, is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice.components.gate import lapsed_unused, record_in_ledger, require_evaluation_of
from sluice.components.task import Task
from sluice.components.workspace import Workspace
from sluice.infra.errors import InputError
from sluice.infra.settings import Settings
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.attestation import Signer
from sluice.provenance.ledger import Ledger
from sluice.provenance.releases import read_state, record_failure, record_rejection
from sluice.provenance.steps import StepKey, StepOutput, StepRecord
from tests.provenance.release_actions import BASE, HOLDOUT, REPORT, A, make_champion
from tests.support.directory_store import DirectoryStore

PAST, FUTURE = "2020-01-01T00:00:00+00:00", "2999-01-01T00:00:00+00:00"


@pytest.fixture
def running(tmp_path: Path, object_store: DirectoryStore) -> Task:
    workspace = Workspace(Settings(home=tmp_path))
    signer = Signer.load_or_create(tmp_path / "keys" / "signing.pem")
    workspace.__dict__.update(objects=object_store, signer=signer, ledger=Ledger(object_store, "assistant", signer))
    make_champion(workspace.ledger, BASE)
    return Task("gate", workspace)


def record(expires: str) -> StepRecord:
    output = StepOutput({"report": REPORT}, {"verdict": "pass", "expires": expires, "approvers": 1})
    return StepRecord(StepKey("gate", REPORT, {}, {}), output, PAST, PAST, "here", REPORT)


def note(running: Task, expires: str) -> None:
    record_in_ledger(running, record(expires), candidate=A, champion=BASE, holdout=HOLDOUT)


def test_only_an_expired_decision_lapses(running: Task) -> None:
    assert lapsed_unused(running, record(PAST), A)
    assert not lapsed_unused(running, record(FUTURE), A)


def test_a_candidate_that_was_answered_is_not_asked_about_again(running: Task) -> None:
    assert not lapsed_unused(running, record(PAST), BASE), "it was released"
    note(running, PAST)
    record_rejection(running.workspace.ledger, adapter=A, approver="ann", reason="no")
    assert not lapsed_unused(running, record(PAST), A), "it was rejected"


def test_a_failed_candidate_stays_as_it_is(running: Task) -> None:
    record_failure(running.workspace.ledger, release=A, reason="analysis", actor="release")
    assert not lapsed_unused(running, record(PAST), A)


def test_a_renewed_decision_reaches_the_ledger_and_the_same_one_does_not_twice(running: Task) -> None:
    note(running, PAST)
    note(running, PAST)
    note(running, FUTURE)
    entries = read_state(running.workspace.ledger).entries
    found = [e.body["expires"] for e in entries if e.kind == "decision" and e.body["adapter"] == A]
    assert found == [PAST, FUTURE]


def test_nothing_is_decided_by_an_evaluation_of_something_else(running: Task, artifacts: ArtifactStore) -> None:
    about = {"candidate": A, "champion": BASE, "prompts": HOLDOUT, "suite": REPORT}
    running.workspace.__dict__["artifacts"] = artifacts
    evaluation = artifacts.put_files({"scores.json": b"{}"}, "evaluation", about).digest
    require_evaluation_of(running.workspace, evaluation, about)
    for name in about:
        with pytest.raises(InputError, match=f"is of another {name} ") as raised:
            require_evaluation_of(running.workspace, evaluation, {**about, name: BASE if name != "champion" else A})
        assert "Start it again" in str(raised.value)
