"""Training through kills, notices, damage and full disks: each schedule ends with the losses and bytes of a quiet run.

The processes are forked from one that has imported everything (`tests/support/warm_ranks.py`): a schedule takes
seconds. That torchrun itself restarts what died is in `tests/integration/test_training_torchrun.py`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest

from sluice.provenance.artifacts import describe_directory
from sluice.training.adapter import WEIGHTS
from sluice.training.base_model import build_tiny_llama
from sluice.training.job import CHECKPOINTS, EXPORT, Outcome
from sluice.training.journal import Event, Journal, StepMetrics, Validation
from sluice.training.recipe import Recipe, load_recipe
from sluice.training.safetensors_file import read_float32
from sluice.training.train import train_until
from tests.support.warm_ranks import LARGEST_FILE_VARIABLE, WarmLauncher, warm_ranks

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

SCHEDULES = int(os.environ.get("SLUICE_TRAINING_SCHEDULES", "10"))
STEPS = 16
RECIPE = load_recipe("tiny").with_overrides(
    {
        "schedule.max_steps": STEPS,
        "schedule.global_batch_size": 16,
        "schedule.validate_every_steps": 6,
        "checkpoints.every_steps": 3,
        "checkpoints.keep_last": 3,
        "lora.dropout": 0.1,
        "samples.prompts": 0,
    }
)


@dataclass
class Run:
    """A run in a folder of its own, and what was done to it."""

    base: Path
    dataset: Path
    work: Path
    address: Path
    mirror: Path | None = None
    recipe: Recipe = RECIPE
    told: list[str] = field(default_factory=list)

    def start(self, **environment: str) -> subprocess.Popen[bytes]:
        wanted = {
            "base": str(self.base),
            "dataset": str(self.dataset),
            "work": str(self.work),
            "address": str(self.address),
            "mirror": str(self.mirror) if self.mirror else None,
            "recipe": self.recipe.to_json(),
        }
        with (self.work.parent / f"{self.work.name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.support.training_driver", json.dumps(wanted)],
                stdout=log,
                stderr=log,
                env=dict(os.environ) | environment,
            )

    def wait(self, process: subprocess.Popen[bytes]) -> int:
        code = process.wait(timeout=120)
        deadline = time.monotonic() + 20
        while (left := self.ranks()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not left, "training processes outlived their launcher"
        return code

    def finish(self, **environment: str) -> None:
        code = self.wait(self.start(**environment))
        assert code == 0, self.explanation()

    def explanation(self) -> str:
        log = self.work.parent / f"{self.work.name}.log"
        return f"{self.told}\n{log.read_text()[-3000:]}\n{(self.work / 'train.log').read_text()[-3000:]}"

    def steps(self) -> int:
        return len(Journal(self.work).read(StepMetrics)) if self.work.is_dir() else 0

    def losses(self) -> list[float]:
        return [step.loss for step in Journal(self.work).steps()]

    def digest(self) -> str:
        return describe_directory(self.work / EXPORT, "export").digest

    def ranks(self) -> list[psutil.Process]:
        """Training processes: what hangs below the warm process and has no children."""
        servers = [
            one
            for one in psutil.process_iter(["cmdline"])
            if "tests.support.warm_ranks" in (one.info["cmdline"] or ()) and str(self.address) in one.info["cmdline"]
        ]
        found = []
        for server in servers:
            try:
                for supervisor in server.children():
                    found += [one for one in supervisor.children() if one.status() != psutil.STATUS_ZOMBIE]
            except psutil.NoSuchProcess:
                continue
        return found

    def checkpoint_files(self) -> list[Path]:
        """Files of the newest checkpoint."""
        folders = sorted((self.work / CHECKPOINTS).glob("step_*"))
        return sorted(path for path in folders[-1].iterdir() if path.stat().st_size) if folders else []


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("base")).folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    for name, count in (("train", 40), ("validation", 5)):
        rows = []
        for n in range(count):
            question = f"Context:\n- Board {n} is {'very ' * (n * 7 % 40)}long.\n\nQuestion: {n}?"
            answer = f"Board {n} is {'very ' * (n % 3)}long."
            rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with warm_ranks(tmp_path_factory.mktemp("warm")) as found:
        yield found


@pytest.fixture(scope="module")
def quiet(base: Path, dataset: Path, address: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nothing happens to."""
    run = Run(base, dataset, tmp_path_factory.mktemp("quiet") / "work", address)
    run.finish()
    assert len(run.losses()) == STEPS
    return run


Fault = Callable[[Run, random.Random], None]


def attempt(run: Run, chance: random.Random, act: Callable[[subprocess.Popen[bytes]], None]) -> int:
    """Start the run, act at a random step (or when it has ended), and wait for its end."""
    process = run.start()
    until = run.steps() + chance.randint(0, STEPS)
    deadline = time.monotonic() + 120
    while process.poll() is None and run.steps() < until and time.monotonic() < deadline:
        time.sleep(0.003)
    act(process)
    return run.wait(process)


def kill_one_process(run: Run, chance: random.Random) -> None:
    def act(process: subprocess.Popen[bytes]) -> None:
        if ranks := run.ranks():
            chance.choice(ranks).kill()

    attempt(run, chance, act)


def kill_all_processes(run: Run, chance: random.Random) -> None:
    def act(process: subprocess.Popen[bytes]) -> None:
        for one in run.ranks():
            one.kill()

    attempt(run, chance, act)


def kill_launcher(run: Run, chance: random.Random) -> None:
    attempt(run, chance, lambda process: process.kill())


def kill_during_a_save(run: Run, chance: random.Random) -> None:
    process = run.start()
    wanted = chance.randint(1, 4)
    seen: set[str] = set()
    while process.poll() is None and len(seen) < wanted:
        seen |= {path.name for path in (run.work / CHECKPOINTS).glob(".staging-step_*")}
    for one in run.ranks():
        one.kill()
    process.kill()
    run.wait(process)


def kill_during_an_upload(run: Run, chance: random.Random) -> None:
    assert run.mirror is not None
    process = run.start()
    before = {path for path in run.mirror.rglob("*") if path.is_file()} if run.mirror.is_dir() else set()
    while process.poll() is None and not {path for path in run.mirror.rglob("*") if path.is_file()} - before:
        time.sleep(0.001)
    process.kill()
    run.wait(process)
    if chance.random() < 0.5:
        shutil.rmtree(run.work, ignore_errors=True)
        run.told.append("and the disk is lost")


def give_notice(run: Run, chance: random.Random) -> None:
    process = run.start()
    until = run.steps() + chance.randint(1, STEPS)
    while process.poll() is None and run.steps() < until:
        time.sleep(0.003)
    process.send_signal(signal.SIGTERM)
    code = run.wait(process)
    outcome = Outcome.read(run.work)
    # A notice that comes while the processes start finds nothing to save.
    assert code in (0, 75, -signal.SIGTERM), run.explanation()
    if code == 75 and outcome is not None and outcome.kind == "interrupted":
        assert f"step_{outcome.step:08d}" in {path.name for path in (run.work / CHECKPOINTS).iterdir()}
        run.told.append(f"saved after step {outcome.step}")


def truncate_a_file(run: Run, chance: random.Random) -> None:
    kill_launcher(run, chance)
    if files := run.checkpoint_files():
        path = chance.choice(files)
        os.truncate(path, chance.randrange(path.stat().st_size))


def flip_a_byte(run: Run, chance: random.Random) -> None:
    kill_all_processes(run, chance)
    if files := run.checkpoint_files():
        path = chance.choice(files)
        data = bytearray(path.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)


def fill_the_disk(run: Run, chance: random.Random) -> None:
    run.wait(run.start(**{LARGEST_FILE_VARIABLE: str(chance.choice([20_000, 60_000, 150_000]))}))


def lose_the_disk(run: Run, chance: random.Random) -> None:
    """The folder is gone, as with a node; the copies in the object store are what is left."""
    kill_launcher(run, chance)
    shutil.rmtree(run.work, ignore_errors=True)


FAULTS: tuple[Fault, ...] = (
    kill_one_process,
    kill_all_processes,
    kill_launcher,
    kill_during_a_save,
    kill_during_an_upload,
    give_notice,
    truncate_a_file,
    flip_a_byte,
    fill_the_disk,
    lose_the_disk,
)


@pytest.mark.parametrize("number", range(SCHEDULES))
def test_a_random_schedule_ends_as_the_quiet_run(number: int, quiet: Run, tmp_path: Path) -> None:
    chance = random.Random(number)
    run = Run(quiet.base, quiet.dataset, tmp_path / "work", quiet.address, tmp_path / "mirror")
    # Each kind comes first in some schedule.
    faults = [FAULTS[number % len(FAULTS)], *chance.choices(FAULTS, k=chance.randint(0, 2))]
    for fault in faults:
        run.told.append(fault.__name__)
        fault(run, chance)
    run.finish()
    before, after = quiet.losses(), run.losses()
    assert after == before, run.explanation()
    assert run.digest() == quiet.digest(), run.explanation()


def test_the_faults_bite(quiet: Run, tmp_path: Path) -> None:
    """A damaged checkpoint is set aside with a sentence, and the next older one is used."""
    run = Run(quiet.base, quiet.dataset, tmp_path / "work", quiet.address)
    process = run.start()
    while run.steps() < 8:
        assert process.poll() is None, run.explanation()
        time.sleep(0.003)
    process.kill()
    run.wait(process)
    newest, damaged = sorted((run.work / CHECKPOINTS).glob("step_*"))[-1], run.checkpoint_files()[0]
    os.truncate(damaged, damaged.stat().st_size - 1)
    run.finish()
    events = Journal(run.work).read(Event)
    told = [event for event in events if event.kind == "checkpoint_damaged"]
    assert [event.step for event in told] == [int(newest.name[5:])]
    resumed = [event for event in events if event.kind == "resumed"]
    assert 0 < resumed[0].step < told[0].step
    assert run.losses() == quiet.losses()


def test_a_run_goes_on_with_another_number_of_processes(quiet: Run, tmp_path: Path) -> None:
    """2, then 1, then 2 processes: the same rows in each step, sums in another order."""
    steps = 24
    recipe = RECIPE.with_overrides({"lora.dropout": 0.0, "schedule.max_steps": steps, "guards.ranks.every_steps": 5})
    whole = Run(quiet.base, quiet.dataset, tmp_path / "whole", quiet.address, recipe=recipe)
    whole.finish()
    run = Run(quiet.base, quiet.dataset, tmp_path / "work", quiet.address)
    for processes, until in ((2, 3), (1, 10), (2, steps)):
        run.recipe = recipe.with_overrides({"parallelism.processes": processes})
        if until == steps:
            run.finish()
            break
        process = run.start()
        while process.poll() is None and run.steps() < until:
            time.sleep(0.003)
        process.send_signal(signal.SIGTERM)
        assert run.wait(process) == 75, run.explanation()
    resumed = [event.step for event in Journal(run.work).read(Event) if event.kind == "resumed"]
    assert len(resumed) == 2
    assert 0 < resumed[0] < resumed[1] < steps
    assert run.losses() == pytest.approx(whole.losses(), rel=1e-5)
    one, other = (read_float32(each.work / EXPORT / "model" / WEIGHTS) for each in (run, whole))
    for name, values in one.items():
        np.testing.assert_allclose(values, other[name], rtol=1e-3, atol=1e-5)


def test_a_notice_is_heard_where_every_step_is_saved(quiet: Run, tmp_path: Path) -> None:
    recipe = RECIPE.with_overrides({"checkpoints.every_steps": 1, "schedule.max_steps": 400})
    run = Run(quiet.base, quiet.dataset, tmp_path / "work", quiet.address, recipe=recipe)
    process = run.start()
    while run.steps() < 3:
        assert process.poll() is None, run.explanation()
        time.sleep(0.003)
    process.send_signal(signal.SIGTERM)
    assert run.wait(process) == 75
    outcome = Outcome.read(run.work)
    assert outcome is not None, run.explanation()
    assert outcome.kind == "interrupted"
    assert f"step_{outcome.step:08d}" in {path.name for path in (run.work / CHECKPOINTS).iterdir()}


def test_pauses_validate_and_change_nothing(quiet: Run, tmp_path: Path) -> None:
    """Neither is a validation due at these steps, nor may their losses stop the run: they do not fall."""
    recipe = RECIPE.with_overrides(
        {
            "schedule.validate_every_steps": 6,
            "schedule.result": "best",
            "guards.validation_loss.patience": 3,
            "optimizer.learning_rate": 1e-9,
            "optimizer.minimum_learning_rate": 0.0,
        }
    )
    run = Run(quiet.base, quiet.dataset, tmp_path / "work", quiet.address, recipe=recipe)
    straight = Run(quiet.base, quiet.dataset, tmp_path / "straight", quiet.address, recipe=recipe)
    for step in (2, 4, 5, 9):
        pause = train_until(
            step,
            run.base,
            run.dataset,
            recipe,
            run.work,
            launch=lambda job, observer, mirror: WarmLauncher(job, observer, mirror, address=run.address),
        )
        assert pause.validation_loss is not None
        outcome = Outcome.read(run.work)
        assert outcome is not None
        assert (outcome.kind, outcome.step) == ("paused", step)
    run.finish()
    straight.finish()
    assert run.losses() == straight.losses()
    assert run.digest() == straight.digest()
    assert Outcome.read(run.work) == Outcome.read(straight.work)
    # The weights that come out were validated, whether or not the last step is a multiple of the interval.
    assert [line.step for line in Journal(straight.work).read(Validation)] == [6, 12, 16]


def test_dora_starts_from_the_base(quiet: Run, tmp_path: Path) -> None:
    recipe = RECIPE.with_overrides({"method": "dora", "schedule.max_steps": 1, "schedule.validate_every_steps": None})
    run = Run(quiet.base, quiet.dataset, tmp_path / "work", quiet.address, recipe=recipe)
    run.finish()
    [first] = Journal(run.work).steps()
    # Before the first update an adapter of any method gives what the base gives, but for what dropout leaves out.
    assert first.skipped is None
    assert first.loss == pytest.approx(quiet.losses()[0], abs=1e-4)
