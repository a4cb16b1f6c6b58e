from __future__ import annotations

import dataclasses

import pytest

from sluice.serving.analysis import AnalysisResult, MetricResult, Minimum, ReleaseSamples, analyse
from sluice.serving.intervals import median_ratio, rate_difference, wilson
from sluice.serving.policy import default_policy
from tests.serving.samples import digest, samples

POLICY = default_policy().analysis
CANARY, STABLE = digest("c"), digest("5")


def look(canary: ReleaseSamples, stable: ReleaseSamples, *, requests: int = 12, feedback: int = 0) -> AnalysisResult:
    return analyse(canary, stable, POLICY, Minimum(requests=requests, feedback=feedback))


def metric(result: AnalysisResult, name: str) -> MetricResult:
    return next(found for found in result.metrics if found.name == name)


def test_the_intervals_agree_with_published_figures() -> None:
    # Newcombe (1998), table II, method 10: 56/70 - 48/80 is 0.0524 to 0.3339; 9/10 - 3/10 is 0.1705 to 0.8090.
    first = rate_difference((56, 70), (48, 80), 0.95)
    assert (first.low, first.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    second = rate_difference((9, 10), (3, 10), 0.95)
    assert (second.low, second.high) == pytest.approx((0.1705, 0.8090), abs=5e-5)
    assert wilson(0, 4, 0.8).high == pytest.approx(0.291, abs=1e-3)


def test_the_ratio_of_medians_is_seeded_and_covers_the_truth() -> None:
    one = median_ratio([200, 210, 190, 205, 195] * 8, [100, 105, 95, 102, 98] * 8, 0.95)
    assert one == median_ratio([200, 210, 190, 205, 195] * 8, [100, 105, 95, 102, 98] * 8, 0.95)
    assert one.low <= 2.0 <= one.high
    assert one.high - one.low < 0.3


def test_the_interval_of_the_ratio_is_that_of_drawn_resamples() -> None:
    import numpy as np

    generator = np.random.default_rng(3)
    a, b = generator.lognormal(5, 0.6, 61), generator.lognormal(5, 0.6, 81)
    drawn = np.median(generator.choice(a, (20000, 61)), axis=1) / np.median(generator.choice(b, (20000, 81)), axis=1)
    found = median_ratio(list(a), list(b), 0.9)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.05, 0.95])), rel=0.05)


def test_equal_releases_pass() -> None:
    result = look(samples(CANARY, 12), samples(STABLE, 40))
    assert result.verdict == "pass"
    assert "12 requests" in result.sentence


def test_a_broken_canary_fails_after_two_requests_though_the_minimum_is_not_there() -> None:
    result = look(samples(CANARY, 2, errors=2), samples(STABLE, 40))
    assert result.verdict == "fail"
    assert "2 of 2 on the canary" in result.sentence


def test_broken_streams_count_like_errors() -> None:
    canary = dataclasses.replace(samples(CANARY, 12), broken=9)
    assert look(canary, samples(STABLE, 40)).verdict == "fail"


def test_empty_answers_fail() -> None:
    assert metric(look(samples(CANARY, 12, empty=10), samples(STABLE, 40)), "empty_answers").verdict == "fail"


def test_errors_that_stable_has_too_do_not_fail_the_canary() -> None:
    result = look(samples(CANARY, 40, errors=8), samples(STABLE, 200, errors=40))
    assert metric(result, "error_rate").verdict == "pass"


def test_nothing_and_too_little_are_never_a_pass() -> None:
    assert look(samples(CANARY, 0), samples(STABLE, 40)).verdict == "inconclusive"
    assert look(samples(CANARY, 11), samples(STABLE, 40)).verdict == "inconclusive"
    assert look(samples(CANARY, 12), samples(STABLE, 0)).verdict == "inconclusive"
    # The minimum of requests is there, but no answer has a time.
    silent = dataclasses.replace(samples(CANARY, 12), ttft_ms=())
    assert look(silent, samples(STABLE, 40)).verdict == "inconclusive"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_latency_that_is_not_a_time_is_never_a_pass(value: float) -> None:
    canary = dataclasses.replace(samples(CANARY, 12), ttft_ms=(value, *samples(CANARY, 11).ttft_ms))
    result = look(canary, samples(STABLE, 40))
    assert metric(result, "time_to_first_token").verdict == "inconclusive"
    assert result.verdict == "inconclusive"


def test_a_slow_canary_fails_and_a_fast_failing_one_does_not_hide_behind_its_speed() -> None:
    assert metric(look(samples(CANARY, 12, ms=900), samples(STABLE, 40)), "time_to_first_token").verdict == "fail"
    result = look(samples(CANARY, 12, errors=8, ms=1), samples(STABLE, 40))
    assert result.verdict == "fail"


def test_feedback_decides_when_it_is_required() -> None:
    stable = samples(STABLE, 40, up=10, down=10)
    assert look(samples(CANARY, 12), stable, feedback=4).verdict == "inconclusive"
    assert look(samples(CANARY, 12, up=6, down=0), stable, feedback=4).verdict == "pass"
    # Not required: few judgements do not hold the step, but clearly bad ones end it.
    assert look(samples(CANARY, 12, up=0, down=1), samples(STABLE, 40, up=2)).verdict == "pass"
    assert look(samples(CANARY, 12, up=0, down=12), samples(STABLE, 40, up=20, down=1)).verdict == "fail"


def test_a_metric_that_does_not_gate_never_decides() -> None:
    result = look(dataclasses.replace(samples(CANARY, 12), truncated=12), samples(STABLE, 40))
    assert metric(result, "truncated_answers").verdict == "fail"
    assert result.verdict == "pass"


def test_few_samples_pass_only_with_a_wide_tolerance() -> None:
    tight = POLICY.model_copy(update={"error_rate": POLICY.error_rate.model_copy(update={"tolerance": 0.1})})
    minimum = Minimum(requests=4, feedback=0)
    canary, stable = samples(CANARY, 4), samples(STABLE, 60)
    assert analyse(canary, stable, POLICY, minimum).verdict == "pass"
    assert analyse(canary, stable, tight, minimum).verdict == "inconclusive"
