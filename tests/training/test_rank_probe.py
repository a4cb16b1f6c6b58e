"""Slow processes: who is named, and when nobody is."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.training.rank_probe import judge, probe
from sluice.training.recipe_sections import RankGuard

SECTION = RankGuard()


def test_the_slow_one_is_named_with_node_factor_and_median() -> None:
    verdict = judge([0.010, 0.011, 0.035, 0.010], SECTION, ["a", "a", "b", "b"], step=50)
    assert (verdict.action, verdict.guard) == ("warn", "slow_rank")
    for part in ("Step 50", "2 x", "median 10.00 ms", "rank 2 (b) 3.5 x", "throttling", "goes on"):
        assert part in verdict.sentence


def test_of_two_the_slower_is_seen() -> None:
    assert "rank 0 2.5 x" in judge([0.025, 0.010], SECTION).sentence


@given(st.lists(st.floats(0.010, 0.0199), max_size=64))
def test_times_within_the_factor_say_nothing(times: list[float]) -> None:
    assert judge(times, SECTION).action == "go"


@given(st.lists(st.floats(0.010, 0.0199), min_size=3, max_size=64), st.data())
def test_exactly_the_slow_one_is_named(times: list[float], data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(times) - 1))
    times[rank] = 0.05
    verdict = judge(times, SECTION)
    assert f"rank {rank} " in verdict.sentence
    assert verdict.sentence.count("rank ") == 1


@pytest.mark.parametrize("broken", [math.nan, math.inf, 0.0, -1.0])
def test_no_time_is_slow(broken: float) -> None:
    assert "rank 1 no time" in judge([0.01, broken, 0.01], SECTION).sentence


def test_policies() -> None:
    times = [0.01, 0.01, 0.05]
    assert judge(times, RankGuard(policy="off")).action == "go"
    stopped = judge(times, RankGuard(policy="stop"))
    assert stopped.action == "stop"
    assert "training stops" in stopped.sentence
    assert judge([0.05], SECTION).action == "go"


def test_differences_below_the_clocks_are_nothing() -> None:
    assert judge([1e-6, 9e-5, 1e-6], SECTION).action == "go"


def test_the_probe_measures_and_leaves_the_random_state_alone() -> None:
    import torch

    before = torch.get_rng_state()
    assert 0 < probe("cpu", repeats=2) < 10
    assert torch.equal(before, torch.get_rng_state())
