"""One training outside of a pipeline: the same step that `retrain` runs, so neither does the other's work again."""

from __future__ import annotations

import json
from collections.abc import Mapping

from sluice.components.task import Task
from sluice.components.train import train_step
from sluice.components.workspace import open_workspace
from sluice.infra.errors import InputError
from sluice.infra.progress import Report
from sluice.infra.settings import Settings
from sluice.provenance.canonical import Json


def overrides_of(pairs: list[str]) -> dict[str, Json]:
    """`FIELD=VALUE` pairs as overrides of a recipe; a value is JSON where it can be, else text or a list with commas.

    Raises `InputError` naming the pair. The recipe itself checks fields and values.
    """
    found: dict[str, Json] = {}
    for pair in pairs:
        field, separator, text = pair.partition("=")
        if not separator or not field:
            raise InputError(f"--set {pair!r} is not FIELD=VALUE.", hint="As in -s optimizer.learning_rate=3e-4.")
        try:
            found[field] = json.loads(text)
        except ValueError:
            found[field] = text.split(",") if "," in text else text
    return found


def train_once(
    settings: Settings,
    recipe: str,
    *,
    dataset: str,
    base: str,
    overrides: Mapping[str, Json],
    report: Report,
    processes: int | None = None,
) -> dict[str, Json]:
    """Train, or find that it was trained: digests of the artifacts, values, and a sentence. Raises as `train` does."""
    running = Task("train", open_workspace(settings))
    running.report = report
    text = json.dumps(dict(overrides))
    train_step(running, dataset=dataset, base=base, recipe=recipe, overrides=text, processes=processes)
    state = running.state
    return {"artifacts": state.outputs, "values": state.values, "hit": bool(state.hit), "summary": state.summary}
