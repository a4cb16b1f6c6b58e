"""One server for each release, with real supervision and a real gateway: killed, it comes back; retired, it drains."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from sluice.components import release_servers
from sluice.components.champion import current_champion, name_base
from sluice.components.release_servers import bring_up_server, retire_server
from sluice.components.served import server_book, server_url
from sluice.components.workspace import Workspace
from sluice.infra.orphans import end_processes, find_processes
from sluice.infra.ports import is_free
from sluice.infra.processes import Supervisor
from sluice.infra.settings import ServingSettings, Settings
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import digest_bytes
from sluice.serving.routes import RouteState
from sluice.serving.servers import part_name
from sluice.serving.vllm import VllmClient
from tests.provenance.release_actions import make_champion
from tests.serving.gateway import Gateway, running_gateway
from tests.support.directory_store import DirectoryStore
from tests.support.vllm_stand_in import stand_in

pytestmark = pytest.mark.integration

CANARY = digest_bytes(b"canary")


@pytest.fixture
def workspace(
    tmp_path: Path, object_store: DirectoryStore, artifacts: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Workspace]:
    home = tmp_path / "home"
    serving = ServingSettings(mode="merged", vllm_url="http://127.0.0.1:1")
    workspace = Workspace(Settings(home=home, serve_python=stand_in(tmp_path), serving=serving))
    workspace.__dict__.update(objects=object_store, artifacts=artifacts)
    files = {"config.json": b"{}", "model.safetensors": b"weights"}
    base = artifacts.put_files(files, "base-model").digest
    name_base(workspace, base)
    make_champion(workspace.ledger, base)
    model = artifacts.put_files(files, "model").digest
    made = SimpleNamespace(output=SimpleNamespace(artifacts={"model": model}))
    monkeypatch.setattr(release_servers, "merge_release", lambda *_: made)
    try:
        yield workspace
    finally:
        Supervisor(home).down()
        end_processes(find_processes(home), grace_s=0)


def at(workspace: Workspace, gateway: Gateway) -> None:
    """What `sluice up` writes down once the gateway has its ports."""
    addresses = {"gateway_url": gateway.settings.url, "gateway_admin_url": gateway.settings.admin_url}
    serving = workspace.settings.serving.model_copy(update=addresses)
    object.__setattr__(workspace, "settings", workspace.settings.model_copy(update={"serving": serving}))


def pids(workspace: Workspace) -> dict[str, int | None]:
    return {status.name: status.pid for status in Supervisor(workspace.settings.home).status()}


class User(threading.Thread):
    """Goes on asking in one session: the release of each answer, "" for one that did not come whole."""

    def __init__(self, client: httpx.Client, session: str, pieces: int = 3) -> None:
        super().__init__(daemon=True)
        self.client, self.session, self.pieces = client, session, pieces
        self.got: list[str] = []
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            self.got.append(self.ask())
            self.stop.wait(0.05)

    def ask(self) -> str:
        body = {"model": "assistant", "stream": True, "messages": [{"role": "user", "content": str(self.pieces)}]}
        try:
            with self.client.stream(
                "POST", "/v1/chat/completions", json=body, headers={"x-session-id": self.session}
            ) as answer:
                text = "".join(answer.iter_text())
        except httpx.HTTPError:
            return ""
        whole = answer.status_code == 200 and text.count('"content"') == self.pieces and "[DONE]" in text
        return answer.headers["x-sluice-release"] if whole else ""


def wait_for(condition: Any, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def test_a_killed_canary_costs_stable_nothing_and_a_retired_champion_drains(workspace: Workspace) -> None:
    settings = workspace.settings
    base = current_champion(workspace)
    stable = bring_up_server(workspace, base)
    first = pids(workspace)
    assert bring_up_server(workspace, base) == stable
    assert pids(workspace) == first, "one that runs is left alone"
    canary = bring_up_server(workspace, CANARY)
    with VllmClient(server_url(settings, CANARY)) as client:
        assert {model.name for model in client.models()} == {canary.served_name, "assistant"}
    with running_gateway(settings.home / "gateway", stable, application="assistant") as gateway:
        at(workspace, gateway)
        gateway.router.apply(RouteState(stable, canary, 50))
        users = [User(gateway.client, f"s{number}") for number in range(12)]
        for user in users:
            user.start()
        wait_for(lambda: all(len(user.got) > 1 for user in users))
        of = {user.session: user.got[0] for user in users}
        assert set(of.values()) == {base, CANARY}
        killed = pids(workspace)[part_name(CANARY)]
        assert killed
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: pids(workspace)[part_name(CANARY)] not in (None, killed))
        on_canary = next(user for user in users if of[user.session] == CANARY)
        wait_for(lambda: on_canary.got[-1] == CANARY)
        for user in users:
            user.stop.set()
        for user in users:
            user.join(10)
        assert all(set(user.got) == {base} for user in users if of[user.session] == base), "stable's users lost nothing"
        # The others lose what was under way on it, or on its way to it, and are answered by stable until it is back.
        shown = {user.session: "".join({base: "s", CANARY: "c"}.get(one, "-") for one in user.got) for user in users}
        assert all(one.count("-") <= 2 for one in shown.values()), shown

        # Promoted: an answer under way at the champion before is written to its end, then its server goes.
        last = User(gateway.client, next(session for session, release in of.items() if release == base), pieces=40)
        told: list[str] = []
        asking = threading.Thread(target=lambda: told.append(last.ask()))
        asking.start()
        wait_for(lambda: gateway.router.active_requests(base) == 1)
        gateway.router.apply(RouteState(canary))
        port = int(stable.upstreams[0].rpartition(":")[2])
        retire_server(workspace, base)
        asking.join(10)
        assert told == [base]
        assert set(pids(workspace)) == {part_name(CANARY)}
        assert is_free(port)
        assert set(server_book(settings).read()) == {CANARY}
        assert [one.dedicated for one in gateway.router.previous()] == [False]
        assert User(gateway.client, "later").ask() == CANARY
