"""Read a window of the trace store, once and exactly, into records.

A trace belongs to the window that its first moment falls in. Everything is as of one moment, `as_of_ms`: scores that
came later are left out, so the same window harvested again as of the same moment gives the same records, however much
was said since (but for traces deleted or arrived meanwhile). A trace that is not settled yet (root span missing, or it
ended less than `settle_s` ago) is left for the next pass: the watermark names it, and the next pass asks for it by id.

A span arrives when its request has *ended*, with the time of its start: a request that was under way during a harvest
turns up behind the watermark. So each pass reads the last `OVERLAP_MS` again and passes over the ids it knows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from sluice.curation.records import TraceRecord, write_records
from sluice.curation.trace_store import TraceStore, Window, as_utc
from sluice.infra.errors import InputError, IntegrityError
from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import Json, canonical_json

RECORDS_FILE = "records.jsonl"
HARVEST_FILE = "harvest.json"

GIVE_UP_AFTER_MS = 24 * 3600 * 1000
"""A trace whose root is still missing a day later never gets one: its process died. It is counted as abandoned."""

OVERLAP_MS = 15 * 60 * 1000
"""How late a span may arrive and still be found: longer than any request plus the emission's delay and retries."""


@dataclass(frozen=True)
class Watermark:
    """How far a harvest came: all before `until_ms` is read, except the traces `pending`, which were half written.

    `recent` are the harvested traces that the next pass will meet again in its overlap: start (ms) by id.
    """

    until_ms: int
    pending: tuple[str, ...] = ()
    recent: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> Json:
        return {"until_ms": self.until_ms, "pending": list(self.pending), "recent": dict(self.recent)}

    @classmethod
    def from_json(cls, value: Mapping[str, Json]) -> Watermark:
        try:
            pending = tuple(str(trace_id) for trace_id in value["pending"])
            recent = {str(trace_id): int(started) for trace_id, started in value["recent"].items()}
            return cls(int(value["until_ms"]), pending, recent)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise IntegrityError(f"This is not a harvest's watermark: {value!r}.") from error


@dataclass(frozen=True)
class HarvestCounts:
    """New traces = `records` + `unfinished` + `unsettled` + `abandoned`.

    Of the records, `recovered` had been left by an earlier pass and `late` arrived behind its watermark.
    """

    records: int
    unfinished: int
    unsettled: int
    abandoned: int
    recovered: int
    late: int
    scores: int


@dataclass(frozen=True)
class Harvest:
    """Records in the order (start, id), what was left, and where the next pass goes on."""

    records: tuple[TraceRecord, ...]
    window: Window
    as_of_ms: int
    counts: HarvestCounts
    watermark: Watermark

    def summary(self) -> Json:
        """What is written beside the records: window, counts, watermark. JSON, and free of the time of writing."""
        return {
            "since": as_utc(self.window.since_ms),
            "until": as_utc(self.window.until_ms),
            "as_of": as_utc(self.as_of_ms),
            "counts": asdict(self.counts),
            "watermark": self.watermark.to_json(),
        }


def harvest(
    store: TraceStore,
    window: Window,
    *,
    as_of_ms: int,
    settle_s: float,
    previous: Watermark | None = None,
    report: Report = no_report,
) -> Harvest:
    """Read `window`, and what `previous` left. The upper end is pulled back to what has settled by `as_of_ms`.

    With `previous` the window's start is the watermark's, so that passes neither overlap nor leave a gap. Nothing is
    written: a caller that stores the records together with the watermark can be killed at any moment.
    """
    if settle_s < 0:
        raise InputError(f"settle_s = {settle_s!r} is negative.")
    quiet_ms = as_of_ms - int(settle_s * 1000)
    since_ms = previous.until_ms if previous else window.since_ms
    covered = Window(since_ms, max(since_ms, min(window.until_ms, quiet_ms)))
    kept: dict[str, TraceRecord] = {}
    pending: list[str] = []
    recent = dict(previous.recent) if previous else {}
    unfinished = unsettled = abandoned = recovered = late = 0

    def take(record: TraceRecord) -> bool:
        nonlocal unfinished, unsettled, abandoned
        if record.ended_ms is None:
            if record.started_ms < as_of_ms - GIVE_UP_AFTER_MS:
                abandoned += 1
                return False
            unfinished += 1
        elif record.ended_ms > quiet_ms:
            unsettled += 1
        else:
            known = tuple(score for score in record.scores if score.created_ms <= as_of_ms)
            kept[record.id] = replace(record, scores=known)
            return True
        pending.append(record.id)
        return False

    for record in store.traces_by_id(previous.pending) if previous and previous.pending else ():
        recovered += take(record)
    overlapped = Window(max(0, since_ms - OVERLAP_MS), covered.until_ms) if previous else covered
    for number, record in enumerate(store.traces(overlapped), start=1):
        if record.id not in kept and record.id not in pending and record.id not in recent:
            late += take(record) and record.started_ms < since_ms
        report(number, 0, f"{number} traces read")

    records = tuple(sorted(kept.values(), key=lambda r: (r.started_ms, r.id)))
    counts = HarvestCounts(
        records=len(records),
        unfinished=unfinished,
        unsettled=unsettled,
        abandoned=abandoned,
        recovered=recovered,
        late=late,
        scores=sum(len(record.scores) for record in records),
    )
    report(len(records), len(records), f"{len(records)} traces harvested")
    recent |= {record.id: record.started_ms for record in records}
    met_again = {i: started for i, started in recent.items() if started >= covered.until_ms - OVERLAP_MS}
    watermark = Watermark(covered.until_ms, tuple(sorted(pending)), met_again)
    return Harvest(records, covered, as_of_ms, counts, watermark)


def write_harvest(harvested: Harvest, folder: Path) -> None:
    """records.jsonl and harvest.json: the files of a `records` artifact."""
    folder.mkdir(parents=True, exist_ok=True)
    write_records(harvested.records, folder / RECORDS_FILE)
    (folder / HARVEST_FILE).write_bytes(canonical_json(harvested.summary()) + b"\n")


def read_summary(folder: Path) -> Json:
    """What `write_harvest` said about the records in `folder`. Raises `IntegrityError` when it cannot be read."""
    try:
        return json.loads((folder / HARVEST_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{folder / HARVEST_FILE} is not the summary of a harvest: {error}.") from error
