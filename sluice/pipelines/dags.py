"""The pipelines by name, and their shape as people see it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sluice.infra.errors import InputError
from sluice.pipelines.runs import PIPELINES, SWEEP
from sluice.provenance.canonical import Json


def pipeline_function(name: str) -> Any:
    """The KFP pipeline `name`. Importing it costs kfp's import, so only who runs or compiles it calls this."""
    if name not in PIPELINES:
        raise InputError(f"PIPELINE = {name!r} is unknown.", hint=f"Use one of: {', '.join(PIPELINES)}.")
    if name == "retrain":
        from sluice.pipelines.retrain import retrain

        return retrain
    if name == "release":
        from sluice.pipelines.release import release

        return release
    from sluice.pipelines.reembed import reembed

    return reembed


def pipeline_of(name: str, parameters: Mapping[str, Json]) -> tuple[Any, dict[str, Json]]:
    """The KFP pipeline of a run, and what it is called with. A sweep's DAG is drawn from its plan."""
    given = dict(parameters)
    if name != SWEEP:
        return pipeline_function(name), given
    from sluice.pipelines.sweep import sweep_pipeline
    from sluice.training.sweep import SweepPlan

    return sweep_pipeline(SweepPlan.from_text(str(given.pop("plan")))), given


def dag_of(pipeline: Any) -> list[dict[str, Json]]:
    """Tasks in an order that respects what they wait for: `{"name": ..., "after": [...]}`."""
    tasks = pipeline.pipeline_spec.root.dag.tasks
    shown = {key: task.task_info.name for key, task in tasks.items()}
    after = {shown[key]: sorted(shown[other] for other in task.dependent_tasks) for key, task in tasks.items()}
    ordered: list[str] = []
    while len(ordered) < len(after):
        ready = [name for name in after if name not in ordered and all(other in ordered for other in after[name])]
        ordered.append(min(ready, key=lambda name: (_latest(after[name], ordered), _natural(name))))
    return [{"name": name, "after": after[name]} for name in ordered]


def _latest(names: list[str], ordered: list[str]) -> int:
    return max([ordered.index(name) for name in names], default=-1)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts trial-10 after trial-9."""
    return [(int(part or 0), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def parameters_of(pipeline: Any) -> dict[str, Json]:
    """Parameters of a pipeline with their defaults; a required one has the default None."""
    found: dict[str, Json] = {}
    for name, spec in pipeline.pipeline_spec.root.input_definitions.parameters.items():
        default = spec.default_value
        kind = default.WhichOneof("kind")
        found[name] = getattr(default, kind) if kind else None
    return found
