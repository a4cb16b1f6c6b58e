"""Speed of two releases: the same release twice does not differ, a slower one does, whoever is asked first."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from sluice.evaluation.outcomes import Answer, Prompt, Sampling
from sluice.evaluation.scores import Scores
from sluice.evaluation.speed import SpeedScores, measure_speed, speed_scores
from sluice.evaluation.suite_sections import Speed
from sluice.infra.errors import InputError
from sluice.statistics.paired import Interval, bootstrap_mean
from tests.evaluation.chat_server import Reply, chat_server

WORDS = "a building permit takes about ten weeks"


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"i{n:02}", [{"role": "user", "content": f"question {n}"}]) for n in range(count)]


def measure(url: str, section: Speed, items: int = 48, **changes: Any) -> SpeedScores:
    given = {"candidate": "new", "champion": "old", "sampling": Sampling(), "timeout_s": 5.0, **changes}
    return measure_speed(prompts(items), base_url=url, section=section, **given)


def jitter(model: str, slower_s: float) -> Reply:
    """5 to 25 ms of waiting, as a busy server has; the candidate waits longer."""
    return Reply(WORDS, pause_s=random.uniform(0.005, 0.025) + (slower_s if model == "new" else 0.0))


def difference(found: SpeedScores, metric: str) -> Interval:
    """Interval of the candidate's mean minus the champion's, wide enough for a test: one in a thousand misses."""
    new, old = (side.columns[metric].values for side in (found.candidate, found.champion))
    assert set(new) == set(old)
    values = np.array([float(new[item] or 0) - float(old[item] or 0) for item in new])
    return bootstrap_mean(values, confidence=0.999, seed=1).interval


def test_the_same_release_twice_does_not_differ() -> None:
    with chat_server(by_model=lambda model, _: jitter(model, 0.0)) as server:
        found = measure(server.url, Speed(requests=48, concurrency=4))
        assert server.most_at_once <= 4
    for metric in ("speed.ttft_s", "speed.latency_s"):
        between = difference(found, metric)
        assert between.low < 0 < between.high


def test_a_slower_release_differs_and_costs_more() -> None:
    with chat_server(by_model=lambda model, _: jitter(model, 0.02)) as server:
        found = measure(server.url, Speed(requests=48, concurrency=4, price_per_hour=3.6, currency="EUR"))
    assert difference(found, "speed.ttft_s").low > 0
    assert difference(found, "speed.latency_s").low > 0
    assert difference(found, "speed.cost_per_1000").low > 0
    cost, latency = (found.candidate.columns[name] for name in ("speed.cost_per_1000", "speed.latency_s"))
    assert cost.metric.unit == "EUR"
    # 3.6 an hour is a thousandth a second: 1,000 requests that each hold a quarter of the server.
    assert cost.values["i00"] == pytest.approx(float(latency.values["i00"] or 0) / 4)


def test_both_are_asked_in_turn_and_neither_always_first() -> None:
    with chat_server(by_model=lambda *_: Reply(WORDS)) as server:
        found = measure(server.url, Speed(requests=8, concurrency=1), items=10)
    asked = [(body["model"], body["messages"][-1]["content"]) for body in server.bodies]
    # The warm-up takes a prompt that is not counted.
    assert asked[:2] == [("new", "question 8"), ("old", "question 8")]
    assert asked[2:6] == [("new", "question 0"), ("old", "question 0"), ("old", "question 1"), ("new", "question 1")]
    assert [model for model, _ in asked].count("new") == [model for model, _ in asked].count("old") == 9
    assert list(found.candidate.columns["speed.latency_s"].values) == [f"i{n:02}" for n in range(8)]
    assert "speed.cost_per_1000" not in found.candidate.columns


def test_few_prompts_are_asked_again() -> None:
    with chat_server(by_model=lambda *_: Reply(WORDS)) as server:
        found = measure(server.url, Speed(requests=8, concurrency=2), items=3)
    values = found.champion.columns["speed.tokens_per_s"].values
    assert sorted(values) == ["i00", "i00#2", "i00#3", "i01", "i01#2", "i01#3", "i02", "i02#2"]
    assert all(value is not None and value > 0 for value in values.values())


def test_a_failed_request_has_a_cause_and_is_not_asked_again() -> None:
    def reply(model: str, question: str) -> Reply:
        if model == "new" and question == "question 3":
            return Reply(status=500)
        if model == "old" and question == "question 5":
            return Reply(WORDS, pause_s=0.6)
        return Reply(finish=None) if model == "new" and question == "question 7" else Reply(WORDS)

    with chat_server(by_model=reply) as server:
        found = measure(server.url, Speed(requests=8, concurrency=4), items=12, timeout_s=0.3)
    assert server.asked_of("new").count("question 3") == 1
    assert found.candidate.columns["speed.latency_s"].causes == {"i03": "http 500", "i07": "unfinished"}
    assert found.champion.columns["speed.ttft_s"].causes == {"i05": "timeout"}
    assert found.champion.columns["speed.ttft_s"].values["i03"] is not None


def test_a_dead_server_leaves_causes_and_no_numbers() -> None:
    with chat_server() as server:
        url = server.url
    found = measure(url, Speed(requests=8, concurrency=4))
    assert set(found.candidate.columns["speed.latency_s"].causes.values()) == {"connection"}
    assert set(found.candidate.columns["speed.latency_s"].values.values()) == {None}


def test_what_concerns_every_request_stops() -> None:
    with chat_server(by_model=lambda *_: Reply(status=404)) as server:
        with pytest.raises(InputError, match=r"knows no model '(new|old)'"):
            measure(server.url, Speed(requests=8, concurrency=2))
        with pytest.raises(InputError, match="0 prompts"):
            measure(server.url, Speed(requests=8), items=0)


def test_the_formulas() -> None:
    def of(**changes: Any) -> Scores:
        given = {"completion_tokens": 11, "ttft_s": 0.5, "latency_s": 2.5, **changes}
        answer = Answer("i", "", "stop", 7, error=None, **given)
        return speed_scores({"i": answer}, Speed(concurrency=5, price_per_hour=36.0))

    found = of()
    assert {name: one.values["i"] for name, one in found.columns.items()} == {
        "speed.ttft_s": 0.5,
        "speed.latency_s": 2.5,
        "speed.tokens_per_s": 5.0,
        "speed.cost_per_1000": 5.0,
    }
    for changes, cause in (
        ({"completion_tokens": None}, "no token counts"),
        ({"completion_tokens": 1}, "fewer than two tokens"),
        ({"completion_tokens": 0, "ttft_s": None}, "fewer than two tokens"),
        ({"latency_s": 0.5}, "fewer than two tokens"),
    ):
        assert of(**changes).columns["speed.tokens_per_s"].causes == {"i": cause}
    assert of(ttft_s=None).columns["speed.ttft_s"].causes == {"i": "empty answer"}
