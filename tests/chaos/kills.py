"""kill -9 of a pipeline's runner and tasks, and of the guided loop, at chosen moments."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

from sluice.pipelines.runs import load_run
from tests.support.installation import SLUICE, Installation

_PATIENCE_S = 240


def run_through_kills(installation: Installation, pipeline: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Run a pipeline to its end, killing runner and task once in every task. The last run, with `killed`."""
    killed: list[str] = []
    given = [part for name, value in parameters.items() for part in ("--param", f"{name}={value}")]
    for _ in range(30):
        run = installation.json("run", pipeline, *given, "--detach")
        folder = Path(run["log"]).parent
        moment = _wait_for_task([folder], killed, until=lambda folder=folder: _ended(folder))
        if moment is None:
            ended = installation.wait_for(
                lambda run_id=run["id"]: installation.run_named(run_id),
                what=f"record of {pipeline}",
            )
            assert ended["state"] == "done", ended["error"]
            return {**ended, "killed": killed}
        _kill(moment, killed)
    raise AssertionError(f"{pipeline} did not come to its end; killed in {killed}")


class GuidedLoop:
    """`sluice demo` with a plan, started again after each kill until it ends."""

    def __init__(self, installation: Installation, plan: Path) -> None:
        self.installation = installation
        self.killed: list[str] = []
        self._plan = plan
        self._known = set(self._folders())
        self._process: subprocess.Popen[str] | None = None
        self._said = plan.with_suffix(".log")

    def kill_in_stage(self, heading: str, after_s: float) -> None:
        """Kill the loop's own process `after_s` seconds into the stage whose heading it printed."""
        process = self._running()
        deadline = time.monotonic() + _PATIENCE_S
        while heading not in self._said.read_text():
            assert process.poll() is None, self._said.read_text()
            assert time.monotonic() < deadline, f"{heading!r} did not come"
            time.sleep(0.02)
        time.sleep(after_s)
        self._kill_itself(heading)

    def kill_in_new_run(self, pipeline: str) -> dict[str, Any]:
        """Kill the loop's own process as soon as it has started a run of `pipeline`; the run goes on. Its record."""
        process = self._running()
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            assert process.poll() is None, self._said.read_text()
            for folder in self._new_folders():
                if folder.name.startswith(pipeline) and any((folder / "tasks").glob("*.json")):
                    self._kill_itself(pipeline)
                    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
                    return found
            time.sleep(0.02)
        raise AssertionError(f"no run of {pipeline} was started")

    def end_through_kills(self) -> Any:
        """Kill the loop, the runner and the task once in every task that is still to come. The loop's result."""
        for _ in range(30):
            process = self._running()
            moment = _wait_for_task(
                lambda: self._new_folders(), self.killed, until=lambda process=process: process.poll() is not None
            )
            if moment is None:
                output, _ = process.communicate()
                self._process = None
                assert process.returncode == 0, self._said.read_text()
                return json.loads(output)
            # First the task's runner, so that the loop has no time to see how it ends.
            self._kill_itself("")
            _kill(moment, self.killed)
        raise AssertionError(f"the loop did not come to its end; killed in {self.killed}")

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            with self._said.open("w") as said:
                self._process = subprocess.Popen(
                    [str(SLUICE), "demo", "--plan", str(self._plan), "--json"],
                    env=self.installation.environment,
                    cwd=self.installation.home.parent,
                    stdout=subprocess.PIPE,
                    stderr=said,
                    text=True,
                )
        return self._process

    def _kill_itself(self, moment: str) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.communicate()
        self._process = None
        if moment:
            self.killed.append(moment)

    def _folders(self) -> list[Path]:
        return list((self.installation.home / "runs").glob("*/"))

    def _new_folders(self) -> list[Path]:
        return [folder for folder in self._folders() if folder not in self._known]


def _wait_for_task(folders: Any, killed: list[str], *, until: Any) -> tuple[Path, str] | None:
    """The first running task that was not killed before; None when `until()` came true without one."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        over = until()
        for folder in folders() if callable(folders) else folders:
            for path in (folder / "tasks").glob("*.json"):
                try:
                    found = json.loads(path.read_text())
                except ValueError:
                    continue
                if found["state"] == "running" and found["task"] not in killed and not _ended(folder):
                    return folder, str(found["task"])
        if over:
            return None
        time.sleep(0.02)
    raise AssertionError(f"nothing happened for {_PATIENCE_S} s; killed so far: {killed}")


def _ended(folder: Path) -> bool:
    run = load_run(folder)
    return run.state not in ("pending", "running") or (run.pid is not None and not run.alive)


def _kill(moment: tuple[Path, str], killed: list[str]) -> None:
    folder, task = moment
    # Somewhere inside the task, not always at its first instruction.
    time.sleep(0.15 * (len(killed) % 4))
    _kill_tree(load_run(folder).pid)
    killed.append(task)


def _kill_tree(pid: int | None) -> None:
    """SIGKILL the runner first, then its task. What the task started itself has to notice on its own."""
    assert pid is not None
    try:
        runner = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return
    children = runner.children()
    for process in (runner, *children, *(grandchild for child in children for grandchild in child.children())):
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def processes_of(installation: Installation) -> list[psutil.Process]:
    """Every process that works for this installation."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        if (process.info["environ"] or {}).get("SLUICE_HOME") == str(installation.home):
            found.append(process)
    return found
