"""Runs of the local profile: one folder a run, one process group a run, attach or go on after any crash.

`.sluice/runs/<id>/` holds `run.json` (what was asked, how it went), `run.log` (everything its tasks printed),
`dag.json` (tasks and what they wait for), `tasks/` and `progress/` (written by the tasks themselves).
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from sluice.components.task import TaskState, read_tasks
from sluice.infra.errors import InputError, StepFailed, UnavailableError
from sluice.infra.file_lock import held
from sluice.infra.progress import RUN_DIR_VARIABLE
from sluice.infra.settings import SETTINGS_VARIABLE, Settings
from sluice.provenance.canonical import Json

RUN_VARIABLE = "SLUICE_RUN_ID"
PIPELINES = ("retrain", "release", "reembed")
SWEEP = "sweep"
"""A pipeline too, but one for each grid: `sluice sweep` starts it."""


@dataclass
class Run:
    """One run of a pipeline. Times in seconds since the epoch; `pid_created` tells a reused process id from ours.

    `key` is what the run was started for, when that may start one run only (`start_run`).
    """

    id: str
    pipeline: str
    parameters: dict[str, Json]
    state: str = "pending"
    started: float = 0.0
    finished: float | None = None
    pid: int | None = None
    pid_created: float | None = None
    error: str | None = None
    hint: str | None = None
    exit_code: int = 0
    key: str = ""
    folder: Path = field(default=Path(), repr=False)

    @property
    def log(self) -> Path:
        return self.folder / "run.log"

    def tasks(self) -> dict[str, TaskState]:
        """The tasks that have started, by their name in the DAG."""
        return read_tasks(self.folder)

    def value(self, task: str, name: str) -> Json:
        """A plain value that a finished task reported. Raises `StepFailed` when it did not."""
        try:
            return self.tasks()[task].values[name]
        except KeyError as error:
            raise StepFailed(f"Task {task!r} of run {self.id} reported no value {name!r}.") from error

    def output(self, task: str, name: str) -> str:
        """Digest of an artifact that a finished task made. Raises `StepFailed` when it did not."""
        try:
            return self.tasks()[task].outputs[name]
        except KeyError as error:
            raise StepFailed(f"Task {task!r} of run {self.id} made no artifact {name!r}.") from error

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {key: value for key, value in asdict(self).items() if key != "folder"}
        staging = self.folder / f".run.{os.getpid()}"
        staging.write_text(json.dumps(content, indent=2))
        staging.replace(self.folder / "run.json")

    def reload(self) -> Run:
        return load_run(self.folder)

    @property
    def alive(self) -> bool:
        """Whether the run's own process still runs (and is not another one with its number)."""
        import psutil

        if self.pid is None:
            return False
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - (self.pid_created or 0)) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def load_run(folder: Path) -> Run:
    """A run from its folder. Raises `InputError` when there is none or its file is damaged."""
    try:
        return Run(**json.loads((folder / "run.json").read_text()), folder=folder)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"There is no readable run in {folder}: {error}.", hint="`sluice runs` lists them.") from error


def list_runs(settings: Settings) -> list[Run]:
    """All readable runs, newest first. A run whose process died without a word is shown as `killed`.

    A folder whose file is missing or damaged is passed over: one bad run must not hide the others.
    """
    runs = []
    for folder in settings.runs.glob("*/"):
        try:
            run = load_run(folder)
        except InputError:
            continue
        if run.state in ("pending", "running") and not run.alive:
            run.state = "killed"
        runs.append(run)
    return sorted(runs, key=lambda run: run.started, reverse=True)


def find_run(settings: Settings, prefix: str) -> Run:
    """The run whose id starts with `prefix`, or ends with it; `last` is the newest."""
    runs = list_runs(settings)
    found = (
        runs[:1] if prefix == "last" else [run for run in runs if run.id.startswith(prefix) or run.id.endswith(prefix)]
    )
    if len(found) != 1:
        problem = "no run" if not found else f"{len(found)} runs"
        raise InputError(f"RUN = {prefix!r} names {problem}.", hint="`sluice runs` lists them.")
    return found[0]


def start_run(settings: Settings, pipeline: str, parameters: Mapping[str, Json], *, key: str = "") -> Run:
    """Start a run in a process group of its own, or attach to a live one of the same pipeline and parameters.

    With a `key` (a release's approval) it is started once: whoever asks again gets that run, also when it has ended.
    Only one that was killed is started anew, as a killed run always may be: it goes on where it was. Raises
    `UnavailableError` while the run of another key does the same.
    """
    if " " in sys.executable:
        raise InputError(
            f"The path of the interpreter, {sys.executable!r}, holds a blank: KFP's local runner cannot start it.",
            hint="Move the checkout to a folder without blanks, then `make setup`.",
        )
    settings.runs.mkdir(parents=True, exist_ok=True)
    # Two command lines that ask at once must not both start it: two rollouts of one release would fail each other.
    with held(settings.runs / ".lock"):
        return _attach_or_start(settings, pipeline, parameters, key)


def _attach_or_start(settings: Settings, pipeline: str, parameters: Mapping[str, Json], key: str) -> Run:
    for other in list_runs(settings):
        if other.pipeline == pipeline and other.parameters == dict(parameters) and other.alive:
            if key and other.key and other.key != key:
                raise UnavailableError(
                    f"The run {other.id} does the same for an earlier approval, and has not ended.",
                    hint="Ask again when it has (`sluice runs`), or `sluice cancel` it.",
                )
            return other
        if key and other.key == key and other.state != "killed":
            return other
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    run_id = f"{pipeline}-{stamp}-{secrets.token_hex(2)}"
    run = Run(run_id, pipeline, dict(parameters), started=time.time(), key=key, folder=settings.runs / run_id)
    run.save()
    environment = {
        **os.environ,
        RUN_DIR_VARIABLE: str(run.folder),
        RUN_VARIABLE: run_id,
        "SLUICE_HOME": str(settings.home),
        "SLUICE_SERVE_PYTHON": str(settings.serve_python),
        "PYTHONUNBUFFERED": "1",
    }
    if os.environ.get(SETTINGS_VARIABLE):
        environment[SETTINGS_VARIABLE] = str(Path(os.environ[SETTINGS_VARIABLE]).absolute())
    with run.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "sluice.pipelines.local_run", str(run.folder), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    import psutil

    run.pid, run.state = process.pid, "running"
    try:
        run.pid_created = psutil.Process(process.pid).create_time()
    except psutil.NoSuchProcess:
        run.pid_created = time.time()
    run.save()
    _children[run.id] = process
    return run


_children: dict[str, subprocess.Popen[bytes]] = {}


def finish(run: Run) -> Run:
    """The run's final state, once its process has ended. A process that died without a word is `killed`."""
    child = _children.pop(run.id, None)
    if child is not None:
        child.wait()
    run = run.reload()
    if run.state in ("pending", "running"):
        run.state, run.finished, run.exit_code = "killed", time.time(), 7
        run.error, run.hint = "The run's process was killed.", "Run it again: finished steps are not computed again."
        run.save()
    return run


def cancel(run: Run, *, grace_s: float = 15.0) -> None:
    """End a run and everything it started: SIGTERM to its process group, SIGKILL to what is left after `grace_s`.

    The run's own process ends at once; its task may have something to give back first.
    """
    if run.pid is None or not run.alive:
        return
    _signal_group(run.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while _members(run.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    _signal_group(run.pid, signal.SIGKILL)
    run = run.reload()
    run.state, run.finished, run.exit_code = "cancelled", time.time(), 130
    run.error, run.hint = "The run was cancelled.", "Run it again: it goes on where it was."
    run.save()


def _members(group: int) -> list[int]:
    """Processes of a group that still run."""
    import psutil

    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except ProcessLookupError:
            continue
    return found


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass
