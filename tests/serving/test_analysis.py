"""The comparison of two releases: what convicts, what passes, and what is neither."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.serving.analysis import CONVICTING, Analysis, AnalysisResult, MetricResult
from sluice.serving.observations import Sample
from sluice.serving.policy import AnalysisPolicy, MetricPolicy, Minimum
from tests.serving.samples import CANARY, STABLE, stream

RATE = MetricPolicy(fail_above=0.02, margin=0.15)
TIMES = MetricPolicy(fail_above=1.2, margin=1.5)
ENOUGH = Minimum(requests=12)
GOOD, BAD = [0.0] * 60, [1.0] * 60


def policy(**metrics: MetricPolicy) -> AnalysisPolicy:
    return AnalysisPolicy(false_rollback=0.01, false_pass=0.05, requests_per_session=0, metrics=metrics)


def look(
    samples: Sequence[Sample],
    by: AnalysisPolicy,
    minimum: Minimum = ENOUGH,
    *,
    since: float = 0.0,
    missing: Mapping[str, str] | None = None,
) -> AnalysisResult:
    analysis = Analysis(by, CANARY, STABLE)
    analysis.add(samples)
    return analysis.result(minimum, since=since, missing=missing or {})


def only(result: AnalysisResult) -> MetricResult:
    (metric,) = result.metrics
    return metric


def times(seed: int, n: int, typical: float = 100.0) -> list[float]:
    return list(np.random.default_rng(seed).lognormal(np.log(typical), 0.4, n))


def test_equal_releases_pass() -> None:
    rates = stream("error_rate", GOOD, [0.0] * 300)
    waits = stream("time_to_first_token", times(1, 60), times(2, 300))
    result = look([*rates, *waits], policy(error_rate=RATE, time_to_first_token=TIMES))
    assert result.verdict == "pass"
    assert result.sentence == "No worse than stable in 2 metrics over 60 requests of the canary."
    assert result.convicting == ()
    rate, wait = result.metrics
    assert (rate.canary_n, rate.stable_n, rate.canary_mean, rate.estimate) == (60, 300, 0.0, 0.0)
    assert wait.estimate == pytest.approx(1.0, abs=0.15)
    assert "Failed or broken answers: 0 of 60 on the canary, 0 of 300 on stable; at most" in rate.sentence


def test_a_broken_canary_fails_before_the_minimum_is_there_and_its_requests_are_named() -> None:
    samples = stream("error_rate", [1.0] * 11, [0.0] * 100)
    result = look(samples, policy(error_rate=RATE))
    assert result.verdict == "fail"
    assert "11 of 11 on the canary, 0 of 100 on stable; at least" in result.sentence
    assert "more than the 2 points allowed" in result.sentence
    assert [each.request_id for each in result.convicting] == [f"c{index}" for index in range(11)]
    assert result.convicting[0].known < result.convicting[-1].known


def test_the_latest_bad_and_the_slowest_requests_convict() -> None:
    latest = look(stream("error_rate", [1.0] * 80, [0.0] * 80), policy(error_rate=RATE)).convicting
    assert [each.request_id for each in latest] == [f"c{index}" for index in range(30, 80)]
    slow = look(stream("total_time", [500.0, *[300.0] * 80], [100.0] * 80), policy(total_time=TIMES)).convicting
    assert len(slow) == CONVICTING
    assert slow[0].value == 500.0


def test_failure_is_absorbing() -> None:
    analysis = Analysis(policy(error_rate=RATE), CANARY, STABLE)
    analysis.add(stream("error_rate", [1.0] * 20, [0.0] * 20))
    assert analysis.result(ENOUGH, since=0, missing={}).verdict == "fail"
    analysis.add(stream("error_rate", [0.0] * 2000, [0.0] * 2000, begin=100))
    assert analysis.result(ENOUGH, since=100, missing={}).verdict == "fail"
    assert analysis.result(ENOUGH, since=100, missing={"error_rate": "The log is gone."}).verdict == "fail"


def test_a_slow_canary_fails_and_one_that_fails_quickly_does_not_hide_behind_its_speed() -> None:
    slow = only(
        look(stream("time_to_first_token", times(1, 200, 250), times(2, 200)), policy(time_to_first_token=TIMES))
    )
    assert slow.verdict == "fail"
    assert slow.low is not None
    assert slow.high is not None
    assert TIMES.fail_above < slow.low < 2.5 < slow.high
    assert slow.estimate == pytest.approx(2.5, abs=0.4)
    quick = [*stream("error_rate", BAD, GOOD), *stream("total_time", [1.0] * 60, [100.0] * 60)]
    assert look(quick, policy(error_rate=RATE, total_time=TIMES)).verdict == "fail"


def test_no_tail_hides_a_slow_canary_or_convicts_an_equal_one() -> None:
    heavy = np.random.default_rng(3).pareto(0.8, 2000) + 1  # without a mean
    equal, slow = stream("total_time", heavy[:1000], heavy[1000:]), stream("total_time", 2 * heavy[:1000], heavy[1000:])
    assert only(look(equal, policy(total_time=TIMES))).verdict == "pass"
    assert only(look(slow, policy(total_time=TIMES))).verdict == "fail"


def test_of_a_score_more_is_better() -> None:
    rng = np.random.default_rng(4)
    low, high = rng.uniform(0.3, 0.6, 300), rng.uniform(0.6, 0.9, 300)
    worse = only(look(stream("judge_score", low, high), policy(judge_score=RATE)))
    assert worse.verdict == "fail"
    assert worse.estimate == pytest.approx(0.3, abs=0.03)
    assert worse.canary_mean == pytest.approx(0.45, abs=0.02)
    better = only(look(stream("judge_score", high, low), policy(judge_score=RATE)))
    assert better.verdict == "pass"
    assert "better than stable" in better.sentence


@pytest.mark.parametrize("errors", [0.4, 1.0])
def test_incidents_that_hit_both_releases_convict_nobody(errors: float) -> None:
    """Errors come and go every 40 requests, times rise and fall with them; one in twenty asks the canary."""
    rng = np.random.default_rng(5)
    samples = []
    for index in range(8000):
        incident = (index // 40) % 2 == 1
        release = CANARY if rng.random() < 0.05 else STABLE
        samples.append(Sample("error_rate", release, float(rng.random() < (errors if incident else 0.01)), index))
        samples.append(Sample("total_time", release, float(rng.lognormal(4)) * (5 if incident else 1), index))
    strict = MetricPolicy(fail_above=0.0, margin=0.3), MetricPolicy(fail_above=1.0, margin=3)
    result = look(samples, policy(error_rate=strict[0], total_time=strict[1]))
    assert result.verdict == "pass"
    assert all(metric.p_fail > 0.01 for metric in result.metrics)


def test_equal_releases_are_not_convicted_though_looked_at_after_every_value() -> None:
    """p-values are the least of all looks. The bounds are the strictest there are: not worse at all."""
    rng = np.random.default_rng(6)
    strict = policy(
        error_rate=MetricPolicy(fail_above=0.0, margin=0.5), total_time=MetricPolicy(fail_above=1.0, margin=9)
    )
    strict = strict.model_copy(update={"false_rollback": 0.1})
    rollouts, failed = 80, 0
    for _ in range(rollouts):
        samples = []
        for index in range(250):
            release = CANARY if rng.random() < 0.3 else STABLE
            samples.append(Sample("error_rate", release, float(rng.random() < 0.3), index))
            samples.append(Sample("total_time", release, float(rng.lognormal()), index))
        failed += look(samples, strict).verdict == "fail"
    # 8 expected at most; binomial tolerance, three standard errors: 8.
    assert failed <= 16


def test_nothing_and_too_little_are_never_a_pass_and_it_is_said_what_is_missing() -> None:
    by = policy(error_rate=RATE)
    nothing = look([], by)
    assert nothing.verdict == "inconclusive"
    assert "12 more requests of the canary (0 of 12 in this step)." in nothing.sentence
    assert "no values of the canary and stable yet" in nothing.sentence
    assert "no values of stable yet" in look(stream("error_rate", GOOD, []), by).sentence
    assert "no values of the canary yet" in look(stream("error_rate", [], GOOD), by).sentence
    few = look(stream("error_rate", [0.0] * 11, GOOD, seconds=110), by)
    assert few.verdict == "inconclusive"
    assert "1 more request of the canary, about 10 s at this pace (11 of 12 in this step)." in few.sentence
    assert "may be" in few.sentence
    assert "more values of the canary" in few.sentence
    # The requests are there, but no answer has a time.
    assert look(stream("error_rate", GOOD, GOOD), policy(error_rate=RATE, total_time=TIMES)).verdict == "inconclusive"


def test_a_step_without_traffic_does_not_pass_by_what_was_seen_before() -> None:
    samples, by = stream("error_rate", GOOD, GOOD), policy(error_rate=RATE)
    assert look(samples, by).verdict == "pass"
    later = look(samples, by, since=200.0)
    assert later.verdict == "inconclusive"
    assert "nothing to compare in this step yet" in later.sentence
    # Stable went silent.
    silent = look([*samples, *stream("error_rate", GOOD, [], begin=200)], by, since=200.0)
    assert silent.verdict == "inconclusive"


def test_what_was_shown_before_does_not_pass_a_release_that_looks_worse_in_this_step() -> None:
    samples = [
        *stream("error_rate", [0.0] * 300, [0.0] * 300),
        *stream("error_rate", [1.0, 0.0, 0.0] * 5, [0.0] * 15, begin=100),
    ]
    result = look(samples, policy(error_rate=RATE), since=100.0)
    assert result.verdict == "inconclusive"
    assert "in this step it looks worse than the margin of 15 points" in result.sentence


def test_a_release_that_becomes_worse_at_a_later_step_is_convicted_as_one_that_was_bad_from_the_first() -> None:
    rng = np.random.default_rng(7)
    strict = policy(total_time=MetricPolicy(fail_above=1.05, margin=1.2))
    analysis = Analysis(strict, CANARY, STABLE)
    for step in range(3):
        good = stream("total_time", rng.lognormal(4, 0.5, 1500), rng.lognormal(4, 0.5, 1500), begin=100.0 * step)
        analysis.add(good)
        assert analysis.result(ENOUGH, since=100.0 * step, missing={}).verdict != "fail"
    bad = stream("total_time", 1.3 * rng.lognormal(4, 0.5, 1500), rng.lognormal(4, 0.5, 1500), begin=300.0)
    analysis.add(bad)
    assert analysis.result(ENOUGH, since=300.0, missing={}).verdict == "fail"
    assert look(bad, strict, since=300.0).verdict == "fail"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1.5])
def test_values_that_cannot_be_are_never_a_pass(value: float) -> None:
    by = policy(error_rate=RATE)
    assert look(stream("error_rate", GOOD, [0.0] * 300), by).verdict == "pass"
    for samples in (
        stream("error_rate", [*GOOD, value, value], [0.0] * 300),
        stream("error_rate", GOOD, [*GOOD, value, value]),
        stream("error_rate", [value] * 60, GOOD),
    ):
        result = look(samples, by)
        assert result.verdict == "inconclusive"
    assert "values that cannot be, 60 of the canary and 0 of stable" in result.sentence
    if value != 1.5:  # which is a time
        slow = stream("total_time", [*times(1, 60), value, value], times(2, 300))
        assert look(slow, policy(total_time=TIMES), Minimum(requests=1)).metrics[0].verdict == "inconclusive"
    # One in hundreds is dropped, and nothing else.
    assert look(stream("error_rate", [*GOOD, *GOOD, value], [0.0] * 300), by).verdict == "pass"


def test_an_answer_faster_than_the_gateways_clock_has_a_time() -> None:
    result = look(stream("time_to_first_token", [0.0] * 60, [0.0] * 60), policy(time_to_first_token=TIMES))
    assert only(result).canary_mean == 0.5
    assert only(result).verdict == "pass"
    # Nothing costs nothing.
    assert (
        only(look(stream("cost_per_request", [0.0] * 60, [0.0] * 60), policy(cost_per_request=TIMES))).verdict == "pass"
    )


def test_a_source_that_is_down_never_passes() -> None:
    samples = [*stream("error_rate", GOOD, GOOD), *stream("thumbs_down", GOOD, GOOD)]
    by = policy(error_rate=RATE, thumbs_down=RATE)
    assert look(samples, by).verdict == "pass"
    result = look(samples, by, missing={"thumbs_down": "The traces have not answered for 12 s."})
    assert result.verdict == "inconclusive"
    assert result.sentence == "The traces have not answered for 12 s."
    shown = policy(error_rate=RATE, thumbs_down=RATE.model_copy(update={"gating": False}))
    assert look(samples, shown, missing={"thumbs_down": "down"}).verdict == "pass"


def test_feedback_is_judged_if_there_is_any_and_needed_when_it_is_asked_for() -> None:
    by = policy(error_rate=RATE, thumbs_down=RATE)
    rates = stream("error_rate", GOOD, GOOD)
    asked = Minimum(requests=12, feedback=4)
    assert look(rates, by).verdict == "pass"
    assert "4 more judged answers of the canary (0 of 4 in this step)" in look(rates, by, asked).sentence
    assert look([*rates, *stream("thumbs_down", [0.0, 0.0, 1.0], [0.0] * 9)], by).verdict == "pass"
    assert look([*rates, *stream("thumbs_down", [0.0] * 5, [0.0] * 9)], by, asked).verdict == "inconclusive"
    assert look([*rates, *stream("thumbs_down", GOOD, GOOD)], by, asked).verdict == "pass"
    assert look([*rates, *stream("thumbs_down", [1.0] * 20, [0.0] * 20)], by).verdict == "fail"
    # It counts for the step though the policy compares no thumbs.
    assert look([*rates, *stream("thumbs_down", GOOD, [])], policy(error_rate=RATE), asked).verdict == "pass"


def test_a_metric_has_a_minimum_of_its_own() -> None:
    by = policy(error_rate=RATE.model_copy(update={"minimum": 61}))
    result = look(stream("error_rate", GOOD, GOOD), by)
    assert result.verdict == "inconclusive"
    assert "1 more values of the canary are needed" in result.sentence


def test_a_metric_that_does_not_gate_never_decides() -> None:
    shown = policy(error_rate=RATE, truncated_answers=RATE.model_copy(update={"gating": False}))
    result = look([*stream("error_rate", GOOD, GOOD), *stream("truncated_answers", BAD, GOOD)], shown)
    assert [metric.verdict for metric in result.metrics] == ["pass", "fail"]
    assert result.verdict == "pass"
    # Nor does a policy pass in which none is left that gates.
    none = shown.model_copy(update={"metrics": {"truncated_answers": shown.metrics["truncated_answers"]}})
    assert look(stream("error_rate", GOOD, GOOD), none).verdict == "inconclusive"


@pytest.mark.parametrize(("metric", "base"), [("judge_score", RATE), ("total_time", TIMES)])
def test_superior_passes_only_what_is_better(metric: str, base: MetricPolicy) -> None:
    by = policy(**{metric: base.model_copy(update={"superior": True})})
    rng = np.random.default_rng(8)
    one, two = rng.uniform(0.4, 0.8, 300), rng.uniform(0.4, 0.8, 300)
    better = one * 0.5 if metric == "total_time" else np.minimum(one + 0.2, 1.0)
    equal = only(look(stream(metric, one, two), by))
    assert equal.verdict == "inconclusive"
    assert "not shown to be better yet" in equal.sentence
    assert only(look(stream(metric, better, two), by)).verdict == "pass"


def test_times_that_are_equal_are_not_better() -> None:
    by = policy(total_time=TIMES.model_copy(update={"superior": True}))
    assert only(look(stream("total_time", [7.0] * 300, [7.0] * 300), by)).verdict == "inconclusive"


def test_of_a_session_only_the_first_requests_count() -> None:
    """One person whose every request fails is no reason to roll back."""
    failing = [Sample("error_rate", CANARY, 1.0, index, session="one") for index in range(60)]
    others = [Sample("error_rate", STABLE, 0.0, index + 0.5, session=f"{index}") for index in range(60)]
    assert look([*failing, *others], policy(error_rate=RATE)).verdict == "fail"
    first = policy(error_rate=RATE).model_copy(update={"requests_per_session": 2})
    result = look([*failing, *others], first)
    assert result.verdict == "inconclusive"
    assert only(result).canary_n == 2
    assert "(2 of 12 in this step)" in result.sentence
    nameless = [Sample("error_rate", CANARY, 1.0, index) for index in range(60)]
    assert look([*nameless, *others], first).verdict == "fail"


def test_other_releases_and_metrics_do_not_count() -> None:
    noise = [Sample("error_rate", "sha256:" + "9" * 64, 1.0, index) for index in range(50)]
    noise += [Sample("refusals", CANARY, 1.0, index) for index in range(50)]
    result = look([*stream("error_rate", GOOD, GOOD), *noise], policy(error_rate=RATE))
    assert result.verdict == "pass"
    assert only(result).canary_n == 60


def test_samples_that_come_release_by_release_are_put_in_order() -> None:
    canary, stable = stream("error_rate", GOOD, []), stream("error_rate", [], GOOD)
    by = policy(error_rate=RATE)
    assert look([*canary, *stable], by) == look(stream("error_rate", GOOD, GOOD), by)


def test_a_result_survives_being_written() -> None:
    samples = [*stream("error_rate", BAD, GOOD), *stream("total_time", [300.0], [100.0])]
    for found in (look(samples, policy(error_rate=RATE, total_time=TIMES)), look([], policy(total_time=TIMES))):
        written = json.dumps(found.to_json(), allow_nan=False)
        assert AnalysisResult.from_json(json.loads(written)) == found


streams = st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.3, 0.7, 1.0])), max_size=80)


@given(
    values=streams, cuts=st.lists(st.integers(0, 80), max_size=5), name=st.sampled_from(["judge_score", "total_time"])
)
@settings(max_examples=60, deadline=None)
def test_when_one_looks_makes_no_difference(values: list[tuple[bool, float]], cuts: list[int], name: str) -> None:
    by = policy(**{name: MetricPolicy(fail_above=1.0 if name == "total_time" else 0.0, margin=1.0)})
    samples = [Sample(name, CANARY if canary else STABLE, value, index) for index, (canary, value) in enumerate(values)]
    often = Analysis(by, CANARY, STABLE)
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(samples)], strict=True):
        often.add(samples[begin:end])
        often.result(ENOUGH, since=0, missing={})
    found, once = only(often.result(ENOUGH, since=0, missing={})), only(look(samples, by))
    assert (found.verdict, found.canary_n) == (once.verdict, once.canary_n)
    assert [found.p_fail, found.p_pass] == pytest.approx([once.p_fail, once.p_pass])
    if found.estimate is not None and found.low is not None and found.high is not None:
        assert found.low <= found.high
        assert found.verdict != "fail" or found.low >= found.bound_fail
        assert found.verdict != "pass" or found.high <= found.bound_margin + 1e-9
