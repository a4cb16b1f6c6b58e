"""Always-valid inference: rates under looking all the time, and what must hold for every sequence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.infra.errors import InputError
from sluice.statistics.paired import Floats
from sluice.statistics.sequential import betting_p, confidence_sequence

sequences = st.lists(st.floats(-1, 1, allow_nan=False), min_size=1, max_size=60).map(np.array)
planned = st.sampled_from([None, 60, 500])


def test_the_capital_of_all_or_nothing_bets_is_the_product_of_its_gains() -> None:
    # Ten gains of 1 with 0 as the null, within [-1, 1]: scaled 1 against 1/2, so a bet of share s gains 1 + s a time.
    shares = (np.arange(30) + 0.5) / 30
    by_hand = 1 / np.mean((1 + shares) ** 10)
    assert betting_p(np.ones(10), 0, -1, 1) == pytest.approx(by_hand)
    # Losses afterwards take nothing back: what was the least stays.
    assert betting_p(np.append(np.ones(10), -np.ones(50)), 0, -1, 1) == pytest.approx(by_hand)


def test_what_bounds_alone_decide() -> None:
    nothing = np.array([])
    assert betting_p(nothing, 0.0, -1, 1) == betting_p(np.ones(5), 1.0, -1, 1) == betting_p(np.ones(5), 2.0, -1, 1) == 1
    assert confidence_sequence(nothing, -1, 1, 0.95).low == -1
    assert betting_p(np.array([0.0, 0.2]), 0.0, 0, 1) == 0.0  # no mean of 0 gives a value above 0
    assert betting_p(np.zeros(9), 0.0, 0, 1) == 1.0
    with pytest.raises(InputError, match="0 to 2 is not within 0 to 1"):
        betting_p(np.array([0.0, 2.0]), 0.5, 0, 1)
    with pytest.raises(InputError, match="nan"):
        confidence_sequence(np.array([np.nan]), 0, 1, 0.95)


def test_no_change_seen_narrows_as_the_rule_of_three_does() -> None:
    for n, widest in ((100, 0.08), (500, 0.02)):
        found = confidence_sequence(np.zeros(n), -1, 1, 0.95, planned=n)
        assert 3.69 / n < found.high < widest
        assert found.low == pytest.approx(-found.high, abs=1e-6)


def test_values_that_drift_give_an_interval_all_the_same() -> None:
    found = confidence_sequence(np.append(np.zeros(200), np.ones(200)), 0, 1, 0.95)
    assert 0 < found.low < found.high < 1


@given(values=sequences, null=st.floats(-0.99, 0.99), planned=planned)
@settings(max_examples=80, deadline=None)
def test_p_and_interval_agree_and_signs_mirror(values: Floats, null: float, planned: int | None) -> None:
    found = confidence_sequence(values, -1, 1, 0.95, planned=planned)
    p, other = betting_p(values, null, -1, 1, planned=planned), betting_p(-values, -null, -1, 1, planned=planned)
    assert -1 <= found.low <= found.high <= 1
    if abs(null - found.low) > 1e-6 and abs(null - found.high) > 1e-6 and min(p, other) > 0.025:
        assert found.low < null < found.high
    if null < found.low - 1e-6:
        assert p <= 0.025
    turned = confidence_sequence(-values, -1, 1, 0.95, planned=planned)
    assert [turned.low, turned.high] == pytest.approx([-found.high, -found.low], abs=1e-6)


@given(values=sequences, more=sequences, null=st.floats(-0.99, 0.99), planned=planned)
@settings(max_examples=80, deadline=None)
def test_more_values_never_widen(values: Floats, more: Floats, null: float, planned: int | None) -> None:
    longer = np.append(values, more)
    assert betting_p(longer, null, -1, 1, planned=planned) <= betting_p(values, null, -1, 1, planned=planned) + 1e-12
    short, long = (confidence_sequence(each, -1, 1, 0.95, planned=planned) for each in (values, longer))
    middle = (long.low + long.high) / 2
    fits = betting_p(longer, middle, -1, 1, planned=planned), betting_p(-longer, -middle, -1, 1, planned=planned)
    if min(fits) > 0.025:  # else no mean fits the values at all
        assert short.low - 1e-6 <= long.low <= long.high <= short.high + 1e-6


@given(values=sequences, planned=planned, nulls=st.tuples(st.floats(-0.99, 0.99), st.floats(-0.99, 0.99)))
@settings(max_examples=60, deadline=None)
def test_a_higher_null_is_harder_to_exclude(values: Floats, planned: int | None, nulls: tuple[float, float]) -> None:
    lower, higher = sorted(nulls)
    assert betting_p(values, lower, -1, 1, planned=planned) <= betting_p(values, higher, -1, 1, planned=planned) + 1e-9


def test_scale_and_shift_of_the_values_change_nothing() -> None:
    values = np.random.default_rng(2).uniform(-1, 1, 80)
    assert betting_p(values * 50 + 10, 5, -40, 60) == pytest.approx(betting_p(values, -0.1, -1, 1))


def changes(rng: np.random.Generator, n: int) -> Floats:
    return np.where(rng.random(n) < 0.5, rng.beta(0.6, 0.5, n) - rng.beta(0.6, 0.5, n), 0.0)


def discordant(rng: np.random.Generator, n: int) -> Floats:
    return rng.choice([-1.0, 0.0, 1.0], size=n, p=[0.1, 0.8, 0.1])


def loses_the_margin(rng: np.random.Generator, n: int) -> Floats:
    return rng.choice([-1.0, 0.0, 1.0], size=n, p=[0.1, 0.85, 0.05])


@pytest.mark.parametrize(("draw", "null"), [(changes, 0.0), (discordant, 0.0), (loses_the_margin, -0.05)])
@pytest.mark.parametrize("planned", [None, 300])
def test_looking_after_every_value_keeps_the_level(draw, null: float, planned: int | None) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(8)
    simulations = 600
    found = sum(betting_p(draw(rng, 300), null, -1, 1, planned=planned) <= 0.025 for _ in range(simulations))
    # The p-value is the least over all 300 looks. Binomial tolerance, three standard errors: 0.019.
    assert found / simulations <= 0.044


def test_a_difference_worth_finding_is_found_early() -> None:
    rng = np.random.default_rng(9)
    p_half = [betting_p(changes(rng, 250) * 0.8 + 0.1, 0.0, -1, 1, planned=500) for _ in range(200)]
    assert np.mean(np.array(p_half) <= 0.025) > 0.8


def test_looking_with_intervals_for_a_fixed_n_would_not_keep_the_level() -> None:
    """What these intervals are for: the same sequences, a t-test at every value from the twentieth on."""
    rng = np.random.default_rng(8)
    found = 0
    for _ in range(200):
        values = changes(rng, 300)
        n = np.arange(1, 301)
        means = values.cumsum() / n
        deviations = np.sqrt(np.maximum((values**2).cumsum() / n - means**2, 1e-12) * n / np.maximum(n - 1, 1))
        found += bool((means / (deviations / np.sqrt(n)) > 1.96)[20:].any())
    assert found / 200 > 0.08
