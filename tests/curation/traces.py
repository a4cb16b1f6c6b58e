"""Records as production makes them, and a trace store that lives in memory."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace

from sluice.curation.records import CORRECTION, THUMB, Message, Score, TraceRecord
from sluice.curation.trace_store import TraceMissing, Window

START = 1_790_000_000_000
SYSTEM = Message("system", "You answer questions about building in Sweden, using the context.")


def trace_id(number: int) -> str:
    return f"{number:032x}"


def make_record(number: int, question: str = "", answer: str = "", *, user: str = "", session: str = "") -> TraceRecord:
    question = question or f"What is rule number {number} about?"
    return TraceRecord(
        id=trace_id(number),
        started_ms=START + number * 1000,
        ended_ms=START + number * 1000 + 400,
        session=session or f"session-{number // 3}",
        user=user or f"user-{number % 5}",
        release="sha256:" + "a" * 64,
        model="assistant",
        prompt_version="faq-1",
        question=question,
        messages=(SYSTEM, Message("user", f"Context:\n- a\n- b\n\nQuestion: {question}")),
        answer=answer or f"Rule {number} covers building number {number}.",
        finish_reason="stop",
    )


def thumb(record: TraceRecord, up: bool, *, user: str = "u", after_ms: int = 1000, score_id: str = "") -> TraceRecord:
    number = len(record.scores)
    score = Score(score_id or f"{record.id}-{number}", THUMB, up, "user", user, record.started_ms + after_ms + number)
    return replace(record, scores=(*record.scores, score))


def correct(record: TraceRecord, text: str, *, user: str = "u", after_ms: int = 1000) -> TraceRecord:
    number = len(record.scores)
    score = Score(f"{record.id}-{number}", CORRECTION, text, "user", user, record.started_ms + after_ms + number)
    return replace(record, scores=(*record.scores, score))


class ListTraceStore:
    """A `TraceStore` over a list that tests change between passes."""

    def __init__(self, records: Sequence[TraceRecord]) -> None:
        self.records = list(records)

    def traces(self, window: Window) -> Iterator[TraceRecord]:
        inside = [r for r in self.records if window.since_ms <= r.started_ms < window.until_ms]
        yield from sorted(inside, key=lambda r: r.started_ms)

    def traces_by_id(self, ids: Sequence[str]) -> Iterator[TraceRecord]:
        yield from (r for r in self.records if r.id in ids)

    def exists(self, ids: Sequence[str]) -> frozenset[str]:
        return frozenset(ids) & {r.id for r in self.records}

    def add_thumb(self, trace_id: str, up: bool, user: str) -> None:
        self._change(trace_id, lambda record: thumb(record, up, user=user))

    def add_correction(self, trace_id: str, text: str, user: str) -> None:
        self._change(trace_id, lambda record: correct(record, text, user=user))

    def answers_of(self, release: str, since_ms: int, *, known: Container[str] = ()) -> Iterator[TraceRecord]:
        for record in self.traces(Window(since_ms, 1 << 60)):
            if record.release == release:
                bare = TraceRecord(record.id, record.started_ms, record.started_ms, release=release)
                yield replace(bare, scores=record.scores) if record.id in known else record

    def _change(self, trace_id: str, change: Callable[[TraceRecord], TraceRecord]) -> None:
        for number, record in enumerate(self.records):
            if record.id == trace_id:
                self.records[number] = change(record)
                return
        raise TraceMissing(f"no trace {trace_id}")
