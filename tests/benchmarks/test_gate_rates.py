"""The gate's error rates in small: enough simulations to notice an alpha that is broken, few enough for every day."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy import stats

from benchmarks.gate_rates import SCENARIOS, Scenario, Simulated, simulate, summary, table

ALPHA = 0.025
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


def run(scenario: Scenario, simulations: int, items: int) -> list[Simulated]:
    return [simulate(scenario, items, index) for index in range(simulations)]


@pytest.mark.parametrize(
    ("name", "simulations"),
    [
        # Enough of them that an alpha twice as large would be noticed; means take longer, and err less.
        ("no worse (binary): loses the margin", 1_000),
        ("better (mean): equal, one answer in ten differs", 120),
        ("no worse (mean): loses it, else the same", 120),
    ],
)
def test_equal_is_not_better_and_the_margin_is_not_kept_more_often_than_alpha_says(name: str, simulations: int) -> None:
    found = run(BY_NAME[name], simulations, 128)
    # Of so many simulations at alpha, this count is passed once in a thousand times.
    most = stats.binom.ppf(0.999, simulations, ALPHA)
    assert sum(one.fixed == "pass" for one in found) <= most
    assert sum(one.sequential == "pass" for one in found) <= most


def test_a_candidate_far_better_passes_early_and_is_never_failed() -> None:
    scenario = BY_NAME["better (binary): gains 0.10"]
    found = run(scenario, 30, 320)
    assert sum(one.fixed == "pass" for one in found) >= 25
    assert sum(one.sequential == "pass" for one in found) >= 15
    assert not any("fail" in (one.fixed, one.sequential) for one in found)
    assert summary(scenario, found)["items_saved"] > 0.15


def test_with_scores_missing_beyond_the_budget_nothing_passes() -> None:
    found = run(BY_NAME["30% missing: far better"], 5, 160)
    assert {one.fixed for one in found} == {one.sequential for one in found} == {"inconclusive"}


def test_the_same_simulation_is_the_same_and_its_summary_says_whether_alpha_holds() -> None:
    scenario = SCENARIOS[4]
    assert simulate(scenario, 128, 3) == simulate(scenario, 128, 3)
    broken = summary(scenario, [Simulated("pass", "inconclusive", 1.0)] * 5 + [Simulated("fail", "pass", 0.5)] * 15)
    assert (broken["fixed"]["pass"], broken["fixed"]["holds"], broken["sequential"]["holds"]) == (0.25, False, False)
    assert broken["items_saved"] == pytest.approx(0.375)
    assert "ABOVE ALPHA" in table([broken])
    kept = summary(scenario, [Simulated("inconclusive", "inconclusive", 1.0)] * 20)
    assert kept["fixed"]["holds"]
    assert kept["fixed"]["wrong_interval"][0] == 0.0
    assert "ABOVE" not in table([kept])


def test_the_published_rates_hold_alpha() -> None:
    result = json.loads((Path(__file__).parents[2] / "benchmarks/results/gate_rates.json").read_text())
    assert [row["scenario"] for row in result["scenarios"]] == [scenario.name for scenario in SCENARIOS]
    assert result["simulations"] >= 2_000
    for row in result["scenarios"]:
        for mode in ("fixed", "sequential"):
            assert row[mode]["holds"], f"{row['scenario']}, {mode}"
