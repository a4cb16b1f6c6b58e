"""Decisions are found by what people know of them, verified before they are told, and stand as the ledger says."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sluice.components.decisions import explanation_of, find_decision, standing_of
from sluice.components.workspace import Workspace
from sluice.evaluation.stopping import Stopping, write_stopping
from sluice.infra.errors import InputError, IntegrityError
from sluice.provenance.canonical import hex_of
from sluice.provenance.releases import read_state, record_approval, record_failure, record_rejection
from tests.components.decided import gated, workspace_in
from tests.evaluation.scores import policy, scores
from tests.provenance.release_actions import A, B
from tests.support.directory_store import DirectoryStore

RULES = policy({"rule": "superiority", "metric": "token_f1"}, second_approver=["data"])
OLD, NEW = scores(token_f1=[0.2] * 120), scores(token_f1=[0.6] * 120)
EARLIER = datetime.now(UTC) - timedelta(hours=2)


@pytest.fixture
def workspace(tmp_path: Path, object_store: DirectoryStore) -> Workspace:
    return workspace_in(tmp_path / "home", object_store)


def test_the_latest_decision_is_found_or_that_of_a_digest(workspace: Workspace) -> None:
    with pytest.raises(InputError, match="no gate decision yet"):
        find_decision(workspace)
    gated(workspace, A, OLD, NEW, RULES, now=EARLIER)
    gated(workspace, B, NEW, OLD, RULES)
    latest = find_decision(workspace)
    assert (latest.decision.subjects.candidate, latest.decision.verdict, latest.later) == (B, "fail", False)
    for name in (A, A.removeprefix("sha256:")[:12], find_decision(workspace, A).digest):
        assert find_decision(workspace, name).decision.verdict == "pass"
    with pytest.raises(InputError, match="no gate decision about 'sha256:ffff'"):
        find_decision(workspace, "sha256:ffff")


def test_an_earlier_decision_about_a_candidate_says_that_there_is_a_later_one(workspace: Workspace) -> None:
    gated(workspace, A, OLD, NEW, RULES, now=EARLIER)
    first = find_decision(workspace).digest
    gated(workspace, A, NEW, OLD, RULES)
    found = find_decision(workspace, first)
    assert (found.decision.verdict, found.later) == ("pass", True)
    assert find_decision(workspace, A).decision.verdict == "fail"


def test_a_decision_that_was_changed_is_not_told(workspace: Workspace) -> None:
    gated(workspace, A, OLD, NEW, RULES)
    record = next(workspace.steps.records())
    place = f"attestations/sha256/{hex_of(record.statement)}.json"
    workspace.objects.put(place, workspace.objects.get(place) + b" ")
    with pytest.raises(IntegrityError, match="is damaged"):
        find_decision(workspace)


def test_the_ledger_says_what_became_of_it(workspace: Workspace) -> None:
    gated(workspace, A, OLD, NEW, RULES, changes={"data"})
    found = find_decision(workspace)
    assert found.decision.approvers == 2
    assert (standing_of(workspace, found).approvals, standing_of(workspace, found).closed) == ((), "")
    decided = read_state(workspace.ledger).decision_for(A)
    assert decided is not None
    record_approval(workspace.ledger, adapter=A, approver="ann", decision=decided.entry.digest)
    assert standing_of(workspace, found).approvals == ("ann",)
    record_rejection(workspace.ledger, adapter=A, approver="bob", reason="tone")
    assert standing_of(workspace, found).closed == "bob rejected it"
    record_failure(workspace.ledger, release=A, reason="latency", actor="release")
    assert standing_of(workspace, found).closed == "the release failed (latency)"


def test_what_was_saved_is_read_from_the_evidence(workspace: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    folder.mkdir()
    write_stopping(folder, Stopping(480, 96, 32, "Token F1 passed, however many items follow", 192, 768))
    evaluation = workspace.artifacts.put_directory(folder, "evaluation").digest
    gated(workspace, A, OLD, NEW, RULES, evidence={"evaluation": evaluation})
    explained = explanation_of(workspace, find_decision(workspace), now=datetime.now(UTC), version=3)
    assert ("asked", "96 of 480 items asked, 768 answers saved: Token F1 passed, however many items follow.") in (
        explained.notes
    )
    assert "sluice approve 3" in explained.next_step
