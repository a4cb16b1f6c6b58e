"""The shelf is tidied: what no route and no rollback leads to makes room for the next adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sluice.components.served import adapter_shelf, release_name, router, target, tidy_shelf
from sluice.components.workspace import Workspace
from sluice.infra.settings import Settings
from sluice.provenance.attestation import Signer
from sluice.provenance.canonical import digest_bytes
from sluice.provenance.ledger import Ledger
from tests.provenance.release_actions import A, B, make_champion
from tests.support.directory_store import DirectoryStore


class Server:
    """Stands for vLLM: remembers what it was told to unload."""

    def __init__(self) -> None:
        self.unloaded: list[str] = []

    def unload_adapter(self, name: str) -> None:
        self.unloaded.append(name)


@pytest.fixture
def workspace(tmp_path: Path, object_store: DirectoryStore) -> Workspace:
    serving = {f"{name}_url": f"http://127.0.0.1:{port}" for port, name in enumerate(("vllm", "gateway"), 1)}
    made = Workspace(Settings(home=tmp_path, serving={**serving, "gateway_admin_url": "http://127.0.0.1:3"}))
    signer = Signer.load_or_create(tmp_path / "keys" / "signing.pem")
    made.__dict__.update(objects=object_store, signer=signer, ledger=Ledger(object_store, "assistant", signer))
    return made


def test_only_what_nothing_leads_to_is_unloaded(workspace: Workspace) -> None:
    settings = workspace.settings
    stranger = digest_bytes(b"left by a killed evaluation")
    make_champion(workspace.ledger, A)
    router(settings).seed(target(settings, B))
    shelf = adapter_shelf(settings)
    for release in (A, B, stranger):
        folder = shelf.path(release_name(settings, release))
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
        shelf.remember(folder.name)
    server: Any = Server()
    tidy_shelf(workspace, server)
    assert server.unloaded == [release_name(settings, stranger)]
    assert shelf.names() == tuple(sorted(release_name(settings, release) for release in (A, B)))
