"""Betting on values that keep coming: the same p-values as for all at once, and valid whenever it begins anew."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.statistics.betting_process import BettingProcess
from sluice.statistics.paired import Floats
from sluice.statistics.sequential import betting_p

values = st.lists(st.floats(-1, 1, allow_nan=False), max_size=60).map(np.array)


def draws(rng: np.random.Generator, shape: int | tuple[int, int], mean: float) -> Floats:
    """Zeros and ones with this mean."""
    return rng.binomial(1, mean, shape).astype(np.float64)


@given(parts=st.lists(values, min_size=1, max_size=4), nulls=st.lists(st.floats(-0.99, 0.99), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_in_parts_it_says_what_all_at_once_says(parts: list[Floats], nulls: list[float]) -> None:
    process = BettingProcess(np.array(nulls), -1, 1)
    for part in parts:
        process.add(part)
    whole: Floats = np.concatenate(parts)
    assert process.count == len(whole)
    assert process.p == pytest.approx([betting_p(whole, null, -1, 1) for null in nulls])


def test_each_null_may_have_values_of_its_own() -> None:
    rng = np.random.default_rng(1)
    columns = draws(rng, (3000, 2), 0.6)
    process = BettingProcess(np.array([0.5, 0.55]), 0, 1)
    process.add(columns)
    expected = [betting_p(columns[:, 0], 0.5, 0, 1), betting_p(columns[:, 1], 0.55, 0, 1)]
    assert process.p == pytest.approx(expected)
    assert process.growth[0] == pytest.approx(0.02, abs=0.01)  # the relative entropy of 0.6 and 0.5: 0.0201


def test_nulls_at_the_bounds() -> None:
    process = BettingProcess(np.array([-1.0, 1.0]), -1, 1)
    process.add(np.array([-0.5, 1.0, 1.0]))
    assert process.p[0] < 1e-6, "no mean at the least value gives a larger one"
    assert process.p[1] > 0.99, "no value is above the largest mean"


def test_after_a_long_time_of_one_kind_a_restart_sees_a_change_sooner() -> None:
    rng = np.random.default_rng(2)
    before, after = draws(rng, 3000, 0.45), draws(rng, 600, 0.65)
    stale, fresh = BettingProcess(np.array([0.5]), 0, 1), BettingProcess(np.array([0.5]), 0, 1, kept=0.25)
    for process in (stale, fresh):
        process.add(before)
    fresh.restart()
    for process in (stale, fresh):
        process.add(after)
    assert stale.p[0] > 0.2
    assert fresh.p[0] < 0.002


def test_restarts_keep_the_level() -> None:
    rng = np.random.default_rng(3)
    found = 0
    for _ in range(600):
        process = BettingProcess(np.array([0.5]), 0, 1, kept=0.5)
        for _ in range(4):
            process.add(draws(rng, 100, 0.5))
            process.restart()
        found += bool(process.p[0] <= 0.05)
    # Binomial tolerance, three standard errors: 0.027.
    assert found / 600 <= 0.077
