"""Where production traces live: read them by window, write what users say about them. One protocol, one truth.

Feedback is untrusted input: whoever can reach the store can post it. It is kept with its author and weighed later,
in the curation.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from sluice.curation.records import TraceRecord
from sluice.infra.errors import InputError, UnavailableError
from sluice.infra.progress import Report, no_report

if TYPE_CHECKING:
    from sluice.infra.settings import Settings


class TraceMissing(UnavailableError):
    """The store knows no trace with this id (not exported yet, or deleted)."""


@dataclass(frozen=True)
class Window:
    """Traces that began in [since_ms, until_ms), milliseconds since the epoch."""

    since_ms: int
    until_ms: int

    def __post_init__(self) -> None:
        if self.since_ms > self.until_ms:
            raise InputError(f"The window since {as_utc(self.since_ms)} until {as_utc(self.until_ms)} is reversed.")


class TraceStore(Protocol):
    """Safe to share between threads. Every method raises `UnavailableError` when the store does not answer."""

    def traces(self, window: Window) -> Iterator[TraceRecord]:
        """Each trace of the window once, oldest first, scores included; half-written ones with `ended_ms` None."""

    def traces_by_id(self, ids: Sequence[str]) -> Iterator[TraceRecord]:
        """The traces with these ids that still exist, in no particular order."""

    def exists(self, ids: Sequence[str]) -> frozenset[str]:
        """Those of the ids that are still there."""

    def add_thumb(self, trace_id: str, up: bool, user: str) -> None:
        """Record a user's thumb; a second one of the same user replaces the first. Raises `TraceMissing`."""

    def add_correction(self, trace_id: str, text: str, user: str) -> None:
        """Record the answer that a user says was right. Raises `TraceMissing`."""

    def answers_of(self, release: str, since_ms: int, *, known: Container[str] = ()) -> Iterator[TraceRecord]:
        """Traces of answers that `release` gave since then, in no particular order; of those in `known`, which were
        read before, only id, time, release and scores are told."""


@dataclass(frozen=True)
class Feedback:
    """What one user says of one trace: a thumb, a correction, or both."""

    trace_id: str
    user: str
    up: bool | None = None
    correction: str = ""


@dataclass(frozen=True)
class FeedbackWritten:
    """Counts of a bulk write; `missing` are the ids of traces that the store does not know."""

    thumbs: int
    corrections: int
    missing: tuple[str, ...]


def add_feedback(
    store: TraceStore, items: Iterable[Feedback], *, threads: int = 4, report: Report = no_report
) -> FeedbackWritten:
    """Write many at once, `threads` calls under way. A trace that is gone is counted; any other failure raises."""
    todo = list(items)

    def write(item: Feedback) -> bool:
        try:
            if item.up is not None:
                store.add_thumb(item.trace_id, item.up, item.user)
            if item.correction:
                store.add_correction(item.trace_id, item.correction, item.user)
        except TraceMissing:
            return False
        return True

    thumbs, corrections, missing = 0, 0, []
    with ThreadPoolExecutor(max_workers=threads) as pool:
        for done, (item, written) in enumerate(zip(todo, pool.map(write, todo), strict=True), start=1):
            if written:
                thumbs += item.up is not None
                corrections += bool(item.correction)
            else:
                missing.append(item.trace_id)
            report(done, len(todo), f"feedback on {done} of {len(todo)} answers")
    return FeedbackWritten(thumbs, corrections, tuple(missing))


def now_ms() -> int:
    """The time, whole milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


def as_utc(milliseconds: int) -> str:
    """ISO 8601 in UTC, to the millisecond: `2026-11-21T10:00:00.123Z`."""
    moment = datetime.fromtimestamp(milliseconds // 1000, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{milliseconds % 1000:03d}Z"


def open_trace_store(settings: Settings) -> TraceStore:
    """The trace store that the settings name."""
    if settings.traces.backend == "mlflow":
        from sluice.curation.mlflow_traces import MlflowTraceStore

        return MlflowTraceStore(settings.mlflow.tracking_uri, settings.traces.experiment)
    raise InputError(
        f"Setting traces.backend = {settings.traces.backend!r}: traces can be sent to it, but not read from it yet.",
        hint="Set traces.backend to mlflow to harvest and to record feedback.",
    )
