"""Progress that crosses process boundaries.

A pipeline step runs in a process of its own; the command line that started it shows the step's bar. Library code
takes a plain callable (`Report`) and knows nothing of files; a component gets one from `step_reporter`, which writes
the latest state atomically where `SLUICE_RUN_DIR` points. Without that variable reporting does nothing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

Report = Callable[[float, float, str], None]
"""`report(completed, total, message)`: total 0 means unknown. Cheap enough to call for every item."""

RUN_DIR_VARIABLE = "SLUICE_RUN_DIR"


@dataclass(frozen=True)
class StepProgress:
    """The latest state of one step: counts in the step's own unit, times in seconds since the epoch."""

    step: str
    completed: float
    total: float
    message: str
    started: float
    updated: float


def no_report(completed: float, total: float, message: str) -> None:
    """A `Report` that says nothing."""


def duration_text(seconds: float) -> str:
    """45 s, 12 min, 3 h 20 min, 2 d 4 h: as exact as people care for."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def step_reporter(step: str, *, interval_s: float = 0.2) -> Report:
    """A `Report` for `step` that publishes into the run's folder at most every `interval_s` seconds."""
    run_dir = os.environ.get(RUN_DIR_VARIABLE)
    if not run_dir:
        return no_report
    folder = Path(run_dir) / "progress"
    folder.mkdir(parents=True, exist_ok=True)
    started = time.time()
    last = [0.0]

    def report(completed: float, total: float, message: str) -> None:
        now = time.time()
        if now - last[0] < interval_s and completed < total:
            return
        last[0] = now
        state = StepProgress(step, completed, total, message, started, now)
        staging = folder / f".{step}.{os.getpid()}"
        staging.write_text(json.dumps(asdict(state)))
        staging.replace(folder / f"{step}.json")

    return report


def read_progress(run_dir: Path) -> dict[str, StepProgress]:
    """The latest state of each step of a run that reported any; half-written or foreign files are passed over."""
    states: dict[str, StepProgress] = {}
    for path in sorted((run_dir / "progress").glob("*.json")):
        try:
            states[path.stem] = StepProgress(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            continue
    return states
