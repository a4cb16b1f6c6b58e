"""A recorded step, run again as the component would run it: its function, with the arguments that its record holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sluice.components.workspace import Workspace
from sluice.infra.errors import InputError
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import hex_of
from sluice.provenance.rerun import Overlay, Rerun, Rerunner
from sluice.provenance.step_records import StepRecord

if TYPE_CHECKING:
    from sluice.components.task import Task

HOLDOUTS = "holdouts/"


@dataclass(frozen=True)
class Scratch(Workspace):
    """The workspace `original` in which one step is computed again: what it writes stays in `place`, where the
    steps after it find it too."""

    SHOWN: ClassVar[bool] = False

    original: Workspace
    place: Path
    record: StepRecord
    instead: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def objects(self) -> Any:
        # A holdout is frozen by its first run; seen from here that run is still to come.
        hidden = (HOLDOUTS,) if self.record.key.name == "holdout" else ()
        return Overlay(self.original.objects, self.place / "objects", hidden)

    @cached_property
    def artifacts(self) -> ArtifactStore:
        # Fetched artifacts lie under their digest: the copies of the original serve as well.
        return ArtifactStore(self.objects, self.settings.home / "artifacts")

    @property
    def evaluation_cache(self) -> Path:
        # A fresh one for each step: what the original knows is asked again.
        return self.place / "evaluation" / f"{hex_of(self.record.key_digest)[:32]}.sqlite"

    @cached_property
    def steps(self) -> Rerunner:
        return Rerunner(self.record, self.place / hex_of(self.record.key_digest)[:32], self.instead)


def rerun(
    workspace: Workspace,
    record: StepRecord,
    folder: Path,
    *,
    suite: str = "",
    instead: Mapping[str, str] | None = None,
) -> tuple[Scratch, Rerun]:
    """Compute a recorded step again; where its outputs can be read, and what they are.

    `suite` names the suite of an evaluation, where it is none that Sluice brings. `instead` maps recorded inputs to
    those that an earlier rerun in the same `folder` made in their place. Raises `InputError` for a step that cannot
    be run again, and whatever the step raises.
    """
    from sluice.components.task import Task

    again = _STEPS.get(record.key.name)
    if again is None:
        raise InputError(f"The step {record.key.name!r} cannot be run again: it acts on what is live.")
    scratch = Scratch(workspace.settings, workspace, folder, record, dict(instead or {}))
    again(Task(record.key.name, scratch), record, _Arguments(folder, suite, scratch.instead))
    if scratch.steps.rerun is None:
        raise InputError(f"The step {record.key.name!r} computed nothing.")
    return scratch, scratch.steps.rerun


@dataclass(frozen=True)
class _Arguments:
    folder: Path
    suite: str
    instead: Mapping[str, str]


def _harvest(task: Task, record: StepRecord, _: _Arguments) -> None:
    from sluice.components.harvest import harvest_step

    given = record.key.parameters
    harvest_step(task, since=_instant(given["since_ms"]), until=_instant(given["until_ms"]))


def _curate(task: Task, record: StepRecord, _: _Arguments) -> None:
    from sluice.components.curate import curate_step

    given, inputs = record.key.parameters, record.key.inputs
    curate_step(
        task,
        records=inputs["records"],
        holdout=inputs["holdout"],
        index=inputs["index"],
        minimum=given["minimum"],
        validation_share=given["validation_share"],
    )


def _spoil(task: Task, record: StepRecord, _: _Arguments) -> None:
    from sluice.components.dataset import dataset_step

    dataset_step(task, curated=record.key.inputs["curated"], shuffle_labels=True)


def _plant(task: Task, record: StepRecord, _: _Arguments) -> None:
    from sluice.components.dataset import dataset_step

    given = record.key.parameters
    dataset_step(task, curated=record.key.inputs["curated"], shuffle_labels=False, canaries=given["canaries"])


def _train(task: Task, record: StepRecord, arguments: _Arguments) -> None:
    import yaml

    from sluice.components.train import train_step

    # The recipe as it was recorded, every default written out.
    recipe = arguments.folder / "recipe.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump(record.key.parameters["recipe"]), encoding="utf-8")
    inputs = record.key.inputs
    train_step(task, dataset=inputs["dataset"], base=inputs["base"], recipe=str(recipe), overrides="")


def _holdout(task: Task, record: StepRecord, _: _Arguments) -> None:
    from sluice.components.holdout import holdout_step

    holdout_step(task, size=record.key.parameters["size"])


def _snapshot(task: Task, record: StepRecord, _: _Arguments) -> None:
    from sluice.components.snapshot import snapshot_step

    snapshot_step(task, source=record.key.parameters["source"])


def _chunk(task: Task, record: StepRecord, _: _Arguments) -> None:
    from sluice.components.chunk import chunk_step

    chunk_step(task, corpus=record.key.inputs["corpus"])


def _embed(task: Task, record: StepRecord, _: _Arguments) -> None:
    from sluice.components.embed import embed_step

    embed_step(task, corpus=record.key.inputs["corpus"], chunks=record.key.inputs["chunks"])


def _evaluate(task: Task, record: StepRecord, arguments: _Arguments) -> None:
    from sluice.components.evaluate import evaluate_step

    inputs = _inputs(record, arguments)
    evaluate_step(
        task,
        candidate=inputs["candidate"],
        champion=inputs["champion"],
        base=inputs["base"],
        prompts=inputs["prompts"],
        suite=arguments.suite or suite_of(record),
        calibration=inputs.get("calibration", ""),
        again=int(record.key.parameters.get("again", 0)),
    )


def _answers(task: Task, record: StepRecord, arguments: _Arguments) -> None:
    from sluice.components.answers import answers_step

    inputs = _inputs(record, arguments)
    suite = arguments.suite or suite_of(record)
    answers_step(task, release=inputs["release"], base=inputs["base"], prompts=inputs["prompts"], suite=suite)


def _benchmark(task: Task, record: StepRecord, arguments: _Arguments) -> None:
    from sluice.components.benchmark import benchmark_step

    inputs = _inputs(record, arguments)
    benchmark_step(
        task,
        release=inputs["release"],
        base=inputs["base"],
        suite=arguments.suite or suite_of(record),
        again=int(record.key.parameters.get("again", 0)),
    )


def _inputs(record: StepRecord, arguments: _Arguments) -> dict[str, str]:
    return {name: arguments.instead.get(digest, digest) for name, digest in record.key.inputs.items()}


def suite_of(record: StepRecord) -> str:
    """The bundled suite that asks as an evaluation did. Raises `InputError` when there is none."""
    from sluice.evaluation.suite import bundled_suite, bundled_suites

    given = record.key.parameters
    for name in bundled_suites():
        found = bundled_suite(name)
        asks = {
            "suite": found.digest,
            "generation": found.generation.model_dump(mode="json"),
            "items": found.items.model_dump(mode="json"),
            "section": found.benchmarks.model_dump(mode="json") if found.benchmarks else None,
        }
        if all(asks[part] == given[part] for part in asks if part in given):
            return name
    raise InputError("No bundled suite asks as this evaluation did.", hint="Name its file with --suite.")


_STEPS: Mapping[str, Callable[[Task, StepRecord, _Arguments], None]] = {
    "harvest": _harvest,
    "curate": _curate,
    "shuffle-labels": _spoil,
    "plant-canaries": _plant,
    "train": _train,
    "holdout": _holdout,
    "snapshot": _snapshot,
    "chunk": _chunk,
    "embed": _embed,
    "answers": _answers,
    "evaluate": _evaluate,
    "benchmark": _benchmark,
}
RERUNNABLE = tuple(_STEPS)


def _instant(milliseconds: int) -> str:
    # Half a millisecond more: floating point must not round down to the one before.
    start = datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=int(milliseconds), microseconds=500)
    return start.isoformat(timespec="microseconds")
