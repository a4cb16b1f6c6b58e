from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sluice.curation.harvest import GIVE_UP_AFTER_MS, Watermark, harvest, read_summary, write_harvest
from sluice.curation.records import read_records
from sluice.curation.trace_store import Feedback, Window, add_feedback
from sluice.infra.errors import InputError, IntegrityError
from tests.curation.traces import START, ListTraceStore, make_record, thumb, trace_id

ALL = Window(0, START + 10_000_000)


def test_a_window_holds_its_start_and_not_its_end(tmp_path: Path) -> None:
    store = ListTraceStore([make_record(n) for n in (5, 3, 4, 1, 2)])
    found = harvest(store, Window(START + 2000, START + 4000), as_of_ms=START + 99_000, settle_s=2)
    assert [r.id for r in found.records] == [trace_id(2), trace_id(3)]
    write_harvest(found, tmp_path)
    assert tuple(read_records(tmp_path / "records.jsonl")) == found.records
    assert read_summary(tmp_path)["counts"]["records"] == 2


def test_the_same_moment_gives_the_same_records_whatever_was_said_since() -> None:
    store = ListTraceStore([thumb(make_record(n), True) for n in range(4)])
    first = harvest(store, ALL, as_of_ms=START + 50_000, settle_s=2)
    store.records = [thumb(r, False, after_ms=60_000) for r in reversed(store.records)]
    again = harvest(store, ALL, as_of_ms=START + 50_000, settle_s=2)
    assert again == first
    later = harvest(store, ALL, as_of_ms=START + 90_000, settle_s=2)
    assert later.counts.scores == 8


def test_half_written_and_unsettled_traces_are_left_and_found_by_the_next_pass() -> None:
    whole, half, fresh = make_record(1), replace(make_record(2), ended_ms=None), make_record(3)
    slow = replace(make_record(4), ended_ms=START + 30_000)
    store = ListTraceStore([whole, half, fresh, slow])
    # As of 4.9 s with 2 s to settle: the third has begun (3.0 s), but too late for this window.
    first = harvest(store, ALL, as_of_ms=START + 4900, settle_s=2)
    assert [r.id for r in first.records] == [whole.id]
    assert first.counts.unfinished == 1
    assert first.watermark.pending == (half.id,)
    assert first.window.until_ms == START + 2900

    store.records[1] = make_record(2)
    second = harvest(store, ALL, as_of_ms=START + 20_000, settle_s=2, previous=first.watermark)
    assert [r.id for r in second.records] == [half.id, fresh.id]
    assert (second.counts.recovered, second.counts.unsettled, second.counts.late) == (1, 1, 0)
    third = harvest(store, ALL, as_of_ms=START + 40_000, settle_s=2, previous=second.watermark)
    assert [r.id for r in third.records] == [slow.id]
    assert third.watermark.pending == ()
    assert harvest(store, ALL, as_of_ms=START + 50_000, settle_s=2, previous=third.watermark).records == ()


def test_a_span_that_arrives_behind_the_watermark_is_found_once() -> None:
    store = ListTraceStore([make_record(n) for n in (1, 3)])
    first = harvest(store, ALL, as_of_ms=START + 10_000, settle_s=2)
    store.records.append(make_record(2))
    # Through JSON and back, as it is stored.
    stored = Watermark.from_json(json.loads(json.dumps(first.watermark.to_json())))
    second = harvest(store, ALL, as_of_ms=START + 20_000, settle_s=2, previous=stored)
    assert [r.id for r in second.records] == [trace_id(2)]
    assert second.counts.late == 1
    assert harvest(store, ALL, as_of_ms=START + 30_000, settle_s=2, previous=second.watermark).records == ()


def test_a_trace_whose_process_died_is_given_up_after_a_day() -> None:
    store = ListTraceStore([replace(make_record(1), ended_ms=None)])
    as_of = START + GIVE_UP_AFTER_MS
    assert harvest(store, ALL, as_of_ms=as_of, settle_s=0).counts.unfinished == 1
    late = harvest(store, ALL, as_of_ms=as_of + 2000, settle_s=0)
    assert (late.counts.abandoned, late.counts.unfinished, late.watermark.pending) == (1, 0, ())


def test_wrong_windows_and_watermarks_are_refused() -> None:
    with pytest.raises(InputError, match="reversed"):
        Window(2, 1)
    with pytest.raises(InputError, match="settle_s"):
        harvest(ListTraceStore([]), ALL, as_of_ms=START, settle_s=-1)
    with pytest.raises(IntegrityError, match="watermark"):
        Watermark.from_json({"until_ms": "x", "pending": [], "recent": {}})


def test_bulk_feedback_counts_what_it_could_not_attach() -> None:
    store = ListTraceStore([make_record(1), make_record(2)])
    items = [
        Feedback(trace_id(1), "a", up=True),
        Feedback(trace_id(2), "a", up=False, correction="Better."),
        Feedback(trace_id(9), "a", up=True),
    ]
    done: list[float] = []

    def report(completed: float, total: float, message: str) -> None:
        done.append(completed)

    written = add_feedback(store, items, threads=2, report=report)
    assert (written.thumbs, written.corrections, written.missing) == (2, 1, (trace_id(9),))
    assert done == [1, 2, 3]
    assert [len(r.scores) for r in store.records] == [1, 2]
