"""How often the gate is wrong: thousands of simulated comparisons whose truth is known, through the whole gate.

    .venv/bin/python benchmarks/gate_rates.py [--simulations 2000] [--only TEXT] [--out FILE.json]

Every simulation draws the scores of a champion and a candidate on the same items, and asks the gate as a pipeline does:
`compare`, then `decide`; in sequential mode a look after every batch, until the stopping rule of a sequential suite
says that it is certain (all looks from one pass over the always-valid p-values; in the first 40 simulations the gate
itself takes them too, and must say the same).

A false pass is a pass of a candidate that is equal where it must be better, or worse by exactly the margin; a false
fail is a fail of one that is truly better, or equal where equal is enough. Each may happen in at most alpha of the
simulations (2.5% at the policy's 95%); beside each rate stands the exact 95% interval that the number of simulations
leaves, and `holds` says that this interval does not lie above alpha.

Scores look like those of answers: a third to nine tenths of the answers of two releases are the same, the others
differ by anything up to all; a candidate that is worse breaks some answers wholly.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # each process has one core

import numpy as np

from benchmarks.machine import machine
from sluice.evaluation.catalogue import catalogue
from sluice.evaluation.comparison import compare
from sluice.evaluation.gate import CheckResult, Subjects, decide
from sluice.evaluation.items import asking_order
from sluice.evaluation.policy import Policy
from sluice.evaluation.scores import Scores, column, scores_of
from sluice.evaluation.stopping import joined_columns, settled
from sluice.provenance.canonical import digest_json
from sluice.statistics.bounded import rate_interval
from sluice.statistics.paired import Floats, holm
from sluice.statistics.sequential import betting_ps

BATCH = 32
THROUGH_THE_GATE = 40
"""Simulations of each scenario whose looks are taken by the gate itself too; any difference stops the benchmark."""
ERROR_BUDGET = 0.02
METRICS = catalogue()
_NOTHING = digest_json(None)
_NOBODY = Subjects(_NOTHING, _NOTHING, _NOTHING, _NOTHING)
_NEVER = datetime(1970, 1, 1, tzinfo=UTC)

Draw = Callable[[np.random.Generator, int], tuple[Floats, Floats]]
"""Values [n] of champion and candidate in one metric; NaN where there is none."""


def texts(changed: float, *, gain: float = 0.0, broken: float = 0.0, missing: float = 0.0) -> Draw:
    """Word overlap in [0, 1]. A share `changed` of the answers is another one, as good as the champion's on average and
    then `gain` better (as a share of what lacks to 1); a share `broken` of all scores 0; `missing` have no score."""

    def draw(rng: np.random.Generator, n: int) -> tuple[Floats, Floats]:
        before, other = rng.beta(0.9, 0.6, n), rng.beta(0.9, 0.6, n)
        after = np.where(rng.random(n) < changed, other + gain * (1 - other), before)
        after = np.where(rng.random(n) < broken, 0.0, after)
        return before, np.where(rng.random(n) < missing, np.nan, after)

    return draw


def exact(gained: float, lost: float, missing: float = 0.0) -> Draw:
    """Right or wrong, 0 or 1: the candidate turns a share `gained` of all right, and a share `lost` wrong."""

    def draw(rng: np.random.Generator, n: int) -> tuple[Floats, Floats]:
        kind = rng.choice(4, size=n, p=[gained, lost, 0.6 * (1 - gained - lost), 0.4 * (1 - gained - lost)])
        before, after = np.array([0.0, 1, 1, 0])[kind], np.array([1.0, 0, 1, 0])[kind]
        return before, np.where(rng.random(n) < missing, np.nan, after)

    return draw


LOSS = 0.05 / 0.6
"""Share of broken answers that costs 0.05 of a mean of 0.6."""
BETTER: Mapping[str, Any] = {"rule": "superiority", "metric": "token_f1"}
RIGHT: Mapping[str, Any] = {"rule": "superiority", "metric": "exact_match"}
NO_WORSE: Mapping[str, Any] = {"rule": "non_inferiority", "metric": "token_f1", "margin": 0.05}
STILL_RIGHT: Mapping[str, Any] = {"rule": "non_inferiority", "metric": "exact_match", "margin": 0.05}
SEVERAL = (BETTER, STILL_RIGHT, {**NO_WORSE, "metric": "rouge_l"}, {**NO_WORSE, "metric": "answer_rate"})


def four(gain: float, lost: float = 0.05) -> Mapping[str, Draw]:
    """The metrics of `SEVERAL`: token F1 gains, exact match changes by 0.05 - `lost`, the others gain when F1 does."""
    return {
        "token_f1": texts(0.65, gain=gain),
        "exact_match": exact(0.05, lost),
        "rouge_l": texts(0.3, gain=gain),
        "answer_rate": exact(0.01 + gain / 5, 0.01),
    }


@dataclass(frozen=True)
class Scenario:
    """`wrong` is the verdict that may come in at most alpha of the simulations; `never`: not once."""

    name: str
    wrong: Literal["pass", "fail"]
    checks: tuple[Mapping[str, Any], ...]
    draws: Mapping[str, Draw]
    never: bool = False


SCENARIOS = (
    Scenario("better (mean): equal, two thirds of answers differ", "pass", (BETTER,), {"token_f1": texts(0.65)}),
    Scenario("better (mean): equal, one answer in ten differs", "pass", (BETTER,), {"token_f1": texts(0.1)}),
    Scenario("better (mean): gains 0.05", "fail", (BETTER,), {"token_f1": texts(0.65, gain=0.05 / 0.26)}),
    Scenario("better (mean): gains 0.10", "fail", (BETTER,), {"token_f1": texts(0.65, gain=0.10 / 0.26)}),
    Scenario("better (binary): equal, 20% differ", "pass", (RIGHT,), {"exact_match": exact(0.10, 0.10)}),
    Scenario("better (binary): gains 0.05", "fail", (RIGHT,), {"exact_match": exact(0.10, 0.05)}),
    Scenario("better (binary): gains 0.10", "fail", (RIGHT,), {"exact_match": exact(0.15, 0.05)}),
    Scenario("no worse (mean): loses the margin", "pass", (NO_WORSE,), {"token_f1": texts(0.3, broken=LOSS)}),
    Scenario("no worse (mean): loses it, else the same", "pass", (NO_WORSE,), {"token_f1": texts(0, broken=LOSS)}),
    Scenario("no worse (mean): equal", "fail", (NO_WORSE,), {"token_f1": texts(0.3)}),
    Scenario("no worse (binary): loses the margin", "pass", (STILL_RIGHT,), {"exact_match": exact(0.05, 0.10)}),
    Scenario("no worse (binary): equal, 10% differ", "fail", (STILL_RIGHT,), {"exact_match": exact(0.05, 0.05)}),
    Scenario("four checks: equal where one must be better", "pass", SEVERAL, four(0.0)),
    Scenario("four checks: far better, but one loses the margin", "pass", SEVERAL, four(0.8, lost=0.10)),
    Scenario("four checks: gains 0.10", "fail", SEVERAL, four(0.10 / 0.26)),
    Scenario("1% missing: equal", "pass", (BETTER,), {"token_f1": texts(0.65, missing=0.01)}),
    Scenario("1% missing: loses the margin", "pass", (NO_WORSE,), {"token_f1": texts(0.3, broken=LOSS, missing=0.01)}),
    Scenario("30% missing: far better", "pass", (BETTER,), {"token_f1": texts(0.65, gain=0.8, missing=0.3)}, True),
)


def policy_of(scenario: Scenario) -> Policy:
    return Policy.model_validate({"error_budget": ERROR_BUDGET, "checks": [dict(check) for check in scenario.checks]})


def scores(columns: Mapping[str, Floats], order: tuple[str, ...], planned: int | None) -> Scores:
    """Scores of the items of `order`, the first of `planned` ones if that is not None."""
    made = [
        column(
            METRICS[name],
            {item: "timeout" if np.isnan(v) else float(v) for item, v in zip(order, values, strict=True)},
        )
        for name, values in columns.items()
    ]
    joined = joined_columns([made], sequential={} if planned is None else dict.fromkeys(columns, planned))
    return scores_of(joined, dict.fromkeys(order, "answered"))


def ask_gate(
    pairs: Mapping[str, tuple[Floats, Floats]], n: int, policy: Policy, order: tuple[str, ...], planned: int | None
) -> tuple[str, tuple[CheckResult, ...]]:
    """Verdict and checks on the first `n` items."""
    old, new = (scores({name: pair[side][:n] for name, pair in pairs.items()}, order[:n], planned) for side in (0, 1))
    decision = decide(compare(old, new, policy), policy, _NOBODY, _NEVER)
    return decision.verdict, decision.checks


@dataclass(frozen=True)
class Simulated:
    """Verdicts on all items at once and sequentially, and the share of items that the latter asked."""

    fixed: str
    sequential: str
    asked: float


def simulate(scenario: Scenario, items: int, index: int) -> Simulated:
    """One comparison, on all items and sequentially."""
    rng = np.random.default_rng([index, *scenario.name.encode()])
    order, policy = order_of(items), policy_of(scenario)
    pairs = {name: draw(rng, items) for name, draw in sorted(scenario.draws.items())}
    fixed, _ = ask_gate(pairs, items, policy, order, None)
    verdict, n = look_by_look(scenario, pairs, items)
    if index < THROUGH_THE_GATE:
        gates = look_by_look_through_the_gate(scenario, pairs, items)
        assert gates == (verdict, n), f"{scenario.name}, {index}: {verdict} at {n}, the gate {gates}"
    return Simulated(fixed, verdict, n / items)


def look_by_look(scenario: Scenario, pairs: Mapping[str, tuple[Floats, Floats]], items: int) -> tuple[str, int]:
    """Verdict and number of items of a sequential suite. One pass over the always-valid p-values of all looks gives
    what a comparison at each look gives, in a tenth of the time."""
    policy = policy_of(scenario)
    looks = np.array([*range(BATCH, items, BATCH), items])
    shown, refuted = [], []
    enough = np.full(len(looks), True)
    for check in scenario.checks:
        before, after = pairs[str(check["metric"])]
        gains, null = after - before, -float(check.get("margin", 0.0))
        valid = np.cumsum(~np.isnan(gains))[looks - 1]
        enough &= (looks - valid <= ERROR_BUDGET * looks) & (valid >= policy.minimum_n)
        gains = gains[~np.isnan(gains)]
        shown.append(betting_ps(gains, null, -1, 1, planned=items)[valid - 1])
        refuted.append(betting_ps(-gains, -null, -1, 1, planned=items)[valid - 1])
    for place, n in enumerate(looks.tolist()):
        if not enough[place]:
            continue  # without scores enough the gate says nothing, whatever they are
        if any(ps[place] <= policy.alpha for ps in refuted):
            return "fail", n
        if all(p <= policy.alpha for p in holm([float(ps[place]) for ps in shown])):
            return "pass", n
    return "inconclusive", items


def look_by_look_through_the_gate(
    scenario: Scenario, pairs: Mapping[str, tuple[Floats, Floats]], items: int
) -> tuple[str, int]:
    """The same, as a pipeline does it: a comparison and a decision at each look."""
    order, policy = order_of(items), policy_of(scenario)
    verdict = "inconclusive"
    for n in [*range(BATCH, items, BATCH), items]:
        verdict, checks = ask_gate(pairs, n, policy, order, items)
        if settled(checks, whole=n == items)[0]:
            return verdict, n
    return verdict, items


@functools.cache
def order_of(items: int) -> tuple[str, ...]:
    """Ids in the order in which they would be asked."""
    return asking_order(f"item-{number}" for number in range(items))


def summary(scenario: Scenario, found: Iterable[Simulated]) -> dict[str, Any]:
    """Rates of one scenario in both modes."""
    every = list(found)
    allowed = 0.0 if scenario.never else round(policy_of(scenario).alpha, 6)
    result: dict[str, Any] = {"scenario": scenario.name, "wrong": scenario.wrong, "allowed": allowed}
    for mode in ("fixed", "sequential"):
        counts = Counter(getattr(one, mode) for one in every)
        interval = rate_interval(counts[scenario.wrong], len(every), confidence=0.95)
        result[mode] = {
            **{verdict: round(counts[verdict] / len(every), 4) for verdict in ("pass", "fail", "inconclusive")},
            "wrong_interval": [round(interval.low, 4), round(interval.high, 4)],
            "holds": interval.low <= allowed,
        }
    result["items_saved"] = round(1 - float(np.mean([one.asked for one in every])), 3)
    return result


def table(results: Iterable[Mapping[str, Any]]) -> str:
    """For the terminal: percentages; the rate that may not exceed alpha is marked."""
    lines = [f"{'':62}{'all items':>27}{'sequential':>27}   saved", f"{'':62}" + f"{'pass   fail   open':>27}" * 2]
    for row in results:
        cells = []
        for mode in ("fixed", "sequential"):
            marked = [f"{100 * row[mode][v]:5.1f}{'*' if v == row['wrong'] else ' '}" for v in ("pass", "fail")]
            cells.append(f"{' '.join(marked)} {100 * row[mode]['inconclusive']:5.1f}".rjust(27))
        holds = "" if row["fixed"]["holds"] and row["sequential"]["holds"] else "  ABOVE ALPHA"
        lines.append(f"{row['scenario']:62}{''.join(cells)}   {100 * row['items_saved']:4.0f}%{holds}")
    return "\n".join([*lines, "* may be 2.5% at most (of 30% missing: never)"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=2_000, help="of each scenario")
    parser.add_argument("--items", type=int, default=320)
    parser.add_argument("--only", default="", help="scenarios whose name holds this text")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gate_rates.json"))
    chosen = parser.parse_args()
    begun = time.monotonic()
    result: dict[str, Any] = {
        "machine": machine(), "simulations": chosen.simulations, "items": chosen.items, "batch": BATCH, "scenarios": []
    }  # fmt: skip
    with multiprocessing.Pool(chosen.processes) as pool:
        for place, scenario in enumerate(SCENARIOS):
            if chosen.only in scenario.name:
                work = functools.partial(simulate_named, place, chosen.items)
                found = pool.map(work, range(chosen.simulations), chunksize=20)
                result["scenarios"].append(summary(scenario, found))
                print(f"{time.monotonic() - begun:6.0f} s  {scenario.name}", file=sys.stderr, flush=True)
    result["seconds"] = round(time.monotonic() - begun)
    print(table(result["scenarios"]))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(result, indent=2) + "\n")


def simulate_named(place: int, items: int, index: int) -> Simulated:
    """`simulate` for another process: functions that draw cannot be sent there, a place in the list can."""
    return simulate(SCENARIOS[place], items, index)


if __name__ == "__main__":
    main()
