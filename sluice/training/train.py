"""Training: base model + dataset + recipe -> an adapter (or a whole model), with its curve. The public function of this
room.

`work_dir` makes it restartable: checkpoints, log and journal live there. Calling `train` again with the same inputs
goes on from the last good checkpoint, and what comes out has the same bytes as without the interruption (same machine
type, same number of processes). Other inputs in the same folder start afresh.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sluice.infra.errors import InputError, StepFailed
from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import Json, digest_file, digest_json
from sluice.training.adapter import collect_adapter
from sluice.training.automodel import automodel_config
from sluice.training.checkpoint_mirror import CheckpointMirror
from sluice.training.checkpoint_store import CheckpointStore
from sluice.training.examples import Split, read_split
from sluice.training.full_model import collect_model
from sluice.training.job import (
    CHECKPOINTS,
    CONFIG_FILE,
    EXPORT,
    HARDWARE_FILE,
    OUTCOME_FILE,
    Job,
    Outcome,
    replace_text,
)
from sluice.training.journal import LINES, Event, Journal, Observer, Sample, StepMetrics, Validation
from sluice.training.launcher import Launcher, sigterm_as_interrupted
from sluice.training.merge import Merged, merge_adapter
from sluice.training.recipe import Recipe
from sluice.training.roll_backs import ROLL_BACKS_FILE
from sluice.training.round_trip import PROBES_FILE, RoundTrip, check_round_trip
from sluice.training.torchrun import TorchrunLauncher, alone

OUTPUT, MERGED = "output", "merged"
Launch = Callable[[Job, Observer | None, CheckpointMirror | None], Launcher]
"""Makes the launcher of a prepared job."""


def start_here(job: Job, observer: Observer | None, mirror: CheckpointMirror | None) -> Launcher:
    """The launcher of this machine."""
    return TorchrunLauncher(job, observer, mirror)


@dataclass(frozen=True)
class TrainingResult:
    """What came out and how: `output_dir` holds an adapter in PEFT's layout, or for `full` a whole model; `merged`
    the model with the adapter in it, where the recipe asks for one.

    Losses are means per answer token, `final_loss` that of the last step that no guard left out; `validation_loss` is
    that of the weights that came out, None when the dataset has no validation split. `seconds` is the wall time of this
    call, `resumed_from` the steps that an earlier call had done, `too_long` the training examples left out because of
    data.max_length, `round_trip` how the files score the probe prompts. `used_step` is the step whose weights came out.
    """

    output_dir: Path
    merged: Merged | None
    steps: int
    used_step: int
    final_loss: float
    validation_loss: float | None
    curve: tuple[StepMetrics, ...]
    validations: tuple[Validation, ...]
    samples: tuple[Sample, ...]
    events: tuple[Event, ...]
    seconds: float
    hardware: Mapping[str, Json]
    resumed_from: int
    examples: int
    too_long: int
    round_trip: RoundTrip


@dataclass(frozen=True)
class Pause:
    """A run that was trained to a step and not further, to go on later."""

    step: int
    validation_loss: float | None


@sigterm_as_interrupted()
def train(
    base_dir: Path,
    dataset_dir: Path,
    recipe: Recipe,
    work_dir: Path,
    report: Report = no_report,
    *,
    observer: Observer | None = None,
    mirror: CheckpointMirror | None = None,
    launch: Launch = start_here,
    processes: int | None = None,
) -> TrainingResult:
    """Fine-tune `base_dir` (Hugging Face folder) on `dataset_dir` (train.jsonl, validation.jsonl).

    `observer` is told every line of the journal, `mirror` holds copies of the checkpoints (and gives the newest back
    when the work folder has none), `launch` makes the launcher: torchrun here, or a cluster's. With `processes` this
    attempt has another number of them on each node than the recipe says: it goes on from the same checkpoints, with the
    same rows in each step, but sums are added in another order.

    Raises `InputError` for a dataset that cannot train this recipe, `StepFailed` with the cause when training does not
    end well, `Interrupted` when SIGTERM came and the run is saved, `IntegrityError` when what came out is not usable.
    """
    started = time.monotonic()
    sized = recipe if processes is None else recipe.with_overrides({"parallelism.processes": processes})
    copies = mirror.prefix if mirror else None
    prepared = prepare(base_dir, dataset_dir, sized, work_dir, recipe.schedule.max_steps, report, copies)
    job, journal = prepared.job, Journal(work_dir)
    resumed_from = completed_steps(work_dir, recipe)
    outcome = _finished(work_dir) or _run(launch(job, observer, mirror), job, report)
    # A run that went back and then stopped early has lines of steps that are not part of it any more.
    curve = tuple(line for line in journal.steps() if line.step <= outcome.step)
    # What a guard left out did nothing to the weights: its loss may be anything.
    final = next((line.loss for line in reversed(curve) if line.skipped is None), None)
    if final is None or not math.isfinite(final):
        found = "not recorded" if final is None else final
        raise StepFailed(
            f"The loss of step {outcome.step} is {found}: training diverged.", hint="Lower optimizer.learning_rate."
        )
    exported, output_dir = work_dir / EXPORT / "model", work_dir / OUTPUT
    if recipe.method == "full":
        collect_model(exported, base_dir, output_dir)
    else:
        collect_adapter(exported, base_dir, recipe, output_dir)
    report(outcome.step, recipe.schedule.max_steps, "loading what came out, comparing the probe prompts")
    round_trip = check_round_trip(base_dir, output_dir, work_dir / PROBES_FILE, recipe)
    merged = None
    if recipe.output.merge and recipe.method != "full":
        report(outcome.step, recipe.schedule.max_steps, "merging the adapter into its base")
        merged = merge_adapter(base_dir, output_dir, work_dir / MERGED)
    validations = {line.step: line for line in journal.read(Validation) if line.step <= outcome.step}
    used = outcome.best_step or outcome.step
    return TrainingResult(
        output_dir=output_dir,
        merged=merged,
        steps=outcome.step,
        used_step=used,
        final_loss=final,
        validation_loss=validations[used].loss if used in validations else None,
        curve=curve,
        validations=tuple(validations[step] for step in sorted(validations)),
        samples=tuple({(line.step, line.number): line for line in journal.read(Sample)}.values()),
        events=tuple(journal.read(Event)),
        seconds=round(time.monotonic() - started, 3),
        hardware=_hardware(work_dir, sized),
        resumed_from=resumed_from,
        examples=len(prepared.split.messages),
        too_long=prepared.split.too_long,
        round_trip=round_trip,
    )


@sigterm_as_interrupted()
def train_until(
    step: int,
    base_dir: Path,
    dataset_dir: Path,
    recipe: Recipe,
    work_dir: Path,
    report: Report = no_report,
    *,
    observer: Observer | None = None,
    launch: Launch = start_here,
) -> Pause:
    """Train to `step` (before the schedule's last one), validate, save and pause. Calling again does no step twice.

    A later `train_until` or `train` in the same folder goes on from there: the learning rate keeps its schedule.
    """
    if not 0 < step < recipe.schedule.max_steps:
        raise InputError(f"Cannot pause at step {step} of {recipe.schedule.max_steps}.")
    prepared = prepare(base_dir, dataset_dir, recipe, work_dir, step, report)
    validations = {line.step: line.loss for line in Journal(work_dir).read(Validation)}
    if completed_steps(work_dir, recipe) < step or step not in validations:
        _run(launch(prepared.job, observer, None), prepared.job, report)
        validations = {line.step: line.loss for line in Journal(work_dir).read(Validation)}
    return Pause(step, validations.get(step))


@dataclass(frozen=True)
class Prepared:
    """A work folder that is ready to be trained in."""

    job: Job
    split: Split


def prepare(
    base_dir: Path,
    dataset_dir: Path,
    recipe: Recipe,
    work_dir: Path,
    last_step: int,
    report: Report = no_report,
    mirror: str | None = None,
) -> Prepared:
    """Check the dataset, and write what the training processes read; `mirror` is where copies of checkpoints go.

    Idempotent. Raises `ConflictError` while somebody trains there.
    """
    import yaml

    work_dir.mkdir(parents=True, exist_ok=True)
    report(0, recipe.schedule.max_steps, "reading the dataset")
    with alone(work_dir):
        train_file, validation_file = work_dir / "train.jsonl", None
        # One step must not show an example twice. How many examples a pack takes is the plan's business.
        needed = 1 if recipe.data.packing else recipe.schedule.global_batch_size
        split = _usable_split(dataset_dir / "train.jsonl", base_dir, recipe, train_file, needed=needed)
        if (source := dataset_dir / "validation.jsonl").is_file():
            # A curated dataset of a single conversation has the file, and nothing in it.
            target, limit = work_dir / "validation-examples.jsonl", recipe.data.validation_limit
            if _usable_split(source, base_dir, recipe, target, limit, needed=0).messages:
                validation_file = target
        if validation_file is None and recipe.schedule.result == "best":
            raise InputError(
                f"schedule.result = best needs validation examples; {dataset_dir} has no usable one.",
                hint="Set schedule.result to last, raise data.max_length, or curate a longer window.",
            )
        _start_afresh_on_other_inputs(work_dir, base_dir, train_file, validation_file, recipe)
        job = Job(work_dir, base_dir, train_file, validation_file, recipe, last_step, mirror)
        job.write()
        replace_text(
            work_dir / CONFIG_FILE, yaml.safe_dump(automodel_config(recipe, base_dir, work_dir), sort_keys=False)
        )
    return Prepared(job, split)


def completed_steps(work_dir: Path, recipe: Recipe) -> int:
    """Optimizer steps that the newest complete checkpoint in `work_dir` holds; 0 without one."""
    found = CheckpointStore(work_dir / CHECKPOINTS, recipe.checkpoints, Journal(work_dir).write).complete()
    return max((checkpoint.step for checkpoint in found), default=0)


def _finished(work_dir: Path) -> Outcome | None:
    outcome = Outcome.read(work_dir)
    return outcome if outcome and outcome.kind == "finished" and (work_dir / EXPORT).is_dir() else None


def _run(launcher: Launcher, job: Job, report: Report) -> Outcome:
    launcher.run(report)
    outcome = Outcome.read(job.work_dir)
    if outcome is None:
        raise StepFailed(f"Training ended, but says nothing of how: {job.work_dir / OUTCOME_FILE} is missing.")
    return outcome


def _usable_split(
    source: Path, base_dir: Path, recipe: Recipe, target: Path, limit: int | None = None, needed: int = 1
) -> Split:
    """Write the usable examples of `source` to `target`. Raises `InputError` when fewer than `needed` are usable."""
    if not source.is_file():
        raise InputError(f"The dataset {source.parent} holds no {source.name}.")
    split = read_split(source, base_dir, recipe.data.max_length, limit)
    if len(split.messages) < needed:
        raise InputError(
            f"{source.name} of the dataset has {len(split.messages)} usable examples; {needed} are needed. "
            f"{split.too_long} are longer than data.max_length = {recipe.data.max_length} tokens.",
            hint="Lower schedule.global_batch_size, raise data.max_length, or curate a longer window.",
        )
    split.write(target)
    return split


def _start_afresh_on_other_inputs(
    work_dir: Path, base_dir: Path, train_file: Path, validation_file: Path | None, recipe: Recipe
) -> None:
    """Remove checkpoints that other inputs made."""
    weights = sorted(base_dir.glob("*.safetensors"))
    # A run may go on with another number of processes.
    alike = recipe.model_copy(
        update={"parallelism": recipe.parallelism.model_copy(update={"nodes": 1, "processes": 1})}
    )
    inputs = digest_json(
        {
            "recipe": alike.digest,
            "train": digest_file(train_file),
            "validation": digest_file(validation_file) if validation_file else None,
            "weights": [[path.name, path.stat().st_size] for path in weights],
        }
    )
    mark = work_dir / "inputs"
    if mark.is_file() and mark.read_text(encoding="utf-8") == inputs:
        return
    for name in (CHECKPOINTS, EXPORT, OUTPUT, MERGED, "flight"):
        shutil.rmtree(work_dir / name, ignore_errors=True)
    for name in (PROBES_FILE, OUTCOME_FILE, ROLL_BACKS_FILE, *(kind.FILE for kind in LINES)):
        (work_dir / name).unlink(missing_ok=True)
    mark.write_text(inputs, encoding="utf-8")


def _hardware(work_dir: Path, recipe: Recipe) -> dict[str, Json]:
    path = work_dir / HARDWARE_FILE
    described = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    where = recipe.parallelism
    return dict(described) | {"processes": where.world_size, "nodes": where.nodes, "backend": where.backend}
