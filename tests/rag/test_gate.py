from __future__ import annotations

import json
import math

import numpy as np
import pytest

from sluice.infra.errors import InputError
from sluice.rag.gate import GatePolicy, Measurement, bootstrap_mean, judge


def measured(name: str, *ranks: tuple[int | None, int]) -> Measurement:
    """`(rank, how often)` pairs."""
    return Measurement(name, tuple(rank for rank, times in ranks for _ in range(times)))


GOOD = measured("good", (1, 280), (2, 70), (5, 100), (None, 50))


def test_metrics() -> None:
    some = measured("x", (1, 1), (2, 1), (4, 1), (None, 1))
    assert some.recall(1) == 0.25
    assert some.recall(2) == 0.5
    assert some.recall(5) == 0.75
    assert some.mean_reciprocal_rank == pytest.approx((1 + 0.5 + 0.25) / 4)
    assert math.isnan(measured("empty").recall(2))


def test_a_first_index_needs_the_floor_only() -> None:
    result = judge(GOOD, None)
    assert result.verdict == "pass"
    assert result.current is None
    assert result.metrics["recall@2"] == 0.7
    assert "there is no current index to compare with" in result.reasons


def test_shuffled_vectors_fail_against_the_floor_and_the_current_index() -> None:
    shuffled = measured("shuffled", (1, 2), (9, 20), (None, 478))
    assert judge(shuffled, None).verdict == "fail"
    compared = judge(shuffled, GOOD)
    assert compared.verdict == "fail"
    assert all(check.verdict == "fail" for check in compared.checks)


def test_a_small_loss_beyond_the_margin_fails_although_the_floor_holds() -> None:
    worse = measured("worse", (1, 220), (2, 70), (5, 160), (None, 50))
    result = judge(worse, GOOD)
    verdicts = {check.name: check.verdict for check in result.checks}
    assert verdicts["recall@2, floor"] == "pass"
    assert verdicts["recall@2, change"] == "fail"
    assert result.verdict == "fail"


def test_a_difference_that_the_queries_cannot_settle_is_inconclusive() -> None:
    # 12 questions won and 14 lost of 500: no harm seen, none excluded either.
    ranks = list(GOOD.ranks)
    for i in range(14):
        ranks[i] = 5
    for i in range(400, 412):
        ranks[i] = 1
    result = judge(Measurement("other", tuple(ranks)), GOOD)
    assert result.verdict == "inconclusive"
    assert any("inconclusive" in reason for reason in result.reasons)


def test_the_same_ranks_pass_and_the_pairs_are_what_counts() -> None:
    assert judge(Measurement("rebuilt", GOOD.ranks), GOOD).verdict == "pass"
    # The same mean by other questions is not the same index: pairing sees the swap.
    moved = Measurement("moved", tuple(reversed(GOOD.ranks)))
    assert judge(moved, GOOD).verdict == "inconclusive"


def test_too_few_queries_are_inconclusive() -> None:
    result = judge(measured("few", (1, 99)), None)
    assert result.verdict == "inconclusive"
    assert "99 labelled queries are fewer than the 100 required" in result.reasons
    assert judge(measured("none"), None, GatePolicy(min_queries=1)).verdict == "inconclusive"


def test_other_queries_cannot_be_compared() -> None:
    with pytest.raises(InputError, match="500 and 499"):
        judge(GOOD, Measurement("other", GOOD.ranks[1:]))


def test_the_decision_is_json() -> None:
    decision = json.loads(json.dumps(judge(GOOD, GOOD).to_json(), allow_nan=False))
    assert decision["verdict"] == "pass"
    assert decision["policy"]["margin"] == 0.02
    assert decision["checks"][0]["low"] < decision["checks"][0]["estimate"] < decision["checks"][0]["high"]


@pytest.mark.parametrize("change", [{"k": 0}, {"margin": 0.0}, {"recall_floor": math.nan}, {"confidence": 1.0}])
def test_a_policy_without_teeth_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        GatePolicy(**change)  # type: ignore[arg-type]


def test_the_bootstrap_is_seeded_and_covers_the_mean() -> None:
    generator = np.random.default_rng(3)
    covered = 0
    for trial in range(60):
        values = (generator.random(300) < 0.7).astype(float)
        mean, low, high = bootstrap_mean(values, confidence=0.95, resamples=300, seed=trial)
        assert low < mean < high
        covered += low <= 0.7 <= high
    assert covered >= 52
    again = bootstrap_mean(values, confidence=0.95, resamples=300, seed=1)
    assert bootstrap_mean(values, confidence=0.95, resamples=300, seed=1) == again


def test_no_spread_is_not_certainty_and_nan_is_never_a_number() -> None:
    _, low, high = bootstrap_mean(np.zeros(100), confidence=0.95, resamples=200, seed=1)
    assert low == pytest.approx(-0.03, abs=0.001)
    assert high == pytest.approx(0.03, abs=0.001)
    assert all(math.isnan(x) for x in bootstrap_mean(np.array([0.1, np.nan]), confidence=0.95, resamples=200, seed=1))
    assert all(math.isnan(x) for x in bootstrap_mean(np.array([]), confidence=0.95, resamples=200, seed=1))
