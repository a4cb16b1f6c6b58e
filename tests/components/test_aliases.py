"""Which release has which alias, by the ledger alone; and what is noted of a repair."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice.components.aliases import candidate, challenger, follow_ledger, note_repairs
from sluice.components.workspace import Workspace
from sluice.infra import audit
from sluice.infra.settings import MlflowSettings, Settings
from sluice.pipelines.history import champions, repairs
from sluice.provenance.attestation import Signer
from sluice.provenance.ledger import Ledger
from sluice.provenance.releases import promote, read_state, record_rollback
from sluice.registry.aliases import Repair
from tests.provenance.release_actions import BASE, NOW, A, B, admit, decide, make_champion, step
from tests.support.directory_store import DirectoryStore


@pytest.fixture
def workspace(tmp_path: Path, object_store: DirectoryStore) -> Workspace:
    """An installation whose MLflow is lost."""
    home = tmp_path / "home"
    made = Workspace(Settings(home=home, mlflow=MlflowSettings(tracking_uri="http://127.0.0.1:9")))
    signer = Signer.load_or_create(tmp_path / "signer.pem")
    made.__dict__.update(objects=object_store, ledger=Ledger(object_store, "assistant", signer))
    return made


def named(workspace: Workspace) -> tuple[str | None, str | None]:
    state = read_state(workspace.ledger)
    return challenger(state), candidate(state)


def test_the_challenger_is_the_release_in_canary_and_nobody_before_or_after(workspace: Workspace) -> None:
    ledger = workspace.ledger
    make_champion(ledger, BASE)
    assert named(workspace) == (None, None)
    admit(ledger, A)
    assert named(workspace) == (None, A)
    step(ledger, A, 5, "pending")
    assert named(workspace) == (A, A)
    step(ledger, A, 5, "pass")
    step(ledger, A, 25, "pass", number=2)
    assert named(workspace) == (A, A)
    promote(ledger, release=A, expected_champion=BASE, actor="ann", now=NOW)
    assert named(workspace) == (None, None)
    # The next one fails in its canary: it is neither, whatever comes first, the failure or the rollback.
    admit(ledger, B)
    step(ledger, B, 5, "fail")
    assert named(workspace) == (None, None)
    record_rollback(ledger, release=B, to=A, reason="slow", actor="release")
    assert named(workspace) == (None, None)


def test_a_canary_that_gives_its_users_back_is_no_challenger(workspace: Workspace) -> None:
    make_champion(workspace.ledger, BASE)
    admit(workspace.ledger, A)
    step(workspace.ledger, A, 5, "pass")
    step(workspace.ledger, A, 0, "pass", number=2)
    assert named(workspace) == (None, A)
    decide(workspace.ledger, A, "fail")
    assert named(workspace) == (None, None)


def test_a_repair_by_hand_is_noted_and_shipped(workspace: Workspace, object_store: DirectoryStore) -> None:
    lagged, moved = Repair("champion", "It lagged."), Repair("champion", "It was moved by hand.", by_hand=True)
    assert note_repairs(workspace, "assistant", [lagged, moved]) == ["It lagged.", "It was moved by hand."]
    (line,) = audit.read(workspace.settings.home)
    assert (line.verb, line.subject, line.outcome) == ("repair alias", "assistant@champion", "repaired")
    assert [one.id for one in audit.read_shipped(object_store)] == [line.id]
    assert [sentence.endswith("It was moved by hand.") for sentence in repairs(workspace.settings)] == [True]


def test_the_history_needs_no_mlflow(workspace: Workspace) -> None:
    for release in (BASE, A):
        make_champion(workspace.ledger, release)
    assert "were not updated" in follow_ledger(workspace)[0]
    found, note = champions(workspace)
    assert [(one.reign.release, one.version) for one in found] == [(BASE, None), (A, None)]
    assert "does not answer" in note
