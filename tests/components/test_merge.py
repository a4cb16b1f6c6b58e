"""The merge step: made once, from what was verified, by a statement that names both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sluice.components.merge import merge_release
from sluice.components.verification import sign_release
from sluice.components.workspace import Workspace
from sluice.infra.errors import GateRefused, IntegrityError
from sluice.provenance.attestation import attestation_key
from sluice.provenance.canonical import hex_of
from sluice.training import merge
from sluice.training.merge import Merged
from tests.components.test_verification import train, workspace
from tests.provenance.release_actions import BASE, A, decide

__all__ = ["workspace"]


@pytest.fixture
def merges(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The adapters that were merged."""
    seen: list[Path] = []

    def merge_adapter(base: Path, adapter: Path, target: Path) -> Merged:
        seen.append(adapter)
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"merged")
        return Merged(target, 1e-5, 2e-5, 3e-5, 1.0)

    monkeypatch.setattr(merge, "merge_adapter", merge_adapter)
    fetch = workspace.artifacts.fetch
    monkeypatch.setattr(workspace.artifacts, "fetch", lambda d: Path("/base") if d == BASE else fetch(d))
    return seen


def trained(workspace: Workspace, rows: int = 4) -> str:
    adapter, statement = train(workspace, rows=rows)
    sign_release(workspace, adapter, statement)
    decide(workspace.ledger, adapter)
    return adapter


def test_it_is_made_once_and_says_of_what(workspace: Workspace, merges: list[Path]) -> None:
    adapter = trained(workspace)
    record = merge_release(workspace, adapter, BASE)
    assert merge_release(workspace, adapter, BASE).output == record.output
    assert merges == [workspace.folder(adapter)]
    model = record.output.artifacts["model"]
    assert (workspace.folder(model) / "model.safetensors").read_bytes() == b"merged"
    assert workspace.artifacts.manifest(model).metadata == {"base": BASE, "adapter": adapter}
    assert record.output.values["answer_difference"] == 3e-5
    named = json.dumps(workspace.steps.verify(record))
    assert all(hex_of(digest) in named for digest in (adapter, BASE, model))


def test_nothing_unverified_is_merged(workspace: Workspace, merges: list[Path]) -> None:
    adapter, statement = train(workspace)
    with pytest.raises(GateRefused, match="decision about it does not exist"):
        merge_release(workspace, adapter, BASE)
    decide(workspace.ledger, adapter)
    with pytest.raises(IntegrityError, match="no signature"):
        merge_release(workspace, adapter, BASE)
    sign_release(workspace, adapter, statement)
    with pytest.raises(IntegrityError, match="was trained on the base model"):
        merge_release(workspace, adapter, A)
    assert merges == []


def test_a_merged_model_whose_statement_was_changed_is_not_served(workspace: Workspace, merges: list[Path]) -> None:
    adapter = trained(workspace)
    record = merge_release(workspace, adapter, BASE)
    place = attestation_key(record.statement)
    workspace.objects.put(place, workspace.objects.get(place) + b" ")
    with pytest.raises(IntegrityError, match="is damaged"):
        merge_release(workspace, adapter, BASE)
