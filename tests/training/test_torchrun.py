"""The launcher's behaviour towards its processes (stand-ins for torchrun)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from sluice.infra.errors import ConflictError, Interrupted, SluiceError, StepFailed
from sluice.training.flight import finding_file
from sluice.training.job import Job
from sluice.training.journal import Line
from sluice.training.recipe import load_recipe
from sluice.training.torchrun import TorchrunLauncher


@dataclass(frozen=True)
class ScriptLauncher(TorchrunLauncher):
    """Runs a Python script in torchrun's place; everything else is the real launcher."""

    script: str = ""

    def _command(self, lock: Path) -> list[str]:
        return [sys.executable, "-c", self.script, str(self.job.work_dir), str(self.job.work_dir / "pid"), str(lock)]


def launcher(
    tmp_path: Path, script: str, *, timeout_s: float = 20.0, notice_s: float = 2.0, **options: Any
) -> ScriptLauncher:
    overrides = {"budget.timeout_minutes": timeout_s / 60, "budget.notice_s": notice_s, "schedule.max_steps": 3}
    recipe = load_recipe("tiny").with_overrides(overrides)
    job = Job(tmp_path, tmp_path, tmp_path / "train.jsonl", None, recipe, 3)
    return ScriptLauncher(job, poll_s=0.02, patience_s=0.3, script=script, **options)


WRITE_STEPS = """
import sys, time
from pathlib import Path
from sluice.training.job import Outcome
from sluice.training.journal import Journal, StepMetrics
journal = Journal(Path(sys.argv[1]))
for step in (1, 2, 3):
    journal.write(StepMetrics(step, 4.0 - step, 0.5, 1e-3, 100, 10, 10.0, 0.1))
    time.sleep(0.1)
Outcome("finished", 3, "Finished after step 3.").write(Path(sys.argv[1]))
"""
SLEEP = "import os, sys, time; open(sys.argv[2], 'w').write(str(os.getpid())); time.sleep(60)"


def test_every_step_is_reported(tmp_path: Path) -> None:
    reports: list[tuple[float, float, str]] = []
    seen: list[Line] = []

    class Watching:
        def see(self, lines: Iterable[Line]) -> None:
            seen.extend(lines)

    outcome = launcher(tmp_path, WRITE_STEPS, observer=Watching()).run(lambda *state: reports.append(state))
    assert (outcome.kind, outcome.step) == ("finished", 3)
    assert [state[0] for state in reports] == [0, 1, 2, 3]
    assert "loss 1.000" in reports[-1][2]
    assert [line.step for line in seen] == [1, 2, 3]


def test_success_without_an_outcome_is_none(tmp_path: Path) -> None:
    """torchrun ends with exit code 0 when its processes do, whatever they came to."""
    with pytest.raises(StepFailed, match="exit code 0 and no message"):
        launcher(tmp_path, "pass").run()


@pytest.mark.parametrize(
    ("kind", "error", "says"),
    [
        ("interrupted", Interrupted, "Saved after step 2"),
        ("stopped", StepFailed, "was stopped: Saved after step 2"),
        ("failed", StepFailed, "failed: Saved after step 2"),
    ],
)
def test_an_outcome_is_told(tmp_path: Path, kind: str, error: type[SluiceError], says: str) -> None:
    script = (
        "import sys; from pathlib import Path; from sluice.training.job import Outcome;"
        f"Outcome('{kind}', 2, 'Saved after step 2.').write(Path(sys.argv[1]))"
    )
    with pytest.raises(error, match=says) as caught:
        launcher(tmp_path, script).run()
    assert caught.value.exit_code == (75 if kind == "interrupted" else 7)


def test_a_failure_that_would_come_again_is_not_restarted(tmp_path: Path) -> None:
    """The processes still wait (as torchrun does before a restart); the launcher does not."""
    script = (
        "import sys, time; from pathlib import Path; from sluice.training.job import Outcome;"
        "Outcome('failed', 2, 'ValueError: no such module').write(Path(sys.argv[1])); time.sleep(60)"
    )
    started = time.monotonic()
    with pytest.raises(StepFailed, match="no such module"):
        # Deaf to SIGTERM, as torchrun is while it starts the processes again.
        launcher(tmp_path, "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + script, notice_s=50).run()
    assert time.monotonic() - started < 30


def test_spent_money_stops_the_processes(tmp_path: Path) -> None:
    job = launcher(tmp_path, WRITE_STEPS + "time.sleep(60)", price_per_hour=1e6, notice_s=0.2)
    recipe = job.job.recipe.with_overrides({"budget.dollars": 1.0})
    with pytest.raises(StepFailed, match=r"budget\.dollars = 1"):
        replace(job, job=replace(job.job, recipe=recipe)).run()


def test_a_failure_carries_its_cause_and_the_log(tmp_path: Path) -> None:
    with pytest.raises(StepFailed) as caught:
        launcher(tmp_path, "raise ValueError('the learning rate is a fish')").run()
    assert "ValueError: the learning rate is a fish" in caught.value.message
    assert str(tmp_path / "train.log") in caught.value.hint


def test_a_hang_of_an_earlier_attempt_is_not_this_ones_cause(tmp_path: Path) -> None:
    finding_file(tmp_path).parent.mkdir()
    finding_file(tmp_path).write_text("Rank 1 never joined.")
    with pytest.raises(StepFailed, match="exit code 3"):
        launcher(tmp_path, "raise SystemExit(3)").run()


def test_a_roll_back_to_the_start_takes_no_restart_from_dead_processes(tmp_path: Path) -> None:
    recipe = load_recipe("tiny").with_overrides({"guards.ranks.restarts": 0, "guards.not_finite.policy": "roll_back"})
    job = replace(launcher(tmp_path, "").job, recipe=recipe)
    # not_finite and loss_corridor, each at most two before the third stops the run.
    assert "--max-restarts=4" in TorchrunLauncher(job).describe()


def test_the_cause_is_of_this_attempt(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text("Traceback (most recent call last):\nValueError: old\n")
    with pytest.raises(StepFailed, match="exit code 3"):
        launcher(tmp_path, "raise SystemExit(3)").run()


def wait_for(path: Path) -> int:
    for _ in range(500):
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.02)
    raise AssertionError(f"{path} did not appear")


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_budget_stops_the_processes(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match=r"budget\.timeout_minutes"):
        launcher(tmp_path, SLEEP, timeout_s=1.0).run()
    assert not is_running(wait_for(tmp_path / "pid"))


def test_an_exception_while_following_stops_the_processes(tmp_path: Path) -> None:
    def refuse(completed: float, total: float, message: str) -> None:
        wait_for(tmp_path / "pid")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launcher(tmp_path, SLEEP, notice_s=1.0).run(refuse)
    assert not is_running(wait_for(tmp_path / "pid"))


def test_processes_deaf_to_sigterm_are_killed(tmp_path: Path) -> None:
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP
    with pytest.raises(StepFailed):
        launcher(tmp_path, deaf, timeout_s=1.0, notice_s=0.3).run()
    assert not is_running(wait_for(tmp_path / "pid"))


SAVE_WHEN_TOLD = """
import signal, subprocess, sys
from pathlib import Path
child = '''
import signal, sys, time
from pathlib import Path
from sluice.training.job import Outcome
def save(number, frame):
    Outcome("interrupted", 2, "Saved after step 2.").write(Path(sys.argv[1]))
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
(Path(sys.argv[1]) / "ready").touch()
time.sleep(60)
'''
sys.exit(subprocess.run([sys.executable, "-c", child, sys.argv[1]], start_new_session=True).returncode)
"""


def test_a_notice_goes_to_the_training_processes_and_what_they_saved_is_told(tmp_path: Path) -> None:
    def notice() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=notice).start()
    with pytest.raises(Interrupted, match="Saved after step 2"):
        launcher(tmp_path, SAVE_WHEN_TOLD, notice_s=20).run()


def test_processes_that_do_not_save_in_time_are_ended(tmp_path: Path) -> None:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP
    started = time.monotonic()
    with pytest.raises(Interrupted, match="could not save in time"):
        launcher(tmp_path, deaf, notice_s=3.0).run()
    # The notice is over once, not once for saving and once for stopping: the machine is gone by then.
    assert time.monotonic() - started < 6.0
    assert not is_running(wait_for(tmp_path / "pid"))


def test_one_launcher_for_a_folder(tmp_path: Path) -> None:
    running = launcher(tmp_path, SLEEP, timeout_s=8.0, notice_s=0.3)
    failures: list[BaseException] = []

    def run_first() -> None:
        try:
            running.run()
        except StepFailed as error:
            failures.append(error)

    first = threading.Thread(target=run_first)
    first.start()
    pid = wait_for(tmp_path / "pid")
    with pytest.raises(ConflictError, match="Another process trains"):
        launcher(tmp_path, SLEEP).run()
    os.kill(pid, signal.SIGKILL)
    first.join()
    assert len(failures) == 1


def test_a_process_ends_when_its_launcher_is_killed(tmp_path: Path) -> None:
    rank = (
        "import os, sys, time; from pathlib import Path; from sluice.training.entry import exit_with_launcher;"
        "exit_with_launcher(Path(sys.argv[3]), 0.05);" + SLEEP
    )
    program = (
        "import sys; from pathlib import Path; from tests.training.test_torchrun import launcher;"
        "launcher(Path(sys.argv[1]), sys.argv[2]).run()"
    )
    outer = subprocess.Popen([sys.executable, "-c", program, str(tmp_path), rank])
    pid = wait_for(tmp_path / "pid")
    outer.kill()
    outer.wait()
    for _ in range(100):
        if not is_running(pid):
            break
        time.sleep(0.05)
    assert not is_running(pid)
