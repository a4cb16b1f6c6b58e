"""A training step as people see it in MLflow while it runs, and its report: the journal, handed to the registry's room.

    with shown_training(running, recipe=recipe, dataset=dataset, base=base, folder=folder) as shown:
        result = train(..., observer=shown)
        files["training.html"] = shown.page()

The page is found by the training step's key, so each attempt of a step goes on where the one before ended, and
`register` takes the same page over.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sluice.components.task import Task
from sluice.infra.errors import Interrupted, SluiceError
from sluice.provenance.canonical import short
from sluice.training.journal import Event, JournalReader, Line, Sample, StepMetrics, Validation

if TYPE_CHECKING:
    from sluice.registry.run_page import RunStatus, Table
    from sluice.registry.training_run import LiveTrainingRun
    from sluice.training.recipe import Recipe

REPORT = "training.html"
STEP_METRICS = ("loss", "grad_norm", "learning_rate")
"""Of a step done twice the later value counts."""
SPEED_METRICS = ("tokens_per_second", "tokens_per_second_per_device", "step_seconds", "memory_gib", "mfu", "dollars")
"""Of a step done twice the first measurement stays."""
NOTED_EVENTS = 20


class TrainingProgress:
    """An observer of a training's journal that shows it in `run`; without one it only keeps what the report needs.

    What the folder's journal held before is shown too, so a page whose server was away during an earlier attempt gets
    that attempt's curves now. A line that comes a second time is passed over.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, run: LiveTrainingRun | None, dollars_per_hour: float | None
    ) -> None:
        from sluice.training.run_figures import RunFigures

        self._folder, self._recipe, self._run = folder, recipe, run
        self._figures = RunFigures(recipe.schedule.max_steps, recipe.parallelism.world_size, dollars_per_hour)
        self._dollars_per_hour = dollars_per_hour
        self._seen: set[tuple[str, int, float, str]] = set()
        self._events: list[Event] = []
        self._samples: list[Sample] = []
        self._page: bytes | None = None
        self.interrupted = False
        self.see(JournalReader(folder).new())

    def see(self, lines: Iterable[Line]) -> None:
        fresh = [line for line in lines if _identity(line) not in self._seen]
        self._seen.update(map(_identity, fresh))
        for line in fresh:
            self._figures.see([line])
            if isinstance(line, StepMetrics):
                self._show_step(line)
            elif isinstance(line, Validation):
                self._add([("validation_loss", line.loss)], line)
            elif isinstance(line, Sample):
                self._samples.append(line)
            else:
                self._events.append(line)
        if self._run is None:
            return
        if any(isinstance(line, Sample) for line in fresh):
            self._run.show_table("samples.json", samples_table(self._samples))
        if events := [line for line in fresh if isinstance(line, Event)]:
            self._run.show_table("events.json", events_table(self._events))
            self._run.tag(**self._tags(events))

    def page(self, outcome: str = "") -> bytes:
        """The report as one HTML page, of the journal as it is now. `outcome` says how it ended, if not by itself."""
        from sluice.training.report import training_page

        self._page = training_page(
            self._folder, self._recipe, dollars_per_hour=self._dollars_per_hour, outcome=outcome
        ).encode()
        return self._page

    def ended(self, status: RunStatus, outcome: str = "") -> None:
        """The attempt's last word: the report and the state."""
        if self._run is None:
            return
        self._run.end(status)
        try:
            self._run.show_file(REPORT, self._page if self._page and not outcome else self.page(outcome))
        except Exception as error:  # noqa: BLE001  (a page must not stand in the place of what ended the training)
            print(f"No training report: {type(error).__name__}: {error}", flush=True)

    def _show_step(self, line: StepMetrics) -> None:
        self._add([(name, getattr(line, name)) for name in STEP_METRICS], line)
        per_device = line.tokens_per_second / self._recipe.parallelism.world_size
        values = (line.tokens_per_second, per_device, line.seconds, line.memory_gib, line.mfu, self._figures.dollars)
        self._add(zip(SPEED_METRICS, values, strict=True), line, first=True)

    def _add(
        self, values: Iterable[tuple[str, float | None]], line: StepMetrics | Validation, *, first: bool = False
    ) -> None:
        if self._run is None:
            return
        from sluice.registry.run_page import MetricPoint
        from sluice.registry.training_run import Curve

        points = [MetricPoint(name, value, line.step, line.time) for name, value in values if value is not None]
        self._run.add(points, Curve.FIRST if first else Curve.LATEST)

    def _tags(self, events: list[Event]) -> dict[str, str]:
        from sluice.registry.run_page import NOTE_TAG

        found = {"attempts": str(max(1, self._figures.attempts)), "last event": events[-1].sentence}
        for event in events:
            self.interrupted = event.kind == "interrupted" or (self.interrupted and event.kind != "started")
            if event.level == "info":
                continue
            if event.kind == "guard":
                found[f"guard.{event.details.get('guard', 'unnamed')}"] = event.sentence
            elif event.kind in ("slow_rank", "dead_rank", "hang"):
                found[f"guard.{event.kind}"] = event.sentence
        return found | {NOTE_TAG: events_markdown(self._events)}


def _identity(line: Line) -> tuple[str, int, float, str]:
    number = str(line.number) if isinstance(line, Sample) else line.kind if isinstance(line, Event) else ""
    return (line.FILE, line.step, line.time, number)


def events_table(events: list[Event]) -> Table:
    """All events, oldest first, times in UTC. What people look for stands left: MLflow's columns are narrow."""
    from sluice.registry.run_page import Table

    rows = [[one.step, one.sentence, one.level, one.kind, _utc(one.time)] for one in events]
    return Table(["step", "what happened", "level", "kind", "time (UTC)"], rows)


def samples_table(samples: list[Sample]) -> Table:
    """Answers on the way: by prompt, then by step, so that an answer can be followed through training."""
    from sluice.registry.run_page import Table

    latest = {(one.number, one.step): one for one in samples}
    rows = [[one.prompt, one.step, one.text, one.reference] for _, one in sorted(latest.items())]
    return Table(["prompt", "step", "answer", "dataset's answer"], rows)


def events_markdown(events: list[Event]) -> str:
    """The run's description: the last events that are more than routine, newest first."""
    noted = [one for one in events if one.kind not in ("checkpoint", "uploaded")][-NOTED_EVENTS:]
    lines = [f"| {_utc(one.time)} | {one.step or ''} | {_mark(one)}{_cell(one.sentence)} |" for one in reversed(noted)]
    return "\n".join(["| UTC | step | what happened |", "|---|---|---|", *lines])


def _mark(event: Event) -> str:
    return "" if event.level == "info" else f"**{event.level}** "


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


@contextmanager
def shown_training(
    running: Task,
    *,
    recipe: Recipe,
    dataset: str,
    base: str,
    folder: Path,
    dollars_per_hour: float | None = None,
    key: str | None = None,
    parent_key: str | None = None,
    pauses: bool = False,
) -> Iterator[TrainingProgress]:
    """Show the training that runs inside, in MLflow where there is one. Only call it in a step's function.

    `key` is the training step's key digest, when the step that runs is another one; `parent_key` that of the run to
    show it under. How the block ends is how the run ends: FINISHED (SCHEDULED when it only `pauses`), KILLED when it
    was told to stop, FAILED with the error's sentence.
    """
    key = key or str(running.state.steps[-1]["digest"])
    with _live_run(running, key, recipe, dataset, base, parent_key) as run:
        shown = TrainingProgress(folder, recipe, run, dollars_per_hour)
        try:
            yield shown
        except (KeyboardInterrupt, SystemExit):
            shown.ended("KILLED", "Training was told to stop. Run it again: it goes on from its last checkpoint.")
            raise
        except BaseException as error:
            shown.see(JournalReader(folder).new())
            words = error.message if isinstance(error, SluiceError) else f"{type(error).__name__}: {error}"
            told_to_stop = shown.interrupted or isinstance(error, Interrupted)
            shown.ended("KILLED" if told_to_stop else "FAILED", words)
            raise
        shown.ended("SCHEDULED" if pauses else "FINISHED")


@contextmanager
def _live_run(
    running: Task, key: str, recipe: Recipe, dataset: str, base: str, parent_key: str | None
) -> Iterator[LiveTrainingRun | None]:
    from sluice.infra.system_metrics import SystemMetrics
    from sluice.registry.mlflow_registry import MlflowRegistry
    from sluice.registry.run_page import DatasetReference
    from sluice.registry.training_run import LiveTrainingRun, TrainingSubject

    settings = running.workspace.settings
    if not running.workspace.SHOWN or not settings.mlflow.tracking_uri:
        yield None
        return
    application = settings.application
    subject = TrainingSubject(
        key=key,
        name=f"{application} {recipe.name} {short(key)}",
        parameters=recipe.to_json(),
        inputs=[
            DatasetReference("dataset", dataset),
            DatasetReference(f"recipe {recipe.name}", recipe.digest, context="recipe"),
            DatasetReference("base model", base, context="base model"),
        ],
        tags={"application": application, "dataset": dataset, "base": base, "recipe": recipe.digest},
        parent_key=parent_key,
    )

    def note(url: str) -> None:
        running.state.values["training_run"] = url

    def say(sentence: str) -> None:
        print(f"{running.name}: {sentence}", flush=True)

    with LiveTrainingRun(
        MlflowRegistry(settings.mlflow.tracking_uri),
        subject,
        say=say,
        on_page=note,
        system=SystemMetrics(settings.home),
    ) as run:
        yield run
