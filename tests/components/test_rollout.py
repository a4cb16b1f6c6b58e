"""What a rollout leaves in the ledger, and what goes on when the stores are down."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice.components import rollout as rollout_component
from sluice.components.canary import canary_step
from sluice.components.load import load_step
from sluice.components.rollout import LedgerRecorder, rollout_store
from sluice.components.task import Task
from sluice.components.workspace import Workspace
from sluice.infra.errors import GateRefused, UnavailableError
from sluice.infra.settings import Settings
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.attestation import Signer
from sluice.provenance.ledger import Ledger
from sluice.provenance.releases import authorize, promote, read_state, record_approval
from sluice.serving.analysis import AnalysisResult
from sluice.serving.control import Order
from sluice.serving.rollout_state import RolloutState
from sluice.serving.routes import Target
from tests.provenance.release_actions import BASE, A, decide, make_champion
from tests.support.directory_store import DirectoryStore

LATER = "2999-01-01T00:00:00Z"
SAID = AnalysisResult("inconclusive", "Too few requests.", ())


@pytest.fixture
def workspace(
    tmp_path: Path, object_store: DirectoryStore, artifacts: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> Workspace:
    workspace = Workspace(Settings(home=tmp_path, serving={"vllm_url": "http://127.0.0.1:1"}))
    signer = Signer.load_or_create(tmp_path / "keys" / "signing.pem")
    ledger = Ledger(object_store, "assistant", signer)
    workspace.__dict__.update(objects=object_store, signer=signer, ledger=ledger, artifacts=artifacts)
    make_champion(ledger, BASE)
    decide(ledger, A, expires=LATER)
    record_approval(ledger, adapter=A, approver="ann")
    monkeypatch.setattr(rollout_component, "follow_ledger", lambda _: [])
    return workspace


def test_a_step_by_order_lets_the_release_be_promoted(workspace: Workspace) -> None:
    recorder = LedgerRecorder(workspace, allow_override=False)
    recorder.step(A, 0, 10, "inconclusive", None)
    assert read_state(workspace.ledger).weight(A) == 10
    recorder.step(A, 0, 10, "pass", SAID, Order("promote", "ada", "the old one leaks", 0.0))
    last = read_state(workspace.ledger).rollout_steps(A)[-1]
    assert (last.ordered_by, last.reason) == ("ada", "the old one leaks")
    assert last.analysis is not None
    assert AnalysisResult.from_json(_json(workspace, last.analysis)) == SAID
    promote(workspace.ledger, release=A, expected_champion=BASE, actor="release")


def test_a_failure_is_told_with_what_convicted_it_and_bars_the_release(workspace: Workspace) -> None:
    recorder = LedgerRecorder(workspace, allow_override=False)
    recorder.step(A, 0, 10, "inconclusive", None)
    for _ in range(2):
        recorder.failure(A, BASE, "errors", SAID)
    state = read_state(workspace.ledger)
    failure = state.failure_of(A)
    assert failure is not None
    assert _json(workspace, failure.entry.body["analysis"])["sentence"] == SAID.sentence
    assert state.weight(A) == 0
    with pytest.raises(GateRefused, match="does not come back"):
        record_approval(workspace.ledger, adapter=A, approver="bob")


def test_a_withdrawn_release_needs_a_new_approval_and_may_then_begin_again(workspace: Workspace) -> None:
    recorder = LedgerRecorder(workspace, allow_override=False)
    recorder.step(A, 0, 10, "inconclusive", None)
    recorder.withdrawal(A, BASE, "no traffic")
    with pytest.raises(GateRefused, match="no approval"):
        authorize(workspace.ledger, A)
    record_approval(workspace.ledger, adapter=A, approver="ann")
    authorize(workspace.ledger, A)


def test_a_rollout_under_way_is_watched_on_without_the_stores(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (Target(digest, digest, digest[-8:], ("127.0.0.1:1",)) for digest in (A, BASE))
    rollout_store(workspace).save(RolloutState(one, other, "holding", 0, 10, 0.0))

    class Down:
        def __getattr__(self, name: str) -> object:
            raise UnavailableError("S3 is down")

    workspace.__dict__.update(objects=Down(), ledger=Down())
    given = {"adapter": A, "policy": "default", "allow_override": False}
    assert load_step(Task("load", workspace), **given) == BASE  # type: ignore[arg-type]

    class Reached(Exception):
        """The rollout was opened."""

    def opened(*_: object, **__: object) -> None:
        raise Reached

    monkeypatch.setattr(rollout_component, "open_rollout", opened)
    with pytest.raises(Reached):
        canary_step(Task("canary", workspace), **given)  # type: ignore[arg-type]


def _json(workspace: Workspace, digest: str) -> dict[str, object]:
    import json

    found: dict[str, object] = json.loads(workspace.file(digest, "analysis.json"))
    return found
