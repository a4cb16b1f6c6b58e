from __future__ import annotations

import json
import time
from collections.abc import Container, Iterator
from dataclasses import replace

import pytest

from sluice.components.live_answers import TRACE_METRICS, LiveAnswers, Prices, values_of
from sluice.curation.records import Score, TraceRecord
from sluice.infra.errors import UnavailableError
from sluice.serving.observations import Observed, Sample
from sluice.serving.sources import BothSources
from tests.curation.traces import START, ListTraceStore, make_record, thumb

CANARY, STABLE = "sha256:" + "c" * 64, "sha256:" + "a" * 64
BEGUN = START / 1000
LATE = BEGUN + 10_000
BOOKED = '[{"name": "book", "arguments": {"day": 1}}]'
UNBOOKED = '[{"name": "book", "arguments": "{}"}]'
TOOLS = json.dumps(
    [{"type": "function", "function": {"name": "book", "parameters": {"type": "object", "required": ["day"]}}}]
)


def of(release: str, number: int, answer: str = "", **fields: object) -> TraceRecord:
    return replace(make_record(number, answer=answer), release=release, **fields)  # type: ignore[arg-type]


class Slow(ListTraceStore):
    """A store that can stop answering, or break in the middle of telling."""

    down = False
    breaks_after = 1 << 30

    def answers_of(self, release: str, since_ms: int, *, known: Container[str] = ()) -> Iterator[TraceRecord]:
        for number, record in enumerate(super().answers_of(release, since_ms, known=known)):
            if self.down or number >= self.breaks_after:
                raise UnavailableError("MLflow does not answer.")
            yield record
        if self.down:
            raise UnavailableError("MLflow does not answer.")


class Windows:
    """Looks at a source window by window, as a rollout does, each beginning where the one before ended."""

    def __init__(self, source: LiveAnswers) -> None:
        self.source = source
        self.until = LATE

    def look(self) -> Observed:
        since, self.until = self.until, self.until + 1
        return self.source.observe(CANARY, STABLE, BEGUN if since == LATE else since, self.until)

    def until_told(self, count: int) -> list[Sample]:
        found: list[Sample] = []
        deadline = time.monotonic() + 5
        while len(found) < count and time.monotonic() < deadline:
            found += self.look().samples
            time.sleep(0.01)
        return found


def test_what_answers_were_worth_is_told_once_by_release() -> None:
    store = Slow(
        [
            of(CANARY, 1, "I'm sorry, but I cannot help with that."),
            thumb(of(STABLE, 2, "It covers the building."), up=False, user="u"),
            of("sha256:" + "b" * 64, 3, "Of another release."),
        ]
    )
    source = LiveAnswers(store, pause_s=0.01)
    windows = Windows(source)
    found = windows.until_told(3)
    assert [(s.metric, s.release, s.value) for s in sorted(found, key=lambda s: s.metric)] == [
        ("refusals", CANARY, 1.0),
        ("refusals", STABLE, 0.0),
        ("thumbs_down", STABLE, 1.0),
    ]
    assert {s.request_id for s in found} == {"0" * 31 + "1", "0" * 31 + "2"}
    # Another's thumb on a trace that was read long ago is found; what was told is not told again.
    store.records[0] = thumb(store.records[0], up=True, user="later")
    before = windows.until
    later = windows.until_told(1)
    assert [(s.metric, s.release, s.value) for s in later] == [("thumbs_down", CANARY, 0.0)]
    assert later[0].session == store.records[0].session != ""
    # It became known after the window that was looked at last, and so belongs to the next.
    assert later[0].known >= before
    time.sleep(0.05)
    assert windows.look().samples == ()
    source.close()


def test_a_store_that_breaks_loses_nothing_and_a_dead_one_is_missing() -> None:
    store = Slow([of(CANARY, number) for number in range(5)])
    store.breaks_after = 3
    source = LiveAnswers(store, pause_s=0.01, stale_s=0.3)
    windows = Windows(source)
    assert len(windows.until_told(3)) == 3
    deadline = time.monotonic() + 5
    missing = dict(windows.look().missing)
    while not missing and time.monotonic() < deadline:
        time.sleep(0.02)
        missing = dict(windows.look().missing)
    assert set(missing) == set(TRACE_METRICS)
    assert "MLflow does not answer" in missing["thumbs_down"]
    store.breaks_after = 1 << 30
    assert len(windows.until_told(2)) == 2
    assert not windows.look().missing
    source.close()


@pytest.mark.parametrize(
    ("record", "metric", "value", "detail"),
    [
        (of(CANARY, 1, "{}", output_type="json"), "invalid_json", 0.0, ""),
        (of(CANARY, 1, "Sure! {}", output_type="json"), "invalid_json", 1.0, "not the JSON"),
        (of(CANARY, 1, tools=TOOLS, tool_calls=BOOKED), "invalid_tool_calls", 0.0, ""),
        (of(CANARY, 1, tools=TOOLS, tool_calls=UNBOOKED), "invalid_tool_calls", 1.0, "schema"),
        (of(CANARY, 1, tools=TOOLS, tool_calls='[{"name": "fly", "arguments": {}}]'), "invalid_tool_calls", 1.0, "fly"),
        (of(CANARY, 1, input_tokens=1000, output_tokens=100), "cost_per_request", 0.0014, ""),
    ],
)  # fmt: skip
def test_values_of_an_answer(record: TraceRecord, metric: str, value: float, detail: str) -> None:
    found = {name: (number, why) for name, number, why in values_of(record, Prices())}
    assert found[metric][0] == pytest.approx(value)
    assert detail in found[metric][1]


def test_what_does_not_apply_is_left_out_and_only_the_named_judge_counts() -> None:
    assert [name for name, _, _ in values_of(of(CANARY, 1, "Fine."), Prices())] == ["refusals"]
    scores = (Score("1", "judge", 0.75, "judge", "m", START), Score("2", "other", 0.1, "judge", "m", START))
    source = LiveAnswers(Slow([of(CANARY, 1, scores=scores)]), pause_s=0.01)
    assert [s.value for s in Windows(source).until_told(2) if s.metric == "judge_score"] == [0.75]
    source.close()


def test_both_sources_are_one_stream_in_the_order_of_knowing() -> None:
    class Fixed:
        def __init__(self, *known: float, missing: str = "") -> None:
            self._seen = Observed(
                tuple(Sample("error_rate", CANARY, 0, one) for one in known),
                active={CANARY: len(known)},
                missing={missing: "why"} if missing else {},
            )

        def observe(self, canary: str, stable: str, since: float, until: float) -> Observed:
            return self._seen

    both = BothSources(Fixed(1, 4, missing="a"), Fixed(2, 3, 5, missing="b")).observe(CANARY, STABLE, 0, 9)
    assert [sample.known for sample in both.samples] == [1, 2, 3, 4, 5]
    assert (both.active, set(both.missing)) == ({CANARY: 2}, {"a", "b"})


def test_a_rollout_that_goes_on_compares_what_it_missed_moment_by_moment() -> None:
    store = Slow([of((STABLE, CANARY)[number % 2], number) for number in range(80)])
    source = LiveAnswers(store, pause_s=0.01)
    windows = Windows(source)
    found = [one for one in windows.until_told(80) if one.metric == "refusals"]
    source.close()
    # In the order of time, and at the times: they belong to the steps in which they happened.
    assert [one.known for one in found] == sorted(one.known for one in found)
    assert found[-1].known < LATE
    assert [one.release for one in found] == [STABLE, CANARY] * 40
