"""The others' rules, on traffic made by hand: they have to do what their documentation says."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.rollout_rules import LIMITS, Baseline, Exposure, Outcome, Rollouts, Rule, Step, documented, rules
from benchmarks.rollout_simulation import POLICY, SCENARIOS
from benchmarks.rollout_traffic import CANARY, STABLE, Fault, Floats, Traffic, generate
from sluice.serving.policy import load_policy

STEPS = (Step(10, 600), Step(50, 600))
BASELINE = Baseline({0.5: 200.0, 0.95: 400.0, 0.99: 500.0}, 0.8)


def traffic(failing: tuple[float, float] = (0, 0), until: float = 3000) -> Traffic:
    """One request a second, each a session, one in ten on a canary of 10%; the canary fails all in `failing`."""
    start = np.arange(0, until, 1.0)
    n = len(start)
    failed = np.zeros((2, n), dtype=bool)
    failed[CANARY] = (start >= failing[0]) & (start < failing[1])
    same: Floats = np.ones((2, n))
    point: Floats = np.arange(n, dtype=np.float64) % 10 * 10 + 5
    return Traffic(
        start, np.arange(n), point, start + same / 2, failed, 200 * same, 20 * same,
        0.8 * same, start + same, np.nan * same, start + same, failed[CANARY], 0.0,
    )  # fmt: skip


def outcome(rule: Rule, made: Traffic) -> Outcome:
    return Rollouts(made, STEPS, BASELINE).outcomes()[rules().index(rule)]


def rule(tool: str, limit: int) -> Rule:
    """Success rate at least 0.99, looked at every minute over a minute."""
    return next(
        one
        for one in rules()
        if one.watch.tool == tool
        and one.watch.signals == ("errors",)
        and (one.watch.strictness, one.watch.interval_s, one.watch.window_s, one.limit) == (5, 60.0, 60.0, limit)
    )


@pytest.mark.parametrize("tool", ["Argo Rollouts", "Flagger"])
def test_a_good_canary_is_promoted_after_its_steps(tool: str) -> None:
    found = outcome(rule(tool, 0), traffic())
    assert found.promoted == 1200
    assert found.rolled_back == np.inf
    # A tenth, then a half, then everybody.
    assert found.exposed == 60 + 300 + 1800


def test_argo_aborts_at_the_measurement_that_exceeds_its_limit() -> None:
    bad = traffic((100, 400))
    # Windows that end at 120, 180, ... 360 and 420 hold failed requests: six.
    assert outcome(rule("Argo Rollouts", 0), bad).rolled_back == 120
    assert outcome(rule("Argo Rollouts", 2), bad).rolled_back == 240
    assert outcome(rule("Argo Rollouts", 5), bad).rolled_back == 420
    # Failures below the limit hold nothing up.
    assert outcome(rule("Argo Rollouts", 9), bad).promoted == 1200


def test_flagger_counts_failures_holds_the_weight_and_rolls_back_at_the_next_check() -> None:
    bad = traffic((100, 400))
    assert outcome(rule("Flagger", 0), bad).rolled_back == 180
    assert outcome(rule("Flagger", 2), bad).rolled_back == 300
    # A failed check at the end of a step puts it off, and what failed before is never forgotten.
    assert outcome(rule("Flagger", 9), traffic((590, 600))).promoted == 1260
    twice = traffic((100, 140))
    twice.failed[CANARY] |= (twice.start >= 700) & (twice.start < 710)
    assert outcome(rule("Flagger", 2), twice).rolled_back == 780


def test_exposure_counts_bad_answers_until_the_rollback_and_everybody_s_after_a_promotion() -> None:
    exposure = Exposure(traffic((0, 3000)))
    raised = [(0.0, 10.0), (600.0, 50.0)]
    assert exposure.outcome(raised, 900, failed=True) == Outcome(900, np.inf, 60 + 150, 60 + 150)
    assert exposure.outcome(raised, 900, failed=False).bad == 60 + 150 + 2100


def test_configurations_are_many_and_the_documented_ones_are_among_them() -> None:
    known = rules()
    assert len(known) == len(set(known))
    assert {one.limit for one in known} == set(LIMITS)
    for tool in ("Argo Rollouts", "Flagger"):
        assert documented(tool) in known


def test_both_answers_of_a_request_differ_by_the_fault_alone() -> None:
    calm = generate(Fault(), np.random.default_rng(1))
    assert not calm.bad.any()
    assert np.array_equal(calm.end[STABLE], calm.end[CANARY])
    slow = generate(Fault(first_token=1.2), np.random.default_rng(1))
    both = ~slow.failed.any(axis=0)
    assert np.allclose(slow.first_token[CANARY][both], 1.2 * slow.first_token[STABLE][both])
    worse = generate(SCENARIOS[4].fault, np.random.default_rng(1))
    lost = np.nanmean(worse.score[STABLE]) - np.nanmean(worse.score[CANARY])
    assert lost == pytest.approx(0.05, abs=0.01)


def test_the_production_policy_is_valid() -> None:
    policy = load_policy(POLICY)
    assert [step.weight for step in policy.steps] == [1, 5, 25, 50]
