"""The public function around the processes (a launcher that only writes what they would leave)."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sluice.infra.errors import ConflictError, InputError, Interrupted
from sluice.infra.progress import Report, no_report
from sluice.training import train as module
from sluice.training.base_model import build_tiny_llama
from sluice.training.job import CHECKPOINTS, EXPORT, Job, Outcome
from sluice.training.journal import Journal, StepMetrics, Validation
from sluice.training.recipe import Recipe, load_recipe
from sluice.training.roll_backs import ROLL_BACKS_FILE
from sluice.training.round_trip import RoundTrip
from sluice.training.train import TrainingResult, prepare, train

RECIPE = load_recipe("tiny").with_overrides({"schedule.max_steps": 3})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("base")).folder


def dataset(folder: Path, *, train_rows: int = 6, validation_rows: int | None = 2) -> Path:
    folder.mkdir()
    for name, count in (("train", train_rows), ("validation", validation_rows)):
        if count is not None:
            messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
            (folder / f"{name}.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * count)
    return folder


def prepared(base: Path, data: Path, work: Path, recipe: Recipe = RECIPE) -> Job:
    return prepare(base, data, recipe, work, recipe.schedule.max_steps).job


def test_other_inputs_start_without_the_roll_backs_of_the_former(base: Path, tmp_path: Path) -> None:
    """Steps that were left out for other rows or another learning rate say nothing about these."""
    data, work = dataset(tmp_path / "data"), tmp_path / "work"
    prepared(base, data, work)
    (work / ROLL_BACKS_FILE).write_text("[]")
    (work / CHECKPOINTS).mkdir()
    prepared(base, data, work, RECIPE.with_overrides({"checkpoints.every_steps": 1, "samples.prompts": 0}))
    assert (work / ROLL_BACKS_FILE).exists()
    assert (work / CHECKPOINTS).exists()
    prepared(base, data, work, RECIPE.with_overrides({"optimizer.learning_rate": 0.001}))
    assert not (work / ROLL_BACKS_FILE).exists()
    assert not (work / CHECKPOINTS).exists()


def test_an_empty_validation_file_is_no_validation_split(base: Path, tmp_path: Path) -> None:
    data = dataset(tmp_path / "data", validation_rows=0)
    assert prepared(base, data, tmp_path / "work").validation_file is None
    best = RECIPE.with_overrides({"schedule.result": "best", "schedule.validate_every_steps": 1})
    with pytest.raises(InputError, match=r"schedule\.result = best needs validation examples"):
        prepared(base, data, tmp_path / "best", best)


def test_a_folder_that_is_trained_in_is_left_alone(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher would refuse it too late: the checkpoints would be gone by then."""
    data, work = dataset(tmp_path / "data"), tmp_path / "work"
    prepared(base, data, work)
    (work / CHECKPOINTS).mkdir()
    handle = os.open(work / "launcher.lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        monkeypatch.setattr("sluice.training.torchrun.time.monotonic", iter(range(0, 1000, 10)).__next__)
        with pytest.raises(ConflictError, match="Another process trains"):
            prepared(base, data, work, RECIPE.with_overrides({"optimizer.learning_rate": 0.001}))
    finally:
        os.close(handle)
    assert (work / CHECKPOINTS).exists()


@dataclass
class Leaving:
    """Leaves lines and an outcome, as training processes do."""

    job: Job
    lines: list[StepMetrics | Validation]
    outcome: Outcome

    def run(self, report: Report = no_report) -> None:
        (self.job.work_dir / EXPORT).mkdir()
        for line in self.lines:
            Journal(self.job.work_dir).write(line)
        self.outcome.write(self.job.work_dir)

    def describe(self) -> str:
        return ""


def step(number: int, loss: float, **options: Any) -> StepMetrics:
    return StepMetrics(number, loss, 0.5, 1e-3, 100, 10, 1.0, 0.1, **options)


def trained(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[StepMetrics | Validation],
    outcome: Outcome,
) -> TrainingResult:
    monkeypatch.setattr(module, "collect_adapter", lambda *_: None)
    monkeypatch.setattr(module, "check_round_trip", lambda *_: RoundTrip((), 0.0))
    data = dataset(tmp_path / "data")
    return train(base, data, RECIPE, tmp_path / "work", launch=lambda job, *_: Leaving(job, lines, outcome))


def test_a_last_step_that_a_guard_left_out_is_no_divergence(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[StepMetrics | Validation] = [step(1, 3.0), step(2, 2.0), step(3, float("nan"), skipped="not_finite")]
    result = trained(base, tmp_path, monkeypatch, lines, Outcome("finished", 3, "Finished.", 3))
    assert result.final_loss == 2.0
    assert len(result.curve) == 3


def test_steps_that_a_roll_back_left_behind_are_not_in_the_curve(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run went back from step 3 and then stopped at step 2: step 3 was never done."""
    lines: list[StepMetrics | Validation] = [
        step(1, 3.0),
        step(2, 2.5),
        step(3, 9.0),
        Validation(3, 9.0),
        step(2, 2.0),
        Validation(2, 2.0),
    ]
    result = trained(base, tmp_path, monkeypatch, lines, Outcome("finished", 2, "Finished.", 2))
    assert [line.loss for line in result.curve] == [3.0, 2.0]
    assert (result.final_loss, result.validation_loss) == (2.0, 2.0)
    assert [line.step for line in result.validations] == [2]


def test_a_notice_before_the_processes_start_asks_to_run_again(base: Path, tmp_path: Path) -> None:
    def notice(completed: float, total: float, message: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(Interrupted):
            train(
                base,
                dataset(tmp_path / "data"),
                RECIPE,
                tmp_path / "work",
                notice,
                launch=lambda *_: pytest.fail("started"),
            )
    finally:
        signal.signal(signal.SIGTERM, previous)
