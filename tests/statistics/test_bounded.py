"""The mean of bounded values at a fixed n: against exact intervals, and where a bootstrap breaks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.infra.errors import InputError
from sluice.statistics.bounded import bounded_mean, rate_interval, rate_p
from sluice.statistics.paired import Floats, bootstrap_mean

differences = st.lists(st.floats(-1, 1, allow_nan=False), min_size=1, max_size=40).map(np.array)


def test_a_rate_has_its_exact_interval_also_without_a_hit() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857-872, table I, Clopper-Pearson: 81 of 263, and 0 of 20.
    found = rate_interval(81, 263, confidence=0.95)
    assert [found.low, found.high] == pytest.approx([0.2527, 0.3676], abs=5e-5)
    assert rate_interval(0, 20, confidence=0.95).high == pytest.approx(0.1684, abs=5e-5)
    assert rate_interval(0, 20, confidence=0.95).low == 0.0
    assert rate_p(0, 300, 0.01, "less") == pytest.approx(0.99**300)
    assert (rate_interval(0, 0, confidence=0.95).high, rate_p(0, 0, 0.5, "less")) == (1.0, 1.0)
    for hits, n in [(3, 40), (39, 40), (1, 1)]:
        interval = rate_interval(hits, n, confidence=0.95)
        assert rate_p(hits, n, interval.low, "greater") == pytest.approx(0.025, abs=1e-6)
        if interval.high < 1:
            assert rate_p(hits, n, interval.high, "less") == pytest.approx(0.025, abs=1e-6)


@pytest.mark.parametrize(("hits", "n"), [(7, 50), (0, 100), (100, 100), (1, 400)])
def test_of_two_kinds_of_values_the_interval_is_that_of_a_rate(hits: int, n: int) -> None:
    found = bounded_mean(np.array([1.0] * hits + [0.0] * (n - hits)), 0, 1, confidence=0.95).interval
    exact = rate_interval(hits, n, confidence=0.95)
    assert [found.low, found.high] == pytest.approx([exact.low, exact.high], abs=0.004)


def test_equal_values_are_no_certainty_and_no_items_say_nothing() -> None:
    found = bounded_mean(np.zeros(100), -1, 1, confidence=0.95)
    assert found.interval.high == pytest.approx(1 - 0.025 ** (1 / 100), abs=0.002)
    assert found.interval.low == pytest.approx(-found.interval.high)
    nothing = bounded_mean(np.array([]), -1, 1, confidence=0.95)
    assert (nothing.interval.low, nothing.interval.high, nothing.p_greater(0.0)) == (-1, 1, 1.0)
    with pytest.raises(InputError, match=r"0 to 1\.5 is not within 0 to 1"):
        bounded_mean(np.array([0.0, 1.5]), 0, 1, confidence=0.95)
    with pytest.raises(InputError, match="nan"):
        bounded_mean(np.array([0.0, np.nan]), 0, 1, confidence=0.95)


@given(values=differences, null=st.floats(-1, 1), data=st.data())
@settings(max_examples=60, deadline=None)
def test_order_does_not_matter_signs_mirror_and_p_and_interval_agree(
    values: Floats, null: float, data: st.DataObject
) -> None:
    found = bounded_mean(values, -1, 1, confidence=0.95, resamples=999)
    shuffled = np.array(data.draw(st.permutations(values.tolist())))
    assert bounded_mean(shuffled, -1, 1, confidence=0.95, resamples=999).interval == found.interval
    assert (found.p_greater(null) <= 0.025) == (null < found.interval.low)
    assert (found.p_less(null) <= 0.025) == (null > found.interval.high)
    assert -1 <= found.interval.low <= found.interval.high <= 1
    turned = bounded_mean(-values, -1, 1, confidence=0.95, resamples=999).interval
    # Other random weights: 999 of them fix a limit to a tenth of the width.
    width = found.interval.high - found.interval.low
    assert [turned.low, turned.high] == pytest.approx([-found.interval.high, -found.interval.low], abs=0.2 * width)


@given(values=differences, null=st.floats(-1, 1))
@settings(max_examples=40, deadline=None)
def test_better_values_never_give_a_lower_limit(values: Floats, null: float) -> None:
    better = np.clip(values + 0.1, -1, 1)
    one, two = (bounded_mean(each, -1, 1, confidence=0.95, resamples=4_999) for each in (values, better))
    assert two.interval.low >= one.interval.low - 0.05


def rare(rng: np.random.Generator, n: int) -> Floats:
    """Two equal releases that differ on one item in ten."""
    return np.where(rng.random(n) < 0.1, rng.beta(0.6, 0.5, n) - rng.beta(0.6, 0.5, n), 0.0)


def breaks(rng: np.random.Generator, n: int) -> Floats:
    """A candidate that breaks 2% of the answers and changes a tenth of them for nothing: it loses 0.014."""
    return np.where(rng.random(n) < 0.02, -rng.uniform(0.4, 1, n), rare(rng, n) * 1.0)


@pytest.mark.parametrize(("draw", "null", "n"), [(rare, 0.0, 60), (breaks, -0.014, 60)])
def test_false_positives_where_a_bootstrap_has_too_many(draw, null: float, n: int) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(12)
    simulations, ours, bca = 300, 0, 0
    for seed in range(simulations):
        values = draw(rng, n)
        ours += bounded_mean(values, -1, 1, confidence=0.95, resamples=799).p_greater(null) <= 0.025
        if np.ptp(values) > 0:
            bca += bootstrap_mean(values, confidence=0.95, seed=seed, resamples=799)._bootstrap_p(null) <= 0.025
    # Binomial tolerance, three standard errors of 300 simulations: 0.027.
    assert ours / simulations <= 0.025 + 0.027
    assert bca / simulations > 0.06
