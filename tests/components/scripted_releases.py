"""An installation whose vLLM is a chat server: releases answer rightly as often as they are told to."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sluice.components.evaluate import evaluate_step
from sluice.components.served import release_name
from sluice.components.task import Task
from sluice.components.workspace import Workspace
from sluice.evaluation.items import ITEMS_FILE, Item, write_items
from sluice.infra.settings import ServingSettings, Settings
from sluice.provenance.artifacts import ArtifactStore
from tests.evaluation.chat_server import ChatServer, Reply, chat_server
from tests.support.directory_store import DirectoryStore

RIGHT, WRONG = "a permit from the board", "nothing of the kind"
SUITE = """
name: mine
title: Mine
metrics: [token_f1, answer_rate]
generation: {concurrency: 4, timeout_s: 5, attempts: 1}
policy:
  minimum_n: 20
  error_budget: 0.05
  checks:
    - {metric: token_f1, rule: superiority, minimum_effect: 0.02}
"""


class Place:
    """Stores, a base model, a suite and 30 prompts; `failing` questions get HTTP 500."""

    def __init__(self, home: Path, objects: DirectoryStore, artifacts: ArtifactStore) -> None:
        self.workspace = Workspace(Settings(home=home))
        self.workspace.__dict__.update(objects=objects, artifacts=artifacts)
        self.base = artifacts.put_files({"config.json": b"{}"}, "base-model").digest
        self.right: dict[str, int] = {}
        self.failing: set[str] = set()
        self.suite = self.write(SUITE)
        self.prompts = self.prompts_of(30)

    def write(self, text: str) -> str:
        path = self.workspace.settings.home / "mine.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    def prompts_of(self, count: int, *, shuffled: bool = False) -> str:
        items = [
            Item(f"item-{n:02}", f"question {n}", RIGHT, ({"role": "user", "content": f"question {n}"},))
            for n in range(count)
        ]
        if shuffled:
            random.Random(1).shuffle(items)
        folder = self.workspace.settings.home / f"prompts-{count}-{shuffled}"
        write_items(folder / ITEMS_FILE, items)
        return self.workspace.artifacts.put_directory(folder, "prompts").digest

    def release(self, name: str, right: int) -> str:
        """An adapter that answers so many of a hundred rightly."""
        digest = self.workspace.artifacts.put_files({"adapter": name.encode()}, "adapter").digest
        self.right[self.name(digest)] = right
        return digest

    def name(self, release: str) -> str:
        return release_name(self.workspace.settings, release)

    def reply(self, model: str, question: str) -> Reply:
        if question in self.failing:
            return Reply(status=500)
        drawn = random.Random(f"{model} {question}").randrange(100)
        return Reply(RIGHT if drawn < self.right[model] else WRONG)

    def at(self, server: ChatServer) -> None:
        serving = ServingSettings(vllm_url=server.url.removesuffix("/v1"))
        object.__setattr__(self.workspace, "settings", self.workspace.settings.model_copy(update={"serving": serving}))

    def evaluate(self, candidate: str, champion: str, **changes: Any) -> tuple[str, Task]:
        running = Task("evaluate", self.workspace)
        given: dict[str, Any] = {"base": self.base, "prompts": self.prompts, "suite": self.suite, **changes}
        return evaluate_step(running, candidate=candidate, champion=champion, **given), running


@pytest.fixture
def place(
    tmp_path: Path, object_store: DirectoryStore, artifacts: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> Place:
    @contextmanager
    def loaded(workspace: Workspace, release: str, *_: Any) -> Iterator[str]:
        yield release_name(workspace.settings, release)

    monkeypatch.setattr("sluice.components.served.loaded", loaded)
    return Place(tmp_path / "home", object_store, artifacts)


@pytest.fixture
def server(place: Place) -> Iterator[ChatServer]:
    with chat_server(by_model=place.reply) as state:
        place.at(state)
        yield state
