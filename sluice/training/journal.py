"""What a training run says of itself, line by line, in its work folder: the one thing that processes, launcher,
terminal, MLflow and report read. Lines are appended and flushed at once, so kill -9 loses none that was written whole.

    metrics.jsonl      a `StepMetrics` for each optimizer step; a step done twice has two lines, the later one counts
    validation.jsonl   a `Validation` for each pass over the validation examples
    samples.jsonl      a `Sample` for each answer generated on the way
    events.jsonl       an `Event` for everything worth a sentence: resumed, saved, damaged, guard, restarted, stopped
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from sluice.provenance.canonical import Json


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, counted from 1. `loss` is the mean per answer token over all processes.

    `tokens` are all but padding, `label_tokens` those with a loss; both of the whole step. `seconds` is its wall time,
    `mfu` the share (0 to 1) of the accelerators' peak or None where that is not known, `memory_gib` the peak of the
    fullest accelerator (of process 0's resident set without one). `skipped` names the guard that dropped the update.
    """

    FILE: ClassVar[str] = "metrics.jsonl"

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    label_tokens: int
    seconds: float
    memory_gib: float
    mfu: float | None = None
    skipped: str | None = None
    attempt: int = 0
    time: float = field(default_factory=time.time)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Validation:
    """The mean loss per answer token over the validation examples after a step."""

    FILE: ClassVar[str] = "validation.jsonl"

    step: int
    loss: float
    time: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Sample:
    """What the model answered (greedily) to one fixed prompt after a step, and the dataset's answer."""

    FILE: ClassVar[str] = "samples.jsonl"

    step: int
    number: int
    prompt: str
    text: str
    reference: str
    time: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Event:
    """Something that people want to know, as a sentence. `kind` is one of `KINDS`; `level` info, warning or error."""

    FILE: ClassVar[str] = "events.jsonl"

    kind: str
    sentence: str
    step: int = 0
    level: str = "info"
    details: dict[str, Json] = field(default_factory=dict)
    attempt: int = 0
    time: float = field(default_factory=time.time)


KINDS = (
    "launched",  # processes are asked for: time is paid from here
    "started",  # an attempt begins, at step 0 or where `resumed` says
    "resumed",
    "checkpoint",  # saved and verified
    "checkpoint_failed",  # could not be saved; training goes on
    "checkpoint_damaged",  # found damaged and set aside
    "uploaded",
    "upload_failed",
    "guard",  # details: guard, action
    "slow_rank",
    "dead_rank",
    "hang",
    "notice",  # SIGTERM came
    "interrupted",  # saved after a notice: run again to go on
    "stopped",  # ended by a guard or a budget
    "finished",
)

Line = StepMetrics | Validation | Sample | Event
LINES: tuple[type[Line], ...] = (StepMetrics, Validation, Sample, Event)
Kind = TypeVar("Kind", StepMetrics, Validation, Sample, Event)


class Observer(Protocol):
    """Somebody who is told every line soon after it was written, in the order of each file."""

    def see(self, lines: Iterable[Line]) -> None: ...


class Journal:
    """Writes and reads the lines of one work folder."""

    def __init__(self, work_dir: Path) -> None:
        self._folder = work_dir

    def write(self, line: Line) -> None:
        """Append one line. Process 0 writes steps, validations and samples; whoever knows it writes an event.

        A line is one `write` of an append-only file, so writers do not mix; NaN and infinities are spelled as JSON
        with Python's names.
        """
        path = self._folder / line.FILE
        with path.open("ab") as stream:
            stream.write(json.dumps(asdict(line)).encode() + b"\n")

    def read(self, kind: type[Kind]) -> list[Kind]:
        """All whole lines of one kind, in order."""
        return [kind(**_known(kind, record)) for record in _records(self._folder / kind.FILE, 0)[0]]

    def steps(self) -> list[StepMetrics]:
        """One line for each step in the order of steps: of a step done twice the later one counts."""
        latest = {line.step: line for line in self.read(StepMetrics)}
        return [latest[step] for step in sorted(latest)]

    def files(self) -> list[Path]:
        """The files that have lines."""
        return [path for kind in LINES if (path := self._folder / kind.FILE).is_file()]

    def restore(self, folder: Path) -> None:
        """Take over the files of a copy of this journal, where this one has none: the folder was lost and fetched."""
        for kind in LINES:
            copy, own = folder / kind.FILE, self._folder / kind.FILE
            if copy.is_file() and not own.exists():
                shutil.copyfile(copy, own)

    def end_lines(self) -> None:
        """Close lines that a kill cut in two, so that the next writer's first line stands alone."""
        for kind in LINES:
            path = self._folder / kind.FILE
            if path.is_file() and not path.read_bytes().endswith(b"\n"):
                with path.open("ab") as stream:
                    stream.write(b"\n")


class JournalReader:
    """Follows a journal: each call of `new` gives what was written since the one before."""

    def __init__(self, work_dir: Path, *, from_end: bool = False) -> None:
        self._folder = work_dir
        self._positions = {
            kind.FILE: (work_dir / kind.FILE).stat().st_size if from_end and (work_dir / kind.FILE).exists() else 0
            for kind in LINES
        }

    def new(self) -> list[Line]:
        """Lines since the last call, oldest first (by their time)."""
        found: list[Line] = []
        for kind in LINES:
            records, self._positions[kind.FILE] = _records(self._folder / kind.FILE, self._positions[kind.FILE])
            found.extend(kind(**_known(kind, record)) for record in records)
        return sorted(found, key=lambda line: line.time)


def _records(path: Path, position: int) -> tuple[list[dict[str, Any]], int]:
    """Whole JSON lines of `path` after byte `position`, and the position after them. No file is no lines."""
    try:
        with path.open("rb") as stream:
            stream.seek(position)
            data = stream.read()
    except FileNotFoundError:
        return [], position
    end = data.rfind(b"\n") + 1
    records = []
    for text in data[:end].splitlines():
        # A line that a kill cut in two is passed over; its step is done again from the checkpoint.
        try:
            record = json.loads(text)
        except ValueError:
            continue
        if isinstance(record, dict) and record:
            records.append(record)
    return records, position + end


def _known(kind: type[Line], record: dict[str, Any]) -> dict[str, Any]:
    names = {one.name for one in fields(kind)}
    return {name: value for name, value in record.items() if name in names}
