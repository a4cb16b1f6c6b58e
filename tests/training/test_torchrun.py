"""The launcher's reading of logs and metrics, and its behaviour towards processes (stand-ins for torchrun)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from sluice.infra.errors import ConflictError, StepFailed
from sluice.training.torchrun import TorchrunLauncher, find_cause, read_records


@dataclass(frozen=True)
class ScriptLauncher(TorchrunLauncher):
    """Runs a Python script in torchrun's place; everything else is the real launcher."""

    script: str = ""

    def _command(self, lock: Path) -> list[str]:
        return [sys.executable, "-c", self.script, str(self.metrics), str(self.work_dir / "pid"), str(lock)]


def launcher(tmp_path: Path, script: str, *, timeout_s: float = 20.0, grace_s: float = 2.0) -> ScriptLauncher:
    return ScriptLauncher(
        tmp_path / "config", tmp_path, tmp_path / "training.jsonl", 2, 3, timeout_s, 0.02, grace_s, 0.3, script
    )


WRITE_STEPS = """
import json, sys, time
with open(sys.argv[1], "a") as metrics:
    for step in range(3):
        metrics.write(json.dumps({"step": step, "loss": 3.0 - step, "tps": 10.0}) + "\\n")
        metrics.flush()
        time.sleep(0.1)
"""
SLEEP = "import os, sys, time; open(sys.argv[2], 'w').write(str(os.getpid())); time.sleep(60)"


def test_every_step_is_reported(tmp_path: Path) -> None:
    reports: list[tuple[float, float, str]] = []
    launcher(tmp_path, WRITE_STEPS).run(lambda *state: reports.append(state))
    assert [state[0] for state in reports] == [0, 1, 2, 3]
    assert reports[-1] == (3, 3, "loss 1.000, 10 tokens/s")


def test_a_failure_carries_its_cause_and_the_log(tmp_path: Path) -> None:
    with pytest.raises(StepFailed) as caught:
        launcher(tmp_path, "raise ValueError('the learning rate is a fish')").run()
    assert "ValueError: the learning rate is a fish" in caught.value.message
    assert str(tmp_path / "train.log") in caught.value.hint


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
        launcher(tmp_path, SLEEP).run(refuse)
    assert not is_running(wait_for(tmp_path / "pid"))


def test_processes_deaf_to_sigterm_are_killed(tmp_path: Path) -> None:
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP
    with pytest.raises(StepFailed):
        launcher(tmp_path, deaf, timeout_s=1.0, grace_s=0.3).run()
    assert not is_running(wait_for(tmp_path / "pid"))


def test_sigterm_to_the_launcher_stops_the_processes(tmp_path: Path) -> None:
    terminate = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    terminate.start()
    with pytest.raises(SystemExit):
        launcher(tmp_path, SLEEP).run()
    assert not is_running(wait_for(tmp_path / "pid"))


def test_one_launcher_for_a_folder(tmp_path: Path) -> None:
    running = launcher(tmp_path, SLEEP, timeout_s=8.0, grace_s=0.3)
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


FIRST = "Traceback (most recent call last):\n  File 'x.py', line 1, in f\n    g()\nRuntimeError: mat1 and mat2\n"
ECHO = "Traceback (most recent call last):\n  File 'y.py'\nRuntimeError: [gloo/pair.cc] Connection closed by peer\n"
AGENT = "Traceback (most recent call last):\n  a\ntorch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (ECHO + FIRST + AGENT, "RuntimeError: mat1 and mat2"),
        ("[rank1]: " + FIRST.replace("\n", "\n[rank1]: ") + "\n" + AGENT, "RuntimeError: mat1 and mat2"),
        (ECHO + AGENT + "  exitcode  : -9 (pid: 12)\n", "killed by SIGKILL, perhaps for lack of memory."),
        (AGENT + "  exitcode  : -11 (pid: 12)\n", "killed by SIGSEGV."),
        (ECHO, "Connection closed by peer"),
        ("nothing\n", "exit code 1 and no message"),
    ],
)
def test_the_cause_is_the_first_failure_and_no_echo(log: str, cause: str) -> None:
    assert cause in find_cause(log, 1)


def test_records_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    assert read_records(path) == ([], 0)
    path.write_text('{"step": 0}\n{"step"')
    records, position = read_records(path)
    assert records == [{"step": 0}]
    with path.open("a") as stream:
        stream.write(": 1}\n[]\n{}\nbroken\n" + json.dumps({"step": 2}) + "\n")
    assert read_records(path, position)[0] == [{"step": 1}, {"step": 2}]


def test_a_line_cut_by_a_kill_does_not_swallow_the_next_one(tmp_path: Path) -> None:
    job = launcher(tmp_path, WRITE_STEPS)
    job.metrics.write_text('{"step": 0, "loss": 9.0}\n{"step": 1, "lo')
    job.run()
    assert [record["step"] for record in read_records(job.metrics)[0]] == [0, 0, 1, 2]
