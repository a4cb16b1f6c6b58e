"""What every component shares: its KFP decorator, its typed artifacts, and a record of how it went.

KFP tells only that a task failed; its traceback sits in a container's log. So each task writes `tasks/<task>.json` into
the run's folder (`SLUICE_RUN_DIR`): state, whether its result was there already, one line on what it did, and the
real cause when it failed. The command line reads these.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from sluice.components.workspace import Workspace, open_workspace
from sluice.infra.errors import InputError, SluiceError
from sluice.infra.progress import RUN_DIR_VARIABLE, Report, step_reporter
from sluice.provenance.canonical import Json, digest_json
from sluice.provenance.code import code_sources
from sluice.provenance.steps import StepKey, StepOutput, StepRecord

TASK_VARIABLE = "SLUICE_TASK"
CODE_VARIABLE = "SLUICE_CODE_DIGEST"
IMAGE_VARIABLE = "SLUICE_PIPELINE_IMAGE"
LOCAL_IMAGE = "sluice-pipeline-python"
"""Image name in the local profile, where tasks are processes and no image is pulled (KFP wants `python` in it)."""


def component(function: Callable[..., Any]) -> Any:
    """A KFP component that installs nothing when it runs: the image, or the local environment, holds everything."""
    if os.environ.get("_KFP_RUNTIME") == "true":
        # KFP's executor imports this module for the step behind the component, and has no decorators itself.
        return function
    from kfp import dsl

    image = os.environ.get(IMAGE_VARIABLE, LOCAL_IMAGE)
    return dsl.component(function, base_image=image, packages_to_install=[], install_kfp_package=False)


@dataclass
class TaskState:
    """How one task of a run goes. Times in seconds since the epoch; `hit` means that nothing was computed again.

    `steps` has the steps that the task came to: key digest, the key itself, and whether it was a hit (None: not ended).
    """

    task: str
    state: str
    started: float
    finished: float | None = None
    hit: bool | None = None
    summary: str = ""
    outputs: dict[str, str] = field(default_factory=dict)
    values: dict[str, Json] = field(default_factory=dict)
    steps: list[dict[str, Json]] = field(default_factory=list)
    error: str | None = None
    hint: str | None = None
    exit_code: int = 0


class Task:
    """One running task: the installation, a progress report, and `step` for work that is never done twice."""

    def __init__(self, name: str, workspace: Workspace) -> None:
        self.name = name
        self.workspace = workspace
        self.report: Report = step_reporter(name)
        self.state = TaskState(name, "running", time.time())

    def step(
        self,
        name: str,
        *,
        rooms: tuple[str, ...],
        parameters: Mapping[str, Json],
        inputs: Mapping[str, str],
        function: Callable[[Path], StepOutput],
        locks: tuple[str, ...] = ("main",),
    ) -> StepRecord:
        """Run a step, or find its record: same name, code of `rooms`, parameters and inputs mean the same result.

        `locks` are the environments that compute it: what asks vLLM adds `serve`.
        """
        key, sources = self.key(name, rooms=rooms, parameters=parameters, inputs=inputs, locks=locks)
        trace: dict[str, Json] = {"digest": key.digest, "key": key.to_json(), "hit": None}
        self.state.steps.append(trace)
        record, trace["hit"] = self.workspace.steps.run(key, function, self.report, sources)
        hit = bool(trace["hit"])
        self.state.hit = hit if self.state.hit is None else self.state.hit and hit
        self.state.outputs.update(record.output.artifacts)
        self.state.values.update(record.output.values)
        return record

    def measured(
        self, made: Callable[[int], StepRecord], lost: Callable[[StepRecord], bool], again: int = 0
    ) -> StepRecord:
        """A measurement that asks a server: `made(again)` is its step, made anew for the time `again`.

        One that `lost` too much is made anew when it is asked for again: what was lost is asked again, the rest is
        known. So what one run lost is the next run's to mend, and no run asks for ever.
        """
        record = made(again)
        while self.state.steps[-1]["hit"] and lost(record):
            again += 1
            record = made(again)
        return record

    @staticmethod
    def key(
        name: str,
        *,
        rooms: tuple[str, ...],
        parameters: Mapping[str, Json],
        inputs: Mapping[str, str],
        locks: tuple[str, ...] = ("main",),
    ) -> tuple[StepKey, Json]:
        """The key of a step as `step` would run it, and the files behind its code digest."""
        sources = code_sources("infra", "provenance", *rooms, locks=locks)
        return StepKey(name, digest_json(sources), dict(parameters), dict(inputs)), sources

    def say(self, summary: str) -> None:
        """The one line that people see beside the task."""
        self.state.summary = summary


@contextmanager
def task(name: str, workspace: Workspace | None = None) -> Iterator[Task]:
    """Record how a task goes, whatever ends it. The task's name in the DAG wins over `name`."""
    chosen = os.environ.get(TASK_VARIABLE, name)
    running: Task | None = None
    state = TaskState(chosen, "running", time.time())
    _publish(state)
    # KFP and Kubernetes end a task with SIGTERM: turn it into an exception, so that children are ended and the
    # state says so.
    previous = signal.signal(signal.SIGTERM, _terminated)
    try:
        running = Task(chosen, workspace or open_workspace())
        state = running.state
        yield running
    except SluiceError as error:
        _fail(state, error.message, error.hint, error.exit_code)
        print(f"{chosen}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from error
    except KeyboardInterrupt:
        _fail(state, "The task was cancelled.", "Run it again: it goes on where it was.", 130)
        raise
    except Exception as error:
        traceback.print_exc()
        _fail(state, f"{type(error).__name__}: {error}", "This is a defect; the run's log holds the stack trace.", 1)
        raise
    else:
        state.state, state.finished = "done", time.time()
        _publish(state)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _fail(state: TaskState, error: str, hint: str, exit_code: int) -> None:
    state.state, state.finished, state.error, state.hint, state.exit_code = (
        "failed",
        time.time(),
        error,
        hint,
        exit_code,
    )
    _publish(state)


def _publish(state: TaskState) -> None:
    run_dir = os.environ.get(RUN_DIR_VARIABLE)
    if not run_dir:
        return
    folder = Path(run_dir) / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / f".{state.task}.{os.getpid()}"
    staging.write_text(json.dumps(asdict(state)))
    staging.replace(folder / f"{state.task}.json")


def read_tasks(run_dir: Path) -> dict[str, TaskState]:
    """The state of each task of a run that has started."""
    states = {}
    for path in sorted((run_dir / "tasks").glob("*.json")):
        try:
            states[path.stem] = TaskState(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            continue
    return states


def publish(output: Any, digest: str, **metadata: str) -> None:
    """Make a KFP output artifact stand for the artifact `digest`: a small pointer file, and metadata for the UI."""
    output.metadata["digest"] = digest
    for key, value in metadata.items():
        output.metadata[key] = value
    Path(output.path).parent.mkdir(parents=True, exist_ok=True)
    Path(output.path).write_text(json.dumps({"digest": digest, **metadata}))


def digest_of(artifact: Any) -> str:
    """The digest that a KFP input artifact stands for."""
    digest = artifact.metadata.get("digest")
    if not digest:
        raise InputError(
            f"The artifact {artifact.name!r} carries no digest.", hint="It was not made by a component of this package."
        )
    return str(digest)


def parse_json(text: str, name: str) -> dict[str, Json]:
    """A JSON object given as a pipeline parameter; empty text is an empty object."""
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"Parameter {name} = {text!r} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise InputError(f"Parameter {name} = {text!r} must be a JSON object.")
    return value
