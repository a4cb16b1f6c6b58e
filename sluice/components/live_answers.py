"""What the answers of two releases were worth, from the trace store: refusals, JSON, tool calls, thumbs, judges, cost.

The store is read by a thread of its own, so that a slow or dead one never holds up a rollout: what it told last is
handed out at once, and when that is too old every metric from here is `missing`, which is never a pass.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sluice.curation.records import THUMB, Score, TraceRecord
from sluice.curation.trace_store import TraceStore
from sluice.evaluation.json_answers import json_valid
from sluice.evaluation.outcomes import Answer
from sluice.evaluation.tool_calls import calls_valid
from sluice.infra.errors import SluiceError
from sluice.serving.metrics import LIVE_METRICS
from sluice.serving.observations import Observed, Sample

TRACE_METRICS = tuple(name for name, metric in LIVE_METRICS.items() if metric.source == "traces")
_RECENT_S = 60.0
"""Traces begun within this time are looked at in every pass; older ones only for late thumbs, in a full pass."""
_SHARE = 20
"""A full pass is made when this many times its own duration has gone by: reading takes 5% of the time at most."""


@dataclass(frozen=True)
class Prices:
    """Price of a million tokens, in any currency: releases are compared by its ratio."""

    input: float = 1.0
    output: float = 4.0


class LiveAnswers:
    """`SampleSource` of one rollout over a trace store. Reading begins with the first look; close it at the end.

    `judge` is the name of the scores, 0 to 1, that a judge writes to traces: scores of others are never mixed in.
    """

    def __init__(
        self,
        store: TraceStore,
        *,
        judge: str = "judge",
        prices: Prices = Prices(),
        pause_s: float = 1.0,
        stale_s: float = 30.0,
    ) -> None:
        self._store = store
        self._judge = judge
        self._prices = prices
        self._pause_s = pause_s
        self._stale_s = stale_s
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._reader: threading.Thread | None = None
        self._history: list[Sample] = []
        self._samples: list[Sample] = []
        self._read: dict[str, str] = {}  # the session of every answer that was read, by its trace
        self._scored: set[str] = set()
        self._told: float | None = None
        self._cause = "nothing was read yet"
        self._begun = 0.0

    def close(self) -> None:
        """Stop reading. A call that the store holds up ends by itself."""
        self._end.set()

    def observe(self, canary: str, stable: str, since: float, until: float) -> Observed:
        """See `SampleSource`. The first call's `since` is where reading begins."""
        with self._lock:
            if self._reader is None:
                self._begun = time.monotonic()
                self._reader = threading.Thread(
                    target=self._follow, args=((canary, stable), since), name="live-answers", daemon=True
                )
                self._reader.start()
            # What arrived late became known when it arrived: each is handed out once, in the first window after that,
            # whatever the clocks of the store and of this machine say. What the first pass found was there before
            # anybody looked: a rollout that goes on counts it for the steps in which it happened.
            due = [replace(one, known=min(one.known, until)) for one in self._history]
            due += [replace(one, known=min(max(one.known, since), until)) for one in self._samples]
            self._history, self._samples = [], []
            age = time.monotonic() - (self._begun if self._told is None else self._told)
            cause = self._cause
        missing = {}
        if age > self._stale_s:
            sentence = f"The trace store has told nothing for {age:.0f} s: {cause}"
            missing = dict.fromkeys(TRACE_METRICS, sentence)
        return Observed(tuple(sorted(due, key=lambda sample: sample.known)), missing=missing)

    def _follow(self, releases: tuple[str, str], since: float) -> None:
        full_at = 0.0
        while not self._end.is_set():
            begun = time.monotonic()
            full = begun >= full_at
            try:
                self._pass(releases, since if full else max(since, time.time() - _RECENT_S))
                with self._lock:
                    self._told, self._cause = time.monotonic(), "no answer yet."
            except SluiceError as error:
                with self._lock:
                    self._cause = error.message
            except Exception as error:  # noqa: BLE001 - a thread that died silently would look like silence
                with self._lock:
                    self._cause = f"{type(error).__name__}: {error}"
            if full:
                full_at = time.monotonic() + _SHARE * (time.monotonic() - begun)
            self._end.wait(self._pause_s)

    def _pass(self, releases: tuple[str, str], since: float) -> None:
        """Both releases' answers are handed out together and in the order of time, so that those of the same moment
        can be compared."""
        found: list[Sample] = []
        try:
            for release in releases:
                for record in self._store.answers_of(release, int(since * 1000), known=self._read):
                    found += self._new(record)
        finally:
            found.sort(key=lambda sample: sample.known)
            with self._lock:
                if self._told is None:
                    self._history += found
                else:
                    self._samples += found

    def _new(self, record: TraceRecord) -> Iterator[Sample]:
        if record.finished and record.id not in self._read:
            self._read[record.id] = record.session
            if record.status == "ok":
                for metric, value, detail in values_of(record, self._prices):
                    assert record.ended_ms is not None
                    yield Sample(
                        metric, record.release, value, record.ended_ms / 1000, record.id, record.session, detail
                    )
        # A thumb comes with its trace's id alone when the trace was read before.
        session = record.session or self._read.get(record.id, "")
        for score in record.scores:
            if score.id not in self._scored and (said := judged(score, self._judge)):
                self._scored.add(score.id)
                metric, value, detail = said
                yield Sample(metric, record.release, value, score.created_ms / 1000, record.id, session, detail)


def values_of(record: TraceRecord, prices: Prices) -> Iterator[tuple[str, float, str]]:
    """(metric, value, what is bad about it) of one whole answer; a metric that does not apply is left out."""
    answer = Answer(
        record.id, record.answer, record.finish_reason or None, record.input_tokens, record.output_tokens, None, 0.0,
        tool_calls=tuple(_objects(record.tool_calls)),
    )  # fmt: skip
    refused = answer.outcome == "refused"
    yield "refusals", float(refused), "refused to answer" if refused else ""
    if record.output_type == "json":
        valid = json_valid(record.answer)
        yield "invalid_json", 1 - valid, "" if valid else "is not the JSON that was asked for"
    if record.tools and answer.tool_calls:
        wrong = calls_valid(answer.tool_calls, _objects(record.tools))
        yield "invalid_tool_calls", float(bool(wrong)), wrong
    if record.input_tokens is not None and record.output_tokens is not None:
        cost = (record.input_tokens * prices.input + record.output_tokens * prices.output) / 1e6
        if cost > 0:
            yield "cost_per_request", cost, ""


def judged(score: Score, judge: str) -> tuple[str, float, str] | None:
    """(metric, value, what is bad about it) of a user's thumb or of this judge's score; None for anything else."""
    if score.name == THUMB and score.source == "user" and isinstance(score.value, bool):
        return "thumbs_down", float(not score.value), "" if score.value else "thumb down"
    if score.name == judge and score.source == "judge" and isinstance(score.value, bool | int | float):
        return "judge_score", float(score.value), ""
    return None


def _objects(text: str) -> list[dict[str, object]]:
    try:
        found = json.loads(text) if text else []
    except ValueError:
        return []
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
