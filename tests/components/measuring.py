"""A suite in a folder, an installation on a scripted server, and two releases that it serves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sluice.components import served
from sluice.components.task import Task
from sluice.components.workspace import Workspace
from sluice.evaluation.items import ITEMS_FILE, Item, write_items
from sluice.evaluation.outcomes import Answer, write_answers
from sluice.infra.settings import Settings
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import digest_bytes
from sluice.provenance.keys import Signer
from tests.support.directory_store import DirectoryStore

BASE, CHAMPION, CANDIDATE = (digest_bytes(name) for name in (b"base", b"champion", b"candidate"))
ITEMS = [
    Item(f"i{n}", f"question {n}", "2 m", ({"role": "user", "content": f"question {n}"},), ("Ask at desk 4.",))
    for n in range(6)
]
_SUITE = """name: mine
title: A suite of a test
generation: {max_tokens: 32, concurrency: 4, timeout_s: 5, attempts: 1}
metrics: [answer_rate]
policy:
  minimum_n: 2
  checks: [{metric: answer_rate, rule: non_inferiority, margin: 0.5}]
"""


class Place:
    """An installation whose server is `url`; releases count as loaded under their own digests."""

    def __init__(self, home: Path, url: str, objects: DirectoryStore, artifacts: ArtifactStore) -> None:
        self.home, self.artifacts = home, artifacts
        self.workspace = Workspace(Settings(home=home, serving={"vllm_url": url.removesuffix("/v1")}))
        signer = Signer.load_or_create(home / "keys" / "signing.pem")
        self.workspace.__dict__.update(objects=objects, artifacts=artifacts, signer=signer)
        write_items(home / "prompts" / ITEMS_FILE, ITEMS)
        self.prompts = artifacts.put_directory(home / "prompts", "prompts").digest

    def task(self, name: str) -> Task:
        return Task(name, self.workspace)

    def suite(self, sections: str = "", **files: str) -> str:
        """A suite file with these sections, and these files beside it."""
        folder = self.home / "suite"
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            (folder / f"{name}.jsonl").write_text(text)
        (folder / "suite.yaml").write_text(_SUITE + sections)
        return str(folder / "suite.yaml")

    def evaluation(self, candidate: str = "2 m", champion: str = "2 m", latency_s: float = 0.1) -> str:
        """An evaluation in which each release said the same to everything."""
        folder = self.home / "evaluation"
        for side, text in (("candidate", candidate), ("champion", champion)):
            (folder / side).mkdir(parents=True, exist_ok=True)
            answers = [Answer(item.id, text, "stop", 7, 2, 0.01, latency_s) for item in ITEMS]
            write_answers(folder / side / "answers.jsonl", answers)
        about = {"candidate": CANDIDATE, "champion": CHAMPION, "prompts": self.prompts}
        return self.artifacts.put_directory(folder, "evaluation", about).digest


def serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `loaded` name releases by their digest: the scripted server holds whatever it is asked for."""

    @contextmanager
    def loaded(workspace: Any, release: str, base: str, client: Any) -> Iterator[str]:
        yield release

    monkeypatch.setattr(served, "loaded", loaded)
