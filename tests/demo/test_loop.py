"""The guided loop's own choices: which questions users may ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from sluice.components.workspace import Workspace
from sluice.curation.holdout import HoldoutItem, split_holdout, write_holdout
from sluice.curation.text import normalise
from sluice.demo.loop import Loop
from sluice.demo.plan import load_plan
from sluice.infra.settings import Settings
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import canonical_json
from sluice.rag.corpus import load_faq
from tests.support.directory_store import DirectoryStore


def test_open_questions_are_the_same_before_and_after_the_holdout_is_frozen(
    tmp_path: Path, object_store: DirectoryStore, artifacts: ArtifactStore
) -> None:
    workspace = Workspace(Settings(home=tmp_path / "home"))
    workspace.__dict__.update(objects=object_store, artifacts=artifacts)
    unused: Any = None
    loop = Loop(workspace, load_plan("demo"), Console(), unused)
    before = loop.open_questions()
    items = [HoldoutItem(item.id, item.question, item.answer, item.category) for item in load_faq()]
    held, _ = split_holdout(items, loop.plan.holdout_size)
    write_holdout(held, tmp_path / "held")
    digest = artifacts.put_directory(tmp_path / "held", "holdout").digest
    object_store.put("holdouts/assistant.json", canonical_json({"digest": digest}))
    assert loop.open_questions() == before
    assert not {normalise(q.question) for q in before} & {normalise(h.question) for h in held}
    assert len(before) > loop.plan.traffic_questions * 2
