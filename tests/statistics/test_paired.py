"""Statistics against published figures, closed forms and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sluice.statistics.paired import (
    bootstrap_mean,
    holm,
    mcnemar_exact,
    minimum_detectable_effect,
    needed_n,
    relative_gain,
    score_interval,
    score_p,
    score_z,
    seed_of,
    worst_case,
)


def test_mcnemar_and_score_interval_reproduce_a_published_example() -> None:
    # Airway hyper-responsiveness before and after transplantation (Bentur et al. 2009): 21 children, 1 positive
    # before only, 7 after only. Fagerland, Lydersen and Laake 2014 (Statistics in Medicine 33:2850-2875): exact
    # conditional McNemar p = 0.070 two-sided, Tango's interval -0.517 to -0.026.
    assert 2 * mcnemar_exact(7, 1) == pytest.approx(0.0703125)
    interval = score_interval(1, 7, 21, confidence=0.95)
    assert [interval.low, interval.high] == pytest.approx([-0.517, -0.026], abs=5e-4)


def test_score_statistic_is_mcnemars_z_at_zero_and_its_interval_is_where_p_is_alpha() -> None:
    assert score_z(40, 20, 160, 0.0) == pytest.approx(20 / math.sqrt(60))
    for gained, lost, n in [(40, 20, 160), (3, 9, 30), (0, 4, 25), (5, 0, 12), (12, 12, 24)]:
        interval = score_interval(gained, lost, n, confidence=0.95)
        assert interval.low < (gained - lost) / n < interval.high
        assert score_p(gained, lost, n, interval.low) == pytest.approx(0.025, abs=1e-6)
        assert score_p(gained, lost, n, interval.high) == pytest.approx(0.975, abs=1e-6)
        mirrored = score_interval(lost, gained, n, confidence=0.95)
        assert mirrored.low == pytest.approx(-interval.high, abs=1e-8)


def test_two_equal_columns_of_rates_still_have_a_width() -> None:
    z = stats.norm.ppf(0.975)
    for n in (8, 120):
        interval = score_interval(0, 0, n, confidence=0.95)
        assert interval.high == pytest.approx(z**2 / (n + z**2), abs=1e-8)
        assert interval.low == pytest.approx(-interval.high, abs=1e-8)
    everything = score_interval(8, 0, 8, confidence=0.95)
    assert everything.high == 1.0
    assert 0.3 < everything.low < 0.4


def test_mcnemar_without_discordant_pairs_shows_nothing() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(10, 0) == pytest.approx(2**-10)
    assert mcnemar_exact(0, 10) == pytest.approx(1.0)


def test_holm_against_known_values() -> None:
    # As R's p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm").
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_bootstrap_mean_agrees_with_scipy_and_with_its_own_p_value() -> None:
    values = np.random.default_rng(3).gamma(1.5, size=80) - 0.9
    boot = bootstrap_mean(values, confidence=0.95, seed=7)
    t = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert boot.interval.low == pytest.approx(t.low, abs=0.06)
    assert boot.interval.high == pytest.approx(t.high, abs=0.09)
    # The p-value is the interval read backwards: 2.5% at its lower end, 97.5% or more at its upper.
    assert boot.p_greater(boot.interval.low) == pytest.approx(0.025, abs=1e-3)
    assert 0.974 <= boot.p_greater(boot.interval.high) < 1
    assert boot.p_greater(-100.0) == pytest.approx(1e-4)
    assert boot.p_greater(100.0) > 0.999
    grid = [boot.p_greater(x) for x in np.linspace(values.mean() - 1, values.mean() + 1, 60)]
    assert grid == sorted(grid)


def test_the_same_data_give_the_same_interval_and_the_seed_is_the_datas() -> None:
    values = np.random.default_rng(1).normal(size=30)
    one, two = (bootstrap_mean(values, confidence=0.95, seed=seed_of(values.tolist()), resamples=999) for _ in "ab")
    assert one.interval == two.interval
    assert seed_of(["a", 1]) == seed_of(["a", 1]) != seed_of(["a", 2])


def test_coverage_and_false_positives_of_the_paired_bootstrap() -> None:
    """Skewed differences, as F1 gives them (a third equal, some jumps to 1), true mean 0: 95% intervals hold it."""
    rng = np.random.default_rng(20_26)
    simulations, n = 400, 100
    held = superior = 0
    for seed in range(simulations):
        jump = np.where(rng.random(n) < 0.15, rng.uniform(0.4, 0.8, n), 0.0)  # mean 0.09
        drift = np.where(rng.random(n) < 0.6, rng.uniform(-0.3, 0.0, n), 0.0)  # mean -0.09
        boot = bootstrap_mean(jump + drift, confidence=0.95, seed=seed, resamples=499)
        held += boot.interval.low <= 0.0 <= boot.interval.high
        superior += boot.interval.low > 0.0
    # Binomial tolerance over 400 simulations, three standard errors: 0.033 around 0.95 and 0.023 around 0.025.
    assert 0.917 <= held / simulations <= 0.983
    assert superior / simulations <= 0.05


def test_coverage_of_the_score_interval_for_rates() -> None:
    rng = np.random.default_rng(5)
    held, simulations, n, gain, loss = 0, 600, 60, 0.12, 0.05
    for gained, lost, _ in rng.multinomial(n, [gain, loss, 1 - gain - loss], size=simulations):
        interval = score_interval(int(gained), int(lost), n, confidence=0.95)
        held += interval.low <= gain - loss <= interval.high
    assert 0.92 <= held / simulations <= 0.98


def test_minimum_detectable_effect_is_what_a_test_of_that_size_detects() -> None:
    half_width = stats.norm.ppf(0.975) * 0.4 / math.sqrt(120)
    effect = minimum_detectable_effect(half_width, 0.4, 120, power=0.8)
    assert effect == pytest.approx(2.8016 * 0.4 / math.sqrt(120), rel=1e-4)
    assert needed_n(0.4, effect, alpha=0.025, power=0.8) in (120, 121)
    rng = np.random.default_rng(11)
    samples = rng.normal(effect, 0.4, size=(4000, 120))
    z = samples.mean(axis=1) / (0.4 / math.sqrt(120))
    assert (z > stats.norm.ppf(0.975)).mean() == pytest.approx(0.8, abs=0.02)


def test_the_permutation_test_holds_where_few_pairs_differ() -> None:
    """Two equal releases that differ on one item in ten, of forty: BCa alone finds one of them better too often."""
    rng = np.random.default_rng(4)
    simulations, n, ours, bca = 400, 40, 0, 0
    for seed in range(simulations):
        values = np.where(rng.random(n) < 0.1, rng.normal(size=n), 0.0)
        boot = bootstrap_mean(values, confidence=0.95, seed=seed, resamples=499)
        ours += boot.p_greater(0.0) <= 0.025
        bca += boot._bootstrap_p(0.0) <= 0.025
    # Binomial tolerance, three standard errors of 400 simulations: 0.023.
    assert ours / simulations <= 0.048
    assert bca / simulations > 0.06


def test_subset_means_are_the_sign_flip_test_of_scipy() -> None:
    values = np.random.default_rng(6).normal(0.2, 1, size=10)
    boot = bootstrap_mean(values, confidence=0.95, seed=1)
    for null in (-0.5, 0.0, 0.3):
        exact = stats.permutation_test(
            (values - null,), np.sum, permutation_type="samples", alternative="greater", n_resamples=2**11
        )
        assert boot._permutation_p(null) == pytest.approx(exact.pvalue, abs=0.015)


def test_values_that_are_all_equal_leave_the_sign_test() -> None:
    boot = bootstrap_mean(np.full(6, 0.25), confidence=0.95, seed=1)
    assert (boot.interval.low, boot.interval.high) == (0.25, 0.25)
    assert boot.p_greater(0.0) == pytest.approx(0.5**6, abs=0.005)
    assert boot.p_greater(0.25) == 1.0


def test_missing_values_at_their_worst() -> None:
    nan = math.nan
    before, after = np.array([0.5, 0.2, nan, nan]), np.array([0.7, nan, 0.4, nan])
    # By hand: 0.2; 0.2 against 0 or 1; 1 or 0 against 0.4; everything.
    found = worst_case(before, after, 0.0, 1.0)
    assert [found.low, found.high] == pytest.approx([(0.2 - 0.2 - 0.6 - 1) / 4, (0.2 + 0.8 + 0.4 + 1) / 4])
    whole = worst_case(np.array([0.5]), np.array([0.7]), 0.0, 1.0)
    assert [whole.low, whole.high] == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize(("after", "higher", "kept"), [(0.46, True, True), (0.44, True, False), (0.54, False, True)])
def test_a_relative_margin_is_a_share_of_the_champions_mean(after: float, higher: bool, kept: bool) -> None:
    champion = np.array([0.4, 0.6])
    gain = relative_gain(champion, np.array([after, after]), 0.1, higher_is_better=higher)
    assert (gain.mean() > 0) == kept
    corners = relative_gain(np.array([1.0, 0.0]), np.array([0.0, 1.0]), 0.1, higher_is_better=higher)
    assert corners.min() <= gain.min() <= gain.max() <= corners.max()
