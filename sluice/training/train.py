"""Training an adapter: base model + dataset + recipe -> adapter, with its curve. The public function of this room.

`work_dir` makes it restartable: checkpoints, log and metrics live there. Calling `train` again with the same inputs
resumes from the last complete checkpoint, and the adapter comes out with the same bytes as without the interruption
(same machine type, same recipe). Other inputs in the same folder start afresh.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sluice.infra.errors import InputError, StepFailed
from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import Json, digest_file, digest_json
from sluice.training.adapter import collect_adapter
from sluice.training.automodel import CHECKPOINTS, INCOMPLETE, TRAIN_METRICS, VALIDATION_METRICS, automodel_config
from sluice.training.examples import Split, read_split
from sluice.training.recipe import Recipe
from sluice.training.round_trip import PROBES_FILE, RoundTrip, check_round_trip
from sluice.training.torchrun import TorchrunLauncher, read_records

_CHECKPOINT = re.compile(r"^epoch_\d+_step_(\d+)$")


@dataclass(frozen=True)
class CurvePoint:
    """One optimizer step, counted from 1: mean loss per answer token, learning rate, tokens per second."""

    step: int
    loss: float
    learning_rate: float
    tokens_per_second: float


@dataclass(frozen=True)
class TrainingResult:
    """An adapter in PEFT's layout and how it came about.

    Losses are means per answer token; `validation_loss` is None when the dataset has no validation split. `seconds`
    is the wall time of this call, `resumed_from` the steps that an earlier call had done, `too_long` the training
    examples left out because of data.max_length, `round_trip` how the adapter's files score the probe prompts.
    """

    adapter_dir: Path
    steps: int
    final_loss: float
    validation_loss: float | None
    curve: tuple[CurvePoint, ...]
    seconds: float
    hardware: Mapping[str, Json]
    resumed_from: int
    examples: int
    too_long: int
    round_trip: RoundTrip


def train(
    base_dir: Path, dataset_dir: Path, recipe: Recipe, work_dir: Path, report: Report = no_report
) -> TrainingResult:
    """Fine-tune `base_dir` (Hugging Face folder) on `dataset_dir` (train.jsonl, validation.jsonl).

    Raises `InputError` for a dataset that cannot train this recipe, `StepFailed` with the cause when training does
    not end well, `IntegrityError` when its adapter is not usable.
    """
    import yaml

    started = time.monotonic()
    work_dir.mkdir(parents=True, exist_ok=True)
    report(0, recipe.schedule.max_steps, "reading the dataset")
    train_file, validation_file = work_dir / "train.jsonl", None
    needed = recipe.schedule.global_batch_size
    split = _usable_split(dataset_dir / "train.jsonl", base_dir, recipe, train_file, None, needed)
    if (dataset_dir / "validation.jsonl").is_file():
        validation_file = work_dir / "validation.jsonl"
        limit, processes = recipe.data.validation_limit, recipe.parallelism.processes
        _usable_split(dataset_dir / "validation.jsonl", base_dir, recipe, validation_file, limit, processes)
    _start_afresh_on_other_inputs(work_dir, base_dir, train_file, validation_file, recipe)
    resumed_from = completed_steps(work_dir)
    if resumed_from < recipe.schedule.max_steps:
        config = work_dir / "automodel.yaml"
        values = automodel_config(recipe, base_dir, train_file, validation_file, work_dir)
        config.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        TorchrunLauncher(
            config=config,
            work_dir=work_dir,
            metrics=work_dir / CHECKPOINTS / TRAIN_METRICS,
            processes=recipe.parallelism.processes,
            max_steps=recipe.schedule.max_steps,
            timeout_s=recipe.budget.timeout_minutes * 60,
        ).run(report)
    done = completed_steps(work_dir)
    if done < recipe.schedule.max_steps:
        # A process that got SIGTERM saves and ends with exit code 0: success is reaching the last step.
        raise StepFailed(
            f"Training stopped after step {done} of {recipe.schedule.max_steps}.", hint="Run again to resume."
        )
    curve = _curve(work_dir)
    final_loss = curve[-1].loss if curve else math.nan
    if not math.isfinite(final_loss):
        raise StepFailed(
            f"The loss of step {done} is {final_loss}: training diverged.", hint="Lower optimizer.learning_rate."
        )
    checkpoint = _checkpoints(work_dir)[done]
    adapter_dir = collect_adapter(checkpoint / "model", base_dir, recipe, work_dir / "adapter")
    report(done, done, "loading the adapter with PEFT, comparing the probe prompts")
    round_trip = check_round_trip(base_dir, adapter_dir, work_dir / PROBES_FILE, recipe)
    return TrainingResult(
        adapter_dir=adapter_dir,
        steps=done,
        final_loss=final_loss,
        validation_loss=_validation_loss(work_dir) if validation_file else None,
        curve=curve,
        seconds=round(time.monotonic() - started, 3),
        hardware=_hardware(work_dir, recipe),
        resumed_from=resumed_from,
        examples=len(split.messages),
        too_long=split.too_long,
        round_trip=round_trip,
    )


def completed_steps(work_dir: Path) -> int:
    """Optimizer steps that the newest complete checkpoint in `work_dir` holds; 0 without one."""
    return max(_checkpoints(work_dir), default=0)


def _checkpoints(work_dir: Path) -> dict[int, Path]:
    """Complete checkpoints by steps done. AutoModel marks a folder it is still writing with a file in it."""
    found = {}
    for path in (work_dir / CHECKPOINTS).glob("epoch_*_step_*"):
        match = _CHECKPOINT.match(path.name)
        if match and path.is_dir() and not (path / INCOMPLETE).exists():
            found[int(match[1]) + 1] = path
    return found


def _usable_split(source: Path, base_dir: Path, recipe: Recipe, target: Path, limit: int | None, needed: int) -> Split:
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
    """Remove checkpoints that other inputs made. The base's folder name is part of it: AutoModel compares paths."""
    weights = sorted(base_dir.glob("*.safetensors"))
    inputs = digest_json(
        {
            "recipe": recipe.digest,
            "train": digest_file(train_file),
            "validation": digest_file(validation_file) if validation_file else None,
            "base": str(base_dir.resolve()),
            "weights": [[path.name, path.stat().st_size] for path in weights],
        }
    )
    mark = work_dir / "inputs"
    if mark.is_file() and mark.read_text(encoding="utf-8") == inputs:
        return
    for name in (CHECKPOINTS, "adapter"):
        shutil.rmtree(work_dir / name, ignore_errors=True)
    (work_dir / PROBES_FILE).unlink(missing_ok=True)
    mark.write_text(inputs, encoding="utf-8")


def _curve(work_dir: Path) -> tuple[CurvePoint, ...]:
    """One point for each step; of a step done twice (before and after an interruption) the later one counts."""
    points = {}
    for record in read_records(work_dir / CHECKPOINTS / TRAIN_METRICS)[0]:
        step = int(record["step"]) + 1
        points[step] = CurvePoint(step, float(record["loss"]), float(record["lr"]), float(record.get("tps", 0.0)))
    return tuple(points[step] for step in sorted(points))


def _validation_loss(work_dir: Path) -> float | None:
    records = read_records(work_dir / CHECKPOINTS / VALIDATION_METRICS)[0]
    loss = float(records[-1]["val_loss"]) if records else math.nan
    return loss if math.isfinite(loss) else None


def _hardware(work_dir: Path, recipe: Recipe) -> dict[str, Json]:
    path = work_dir / "hardware.json"
    described = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return dict(described) | {"processes": recipe.parallelism.processes, "backend": recipe.parallelism.backend}
