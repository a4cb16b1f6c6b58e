from __future__ import annotations

import json
import math

import pytest

from sluice.infra.errors import InputError
from sluice.rag.gate import GatePolicy, Measurement, judge


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


def test_the_same_measurements_give_the_same_intervals_and_no_spread_is_not_certainty() -> None:
    assert judge(GOOD, GOOD).checks == judge(GOOD, GOOD).checks
    hundred = measured("hundred", (1, 100))
    result = judge(Measurement("rebuilt", hundred.ranks), hundred)
    change = {check.name: check for check in result.checks}["recall@2, change"]
    # No change in 100 queries: one in 28 may still change (exact, 1 - 0.025 ** (1 / 100)), more than the margin.
    assert [change.low, change.high] == pytest.approx([-0.036, 0.036], abs=0.002)
    assert (change.estimate, change.verdict, result.verdict) == (0.0, "inconclusive", "inconclusive")
