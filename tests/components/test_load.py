"""A release that goes on after a crash: its rollout decides, not the way in."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice.components import bring_up, champion
from sluice.components.load import load_step
from sluice.components.rollout import rollout_store
from sluice.components.task import Task
from sluice.components.workspace import Workspace
from sluice.infra.errors import GateRefused
from sluice.infra.settings import Settings
from sluice.provenance.attestation import Signer
from sluice.provenance.ledger import Ledger
from sluice.provenance.releases import record_failure
from sluice.serving.rollout_state import Phase, RolloutState
from sluice.serving.routes import Target
from tests.provenance.release_actions import BASE, A, decide, make_champion
from tests.support.directory_store import DirectoryStore


@pytest.fixture
def running(tmp_path: Path, object_store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> Task:
    workspace = Workspace(Settings(home=tmp_path, serving={"vllm_url": "http://127.0.0.1:1"}))
    signer = Signer.load_or_create(tmp_path / "keys" / "signing.pem")
    workspace.__dict__.update(objects=object_store, signer=signer, ledger=Ledger(object_store, "assistant", signer))
    make_champion(workspace.ledger, BASE)
    decide(workspace.ledger, A, expires="2999-01-01T00:00:00Z")
    monkeypatch.setattr(champion, "base_digest", lambda _: BASE)
    monkeypatch.setattr(bring_up, "ensure_served", lambda *_: None)
    return Task("load", workspace)


def begun(running: Task, phase: Phase) -> None:
    one, other = (Target(digest, digest, digest[-8:], ("127.0.0.1:1",)) for digest in (A, BASE))
    rollout_store(running.workspace).save(RolloutState(one, other, phase, 0, 25, 0.0))


def test_without_approval_nothing_begins(running: Task) -> None:
    with pytest.raises(GateRefused, match="approval"):
        load_step(running, adapter=A, policy="default", allow_override=False)


def test_a_rollout_under_way_is_not_stopped_at_the_door(running: Task) -> None:
    # No approval (any more): refused here, 25% of the users would stay on it with nobody watching.
    begun(running, "holding")
    assert load_step(running, adapter=A, policy="default", allow_override=False) == BASE


def test_a_failed_rollout_can_be_cleared_away(running: Task) -> None:
    begun(running, "failing")
    record_failure(running.workspace.ledger, release=A, reason="analysis", actor="release")
    assert load_step(running, adapter=A, policy="default", allow_override=False) == BASE


def test_a_rollout_that_never_had_users_asks_for_leave(running: Task) -> None:
    begun(running, "probing")
    with pytest.raises(GateRefused, match="approval"):
        load_step(running, adapter=A, policy="default", allow_override=False)
