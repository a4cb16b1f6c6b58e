"""The trace store over MLflow tracing: thumbs are Feedback, corrections are Expectations.

MLflow prefixes an OpenTelemetry trace id with `tr-`. A changed thumb is a second assessment and not an update of the
first, so that the history stays; the latest one of a user counts.
"""

from __future__ import annotations

import threading
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Literal

from sluice.curation.attributes import record_of_span
from sluice.curation.mlflow_rest import SPANS_PAGE, MlflowRefusal, MlflowTraceApi, milliseconds
from sluice.curation.records import CORRECTION, THUMB, Score, ScoreSource, TraceRecord
from sluice.curation.trace_store import TraceMissing, Window, as_utc, now_ms
from sluice.provenance.canonical import Json, require_digest

PREFIX = "tr-"
_SOURCES: dict[str, ScoreSource] = {"HUMAN": "user", "LLM_JUDGE": "judge", "AI_JUDGE": "judge"}
_ERROR_STATUS = (2, "STATUS_CODE_ERROR")


class MlflowTraceStore:
    """`TraceStore` over an MLflow server."""

    def __init__(self, tracking_uri: str | None, experiment: str) -> None:
        self._api = MlflowTraceApi(tracking_uri, experiment)
        self._clock_lock = threading.Lock()
        self._last_ms = 0

    def traces(self, window: Window) -> Iterator[TraceRecord]:
        condition = f"attributes.timestamp_ms >= {window.since_ms} AND attributes.timestamp_ms < {window.until_ms}"
        waiting: list[Json] = []
        for info in self._api.search(condition):
            waiting.append(info)
            if len(waiting) == SPANS_PAGE:
                yield from self._records(waiting)
                waiting = []
        yield from self._records(waiting)

    def traces_by_id(self, ids: Sequence[str]) -> Iterator[TraceRecord]:
        yield from self._records(self._api.batch_get_infos([PREFIX + trace_id for trace_id in ids]))

    def exists(self, ids: Sequence[str]) -> frozenset[str]:
        infos = self._api.batch_get_infos([PREFIX + trace_id for trace_id in ids])
        return frozenset(_plain_id(info) for info in infos)

    def add_thumb(self, trace_id: str, up: bool, user: str) -> None:
        self._assess(trace_id, THUMB, user, {"feedback": {"value": up}})

    def add_correction(self, trace_id: str, text: str, user: str) -> None:
        self._assess(trace_id, CORRECTION, user, {"expectation": {"value": text}})

    def answers_of(self, release: str, since_ms: int, *, known: Container[str] = ()) -> Iterator[TraceRecord]:
        require_digest(release, "release")
        condition = f"tags.`sluice.release` = '{release}' AND attributes.timestamp_ms >= {since_ms}"
        new: list[Json] = []
        for info in self._api.search(condition):
            if _plain_id(info) not in known:
                new.append(info)
                continue
            started = milliseconds(info["request_time"])
            yield TraceRecord(_plain_id(info), started, started, release=release, scores=_scores(info))
        for first in range(0, len(new), SPANS_PAGE):
            yield from self._records(new[first : first + SPANS_PAGE])

    def _records(self, infos: Sequence[Json]) -> Iterator[TraceRecord]:
        """Records in the order of `infos`; a trace whose root is missing has `ended_ms` None."""
        finished = [info["trace_id"] for info in infos if info.get("state") in ("OK", "ERROR")]
        whole = {trace["trace_info"]["trace_id"]: trace for trace in self._api.batch_get(finished)}
        for info in infos:
            trace = whole.get(info["trace_id"])
            root = _root(trace.get("spans", [])) if trace else None
            if trace is None or root is None:
                yield TraceRecord(
                    id=_plain_id(info),
                    started_ms=milliseconds(info["request_time"]),
                    ended_ms=None,
                    scores=_scores(info),
                )
                continue
            status: Literal["ok", "error"] = "error" if root.get("status", {}).get("code") in _ERROR_STATUS else "ok"
            yield record_of_span(
                _plain_id(info),
                # The store's own time, which the window was asked by, so that windows neither overlap nor gap.
                milliseconds(info["request_time"]),
                int(root["end_time_unix_nano"]) // 1_000_000,
                status,
                {entry["key"]: _value(entry.get("value", {})) for entry in root.get("attributes", [])},
                _scores(trace["trace_info"]),
            )

    def _assess(self, trace_id: str, name: str, user: str, value: Mapping[str, Json]) -> None:
        moment = as_utc(self._next_ms())
        assessment = {
            "assessment_name": name,
            "source": {"source_type": "HUMAN", "source_id": user},
            "create_time": moment,
            "last_update_time": moment,
            **value,
        }
        try:
            self._api.create_assessment(PREFIX + trace_id, assessment)
        except MlflowRefusal as error:
            if error.status == 404:
                raise TraceMissing(
                    f"MLflow knows no trace {trace_id}.", hint="Was it sent (flush the tracer), or deleted since?"
                ) from error
            raise

    def _next_ms(self) -> int:
        """Strictly rising, so that a thumb flipped within one millisecond still has a last state."""
        with self._clock_lock:
            self._last_ms = max(now_ms(), self._last_ms + 1)
            return self._last_ms


def _plain_id(info: Json) -> str:
    return str(info["trace_id"]).removeprefix(PREFIX)


def _root(spans: Sequence[Json]) -> Json | None:
    for span in spans:
        if not span.get("parent_span_id") and int(span.get("end_time_unix_nano") or 0) > 0:
            return span
    return None


def _scores(info: Json) -> tuple[Score, ...]:
    found = []
    for entry in info.get("assessments", []):
        # An assessment that MLflow marks invalid was overridden by a later one; a failed judge has an error, no value.
        holder = entry.get("feedback") or entry.get("expectation") or {}
        value = holder.get("value")
        if value is None and "serialized_value" in holder:
            value = holder["serialized_value"].get("value")
        if entry.get("valid") is False or not isinstance(value, bool | int | float | str):
            continue
        source = entry.get("source", {})
        found.append(
            Score(
                id=entry["assessment_id"],
                name=entry.get("assessment_name", ""),
                value=value,
                source=_SOURCES.get(source.get("source_type", ""), "code"),
                author=source.get("source_id", ""),
                created_ms=milliseconds(entry.get("last_update_time") or entry["create_time"]),
                comment=entry.get("rationale", ""),
            )
        )
    return tuple(sorted(found, key=lambda score: (score.created_ms, score.id)))


def _value(value: Json) -> Json:
    """The plain value of an OTLP AnyValue in protobuf's JSON form."""
    if "string_value" in value:
        return value["string_value"]
    if "bool_value" in value:
        return value["bool_value"]
    if "int_value" in value:
        return int(value["int_value"])
    if "double_value" in value:
        return float(value["double_value"])
    if "array_value" in value:
        return [_value(entry) for entry in value["array_value"].get("values", [])]
    if "kvlist_value" in value:
        return {entry["key"]: _value(entry.get("value", {})) for entry in value["kvlist_value"].get("values", [])}
    return None
