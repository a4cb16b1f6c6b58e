"""An installation with stand-ins for vLLM and for the gateway's routes, and adapters that were trained and decided."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sluice.components import bring_up, retiring
from sluice.components.champion import name_base
from sluice.components.served import release_name, target
from sluice.components.task import Task
from sluice.components.verification import sign_release
from sluice.components.workspace import Workspace
from sluice.infra.settings import Settings
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import digest_bytes
from sluice.provenance.releases import record_approval
from sluice.provenance.steps import StepKey, StepOutput
from sluice.serving.policy import ProbePolicy
from sluice.serving.routes import RouteState, Target
from sluice.training import parity_reference
from sluice.training.safetensors_file import write_tensors
from tests.provenance.release_actions import decide, make_champion
from tests.serving.vllm_server import PROMPT, Said, VllmServer, vllm_server
from tests.support.directory_store import DirectoryStore

CODE = digest_bytes(b"code")
MODULE = "model.layers.0.self_attn.q_proj"
POLICY = ProbePolicy(prompts=("What is a permit?",), max_tokens=4, at_once=2)
FOREVER = "2999-01-01T00:00:00Z"


class Routes:
    """The part of a router that bringing up and retiring need; `waited` are the releases whose end was waited for."""

    def __init__(self, state: RouteState) -> None:
        self.now = state
        self.before: list[Target] = []
        self.refused: dict[str, str] = {}
        self.waited: list[str] = []

    def state(self) -> RouteState:
        return self.now

    def previous(self) -> tuple[Target, ...]:
        return tuple(self.before)

    def refusal(self, release: str) -> str | None:
        return self.refused.get(release)

    def wait_idle(self, release: str, *, timeout_s: float) -> None:
        self.waited.append(release)

    def rollback(self, reason: str) -> RouteState:
        self.now = RouteState(self.now.stable)
        return self.now


class Site:
    """`said` is what each adapter says, by what it was trained to: `train(number)` says its number."""

    def __init__(self, workspace: Workspace, servers: list[VllmServer], routes: Routes, base: str) -> None:
        self.workspace, self.servers, self.routes, self.base = workspace, servers, routes, base
        self.task = Task("load", workspace)

    def name(self, release: str) -> str:
        return release_name(self.workspace.settings, release)

    def train(self, number: int, *, base: str | None = None, rank: int = 2, decided: bool = True) -> str:
        """Digest of an adapter that a server may load."""
        artifacts = self.workspace.artifacts

        def work(folder: Path) -> StepOutput:
            weights = {"A": np.full((rank, 4), number, np.float32), "B": np.full((4, rank), number, np.float32)}
            named = {f"base_model.model.{MODULE}.lora_{part}.weight": values for part, values in weights.items()}
            write_tensors(folder / "adapter_model.safetensors", named)
            config = '{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}'
            (folder / "adapter_config.json").write_text(config)
            made = artifacts.put_directory(folder, "adapter", {"base": base or self.base})
            return StepOutput({"adapter": made.digest})

        key = StepKey("train", CODE, {"number": number, "rank": rank}, {"base": base or self.base})
        record, _ = self.workspace.steps.run(key, work)
        adapter = record.output.artifacts["adapter"]
        sign_release(self.workspace, adapter, record.statement)
        if decided:
            decide(self.workspace.ledger, adapter, expires=FOREVER)
            record_approval(self.workspace.ledger, adapter=adapter, approver="ann")
        return adapter

    def serve(self, release: str) -> None:
        """Users get it: it is stable, and the stable one before is one to go back to."""
        make_champion(self.workspace.ledger, release)
        self.routes.before.append(self.routes.now.stable)
        self.routes.now = RouteState(target(self.workspace.settings, release))


def says(_: str, folder: Path | None) -> Said:
    """Every adapter says the number that its weights are filled with; the base model says 10."""
    if folder is None:
        return ((10, -0.5), (11, -0.4))
    number = int(np.frombuffer((folder / "adapter_model.safetensors").read_bytes()[-4:], np.float32)[0])
    return ((number, -0.1 * number), (number + 1, -0.2))


@contextmanager
def serving_site(
    home: Path, objects: DirectoryStore, artifacts: ArtifactStore, monkeypatch: Any, *, replicas: int = 1
) -> Iterator[Site]:
    """The base model is the champion, and each replica holds it."""
    folder = home.parent / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write_tensors(folder / "model.safetensors", {f"{MODULE}.weight": np.zeros((4, 4), np.float32)})
    base = artifacts.put_directory(folder, "base-model").digest
    with ExitStack() as stack:
        settings = Settings(home=home)
        servers = [
            stack.enter_context(vllm_server(VllmServer(release_name(settings, base), says))) for _ in range(replicas)
        ]
        urls = [server.url for server in servers]
        serving = {"vllm_url": urls[0], "vllm_replicas": urls[1:], "max_loras": 3, "dtype": "float32"}
        workspace = Workspace(Settings(home=home, serving=serving))
        workspace.__dict__.update(objects=objects, artifacts=artifacts)
        make_champion(workspace.ledger, base)
        name_base(workspace, base)
        routes = Routes(RouteState(target(workspace.settings, base)))
        for module in (retiring, bring_up):
            monkeypatch.setattr(module, "router", lambda _: routes)
        monkeypatch.setattr(parity_reference, "make_reference", _reference)
        yield Site(workspace, servers, routes, base)


def _reference(_: Path, adapter: Path, prompts: tuple[str, ...], max_tokens: int) -> list[Any]:
    """What the training library would say: the same as a server that serves this adapter."""
    steps = [[[token, value], [900, value - 1.0]] for token, value in says("", adapter)[:max_tokens]]
    return [{"prompt": list(PROMPT), "steps": steps} for _ in prompts]
