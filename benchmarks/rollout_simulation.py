"""How often a rollout ends wrongly, and what users pay until a bad release is out: thousands of simulated rollouts.

    .venv/bin/python benchmarks/rollout_simulation.py [--rollouts 2000] [--only TEXT] [--out FILE.json]

Every rollout draws its traffic (`rollout_traffic.py`) and lets three judges decide about it: Sluice's analysis and trip
under the production policy beside this file, and the rules of Argo Rollouts and Flagger at all their thresholds
(`rollout_rules.py`). A bad answer is one that is worse than what the same user would have had from stable.
Bad answers count until the release is rolled back; one that is promoted goes to everybody until the horizon.

Sluice looks every `check_interval_s`, as the policy says. Its p-values are the smallest after any single value, so a
look a second would find the same failures, some seconds sooner: false alarms are those of looking always. To be quick,
the comparisons are fed with plain numbers; in the first rollouts of each scenario `Analysis` itself is fed too, with
samples, and must say the same at every look.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import sys
import time
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # each process has one core

import numpy as np

from benchmarks.machine import machine
from benchmarks.rollout_rules import QUANTILES, Baseline, Exposure, Outcome, Rollouts, Step, Tool, documented, rules
from benchmarks.rollout_traffic import (
    CANARY,
    GIVEN_UP_S,
    HORIZON_S,
    STABLE,
    Fault,
    Floats,
    Ints,
    Traffic,
    generate,
)  # fmt: skip
from sluice.serving.analysis import Analysis, Verdict
from sluice.serving.comparison import Comparison, Limits
from sluice.serving.metrics import LIVE_METRICS
from sluice.serving.observations import Observed, Sample
from sluice.serving.policy import AnalysisPolicy, Minimum, RolloutPolicy, TripPolicy, load_policy
from sluice.serving.trip import Tripwire
from sluice.statistics.bounded import rate_interval

TOOLS: Mapping[Tool, str] = {"Argo Rollouts": "tab:orange", "Flagger": "tab:blue"}
FLOOR = 0.03
"""Rates of 0 are drawn here, percent."""

THROUGH_THE_ANALYSIS = 5
"""Rollouts of each scenario in which `Analysis` itself decides too; any difference stops the benchmark."""
NAMES = ("stable", "canary")
POLICY = Path(__file__).parent / "rollout-production.yaml"


@dataclass(frozen=True)
class Scenario:
    """`good`: rolling it back is a false alarm."""

    name: str
    fault: Fault
    good: bool = False


SCENARIOS = (
    Scenario("as good as stable", Fault(), good=True),
    Scenario("as good, and an incident hits both", Fault(incident=True), good=True),
    Scenario("2 points more errors", Fault(errors=0.02)),
    Scenario("first token 20% later", Fault(first_token=1.2)),
    Scenario("quality 5 points lower", Fault(broken=0.05 / 0.8 / 0.95)),
    Scenario("fails everything", Fault(outage=True)),
    Scenario("takes requests, never answers", Fault(silent=True)),
)


@dataclass(frozen=True)
class Known:
    """Values [n] of one metric in the order in which they became known, of both releases."""

    metric: str
    side: list[int]
    session: list[int]
    value: list[float]
    known: list[float]


class Feed:
    """What becomes known of one traffic, for whatever weights the rollout has."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self.canary = np.zeros(len(traffic.start), dtype=bool)
        self._assigned = 0
        self._streams: list[tuple[str, int, Ints, Floats, Floats]] = []
        for metric, values, known in (
            ("error_rate", traffic.failed.astype(np.float64), traffic.end),
            ("time_to_first_token", traffic.first_token, traffic.end),
            ("time_per_token", traffic.per_token, traffic.end),
            ("judge_score", traffic.score, traffic.score_known),
            ("thumbs_down", traffic.thumb, traffic.thumb_known),
        ):
            for side in (STABLE, CANARY):
                which = np.flatnonzero(~np.isnan(values[side]))
                which = which[np.argsort(known[side][which], kind="stable")]
                self._streams.append((metric, side, which, known[side][which], values[side][which]))

    def assign(self, until: float, weight: float) -> None:
        """Requests that start before `until`, and have no release yet, go where `weight` sends them."""
        last = int(np.searchsorted(self._traffic.start, until))
        self.canary[self._assigned : last] = self._traffic.place[self._assigned : last] < weight
        self._assigned = last

    def between(self, since: float, until: float) -> Iterator[Known]:
        """What becomes known in [since, until), metric by metric."""
        parts = []
        for metric, side, which, known, values in self._streams:
            part = slice(*np.searchsorted(known, (since, until)))
            mine = self.canary[which[part]] == (side == CANARY)
            parts.append((which[part][mine], values[part][mine], known[part][mine]))
            if side == CANARY:
                stable, canary = parts
                times = np.concatenate((stable[2], canary[2]))
                order = np.argsort(times, kind="stable")
                sides = np.repeat((STABLE, CANARY), (len(stable[0]), len(canary[0])))
                session = self._traffic.session[np.concatenate((stable[0], canary[0]))]
                value = np.concatenate((stable[1], canary[1]))
                yield Known(metric, *(each[order].tolist() for each in (sides, session, value, times)))
                parts = []

    def silent_since(self, until: float, finished: float) -> tuple[float, int]:
        """Since when the canary has had requests and finished none, at `until`, if it last finished one at `finished`;
        and how many there are. inf: it has none."""
        begin, end = np.searchsorted(self._traffic.start, (until - GIVEN_UP_S - 1, until))
        part = slice(int(begin), int(end))
        active = self._traffic.start[part][self.canary[part] & (self._traffic.end[CANARY][part] > until)]
        return (max(float(active[0]), finished), len(active)) if len(active) else (np.inf, 0)


class Quick:
    """`Analysis` without words: its comparisons and levels, fed with numbers."""

    def __init__(self, policy: AnalysisPolicy) -> None:
        fail_level = policy.false_rollback / sum(metric.gating for metric in policy.metrics.values())
        self._levels = fail_level, policy.false_pass
        self._comparisons = {
            name: Comparison(
                LIVE_METRICS[name].kind, Limits(limits.fail_above, limits.margin, fail_level, policy.false_pass)
            )
            for name, limits in policy.metrics.items()
        }
        self._most = policy.requests_per_session or sys.maxsize
        self._used: dict[tuple[str, int, int], int] = defaultdict(int)
        self._seen: dict[str, list[float]] = {"error_rate": [], "thumbs_down": []}

    def add(self, one: Known) -> None:
        comparison, seen = self._comparisons[one.metric], self._seen.get(one.metric)
        for side, session, value, known in zip(one.side, one.session, one.value, one.known, strict=True):
            key = one.metric, side, session
            if self._used[key] < self._most:
                self._used[key] += 1
                comparison.add(side == CANARY, value, known)
                if seen is not None and side == CANARY:
                    seen.append(known)

    def verdict(self, minimum: Minimum, since: float) -> Verdict:
        evidence = {name: one.evidence(since) for name, one in self._comparisons.items()}
        if any(one.p_fail <= self._levels[0] for one in evidence.values()):
            return "fail"
        for name, needed in (("error_rate", minimum.requests), ("thumbs_down", minimum.feedback)):
            if len(self._seen[name]) - bisect_left(self._seen[name], since) < needed:
                return "inconclusive"
        for name, one in evidence.items():
            asked = name != "thumbs_down" or minimum.feedback > 0
            if asked and (one.p_pass > self._levels[1] or not one.in_step or one.against):
                return "inconclusive"
        return "pass"


class Words:
    """The same with `Analysis` itself."""

    def __init__(self, policy: AnalysisPolicy) -> None:
        self._analysis = Analysis(policy, NAMES[CANARY], NAMES[STABLE])

    def add(self, one: Known) -> None:
        rows = zip(one.side, one.session, one.value, one.known, strict=True)
        self._analysis.add(Sample(one.metric, NAMES[s], v, k, session=str(n)) for s, n, v, k in rows)

    def verdict(self, minimum: Minimum, since: float) -> Verdict:
        return self._analysis.result(minimum, since=since, missing={}).verdict


class Alarm:
    """The product's `Tripwire`, asked at the moments at which it could have something to say."""

    def __init__(self, policy: TripPolicy) -> None:
        self._policy = policy
        self._recent: deque[tuple[float, int, float]] = deque()
        self._failed: deque[float] = deque()
        self._finished = 0.0

    def look(self, one: Known, feed: Feed, now: float) -> float | None:
        """When it trips on what became known until `now`; `one` holds failed answers."""
        for side, value, known in zip(one.side, one.value, one.known, strict=True):
            self._recent.append((known, side, value))
            if side == CANARY:
                if known - self._finished >= self._policy.silent_s and (tripped := self._silent(feed, known)):
                    return tripped
                self._finished = known
                if value and self._burst(known):
                    return known
        return self._silent(feed, now) if now - self._finished >= self._policy.silent_s else None

    def _burst(self, now: float) -> bool:
        self._failed.append(now)
        while self._recent[0][0] < now - self._policy.within_s:
            self._recent.popleft()
        while self._failed[0] < now - self._policy.within_s:
            self._failed.popleft()
        if len(self._failed) < self._policy.failed:
            return False
        samples = tuple(Sample("error_rate", NAMES[side], value, known) for known, side, value in self._recent)
        return self._tripwire().look(Observed(samples), now) is not None

    def _silent(self, feed: Feed, now: float) -> float | None:
        since, active = feed.silent_since(now, self._finished)
        end = since + self._policy.silent_s
        if end > now:
            return None
        wire = self._tripwire()
        for moment in (since, end):
            # Stable has finished something just now: it has some requests a second.
            finished = {NAMES[CANARY]: self._finished, NAMES[STABLE]: moment}
            tripped = wire.look(Observed((), {NAMES[CANARY]: active}, finished), moment)
        return None if tripped is None else end

    def _tripwire(self) -> Tripwire:
        return Tripwire(self._policy, NAMES[CANARY], NAMES[STABLE])


@dataclass(frozen=True)
class Ours:
    """Our outcome, and what ended it: "analysis", "trip", "undecided", or "promoted"."""

    outcome: Outcome
    why: str


def ours(traffic: Traffic, policy: RolloutPolicy, judges: Sequence[Quick | Words], exposure: Exposure) -> Ours:
    """The rollout as the controller does it: steps, baking, promotion."""
    feed, alarm = Feed(traffic), Alarm(policy.trip)
    raised = [(0.0, float(policy.steps[0].weight))]
    now, baking = 0.0, None

    def ended(at: float, why: str) -> Ours:
        return Ours(exposure.outcome(raised, at, failed=why != "promoted"), why)

    while now < HORIZON_S:
        since, now = now, now + policy.check_interval_s
        feed.assign(now, raised[-1][1])
        for one in feed.between(since, now):
            for judge in judges:
                judge.add(one)
            if one.metric == "error_rate" and (tripped := alarm.look(one, feed, now)) is not None:
                return ended(tripped, "trip")
        step, begun = policy.steps[len(raised) - 1], raised[-1][0]
        verdict, *others = (judge.verdict(step.minimum, begun) for judge in judges)
        assert all(other == verdict for other in others), f"{verdict} at {now:g} s, the analysis says {others}"
        if verdict == "fail":
            return ended(now, "analysis")
        if baking is not None:
            if now - baking >= policy.bake_s:
                return ended(now, "promoted")
        elif verdict == "pass" and now - begun >= step.minimum_time_s:
            if len(raised) == len(policy.steps):
                baking = now
            else:
                raised.append((now, float(policy.steps[len(raised)].weight)))
        elif now - begun >= step.maximum_time_s:
            return ended(now, "undecided")
    return ended(HORIZON_S, "undecided")


@dataclass(frozen=True)
class Simulated:
    """One rollout: ours, and of each of `rules()` when it rolled back (inf: never) and how many bad answers it let
    through; [rules] each. `begun` is when the fault began."""

    ours: Ours
    backs: Floats
    bad: Floats
    begun: float


def simulate(place: int, policy: RolloutPolicy, baseline: Baseline, index: int) -> Simulated:
    """One rollout of a scenario, decided by all."""
    scenario = SCENARIOS[place]
    traffic = generate(scenario.fault, np.random.default_rng([index, *scenario.name.encode()]))
    judges: list[Quick | Words] = [Quick(policy.analysis)]
    if index < THROUGH_THE_ANALYSIS:
        judges.append(Words(policy.analysis))
    steps = [Step(step.weight, step.minimum_time_s) for step in policy.steps]
    steps[-1] = Step(steps[-1].weight, steps[-1].minimum_s + policy.bake_s)
    rollouts = Rollouts(traffic, steps, baseline)
    mine = ours(traffic, policy, judges, rollouts.exposure)
    outcomes = rollouts.outcomes()
    backs = np.array([one.rolled_back for one in outcomes])
    return Simulated(mine, backs, np.array([float(one.bad) for one in outcomes]), traffic.begun)


def usual(days: int = 40) -> Baseline:
    """What stable does on days without an incident: what the thresholds of the others are fitted to."""
    first, scores = [], []
    for day in range(days):
        traffic = generate(Fault(), np.random.default_rng([day, 7]))
        first.append(traffic.first_token[STABLE][::20].copy())
        scores.append(float(np.nanmean(traffic.score[STABLE])))
    quantiles = np.nanquantile(np.concatenate(first), QUANTILES)
    return Baseline(dict(zip(QUANTILES, quantiles.tolist(), strict=True)), float(np.mean(scores)))


def summary(scenario: Scenario, every: Sequence[Simulated]) -> dict[str, Any]:
    """Our figures in one scenario. Times in seconds, detection from the begin of the fault."""
    n = len(every)
    outcomes = [one.ours.outcome for one in every]
    backs = np.array([one.rolled_back for one in outcomes])
    rolled = int(np.isfinite(backs).sum())
    interval = rate_interval(rolled, n, confidence=0.95)
    found: dict[str, Any] = {
        "scenario": scenario.name,
        "rollouts": n,
        "ended_by": dict(Counter(one.ours.why for one in every)),
        "rolled_back": round(rolled / n, 4),
        "rolled_back_interval": [round(interval.low, 4), round(interval.high, 4)],
        "shown_to_be_worse": sum(one.ours.why in ("analysis", "trip") for one in every),
    }
    promoted = [one.promoted for one in outcomes if np.isfinite(one.promoted)]
    if promoted:
        found["promotion_s"] = quantiles(promoted)
    if rolled and not scenario.good:
        late = backs - np.array([one.begun for one in every])
        found["detection_s"] = quantiles(late[np.isfinite(late)])
    found["exposed"] = quantiles([one.exposed for one in outcomes])
    if not scenario.good:
        found["bad_answers"] = quantiles([one.bad for one in outcomes]) | {
            "mean": round(float(np.mean([one.bad for one in outcomes])), 1)
        }
    return found


def alarms(every: Sequence[Simulated]) -> tuple[float, Floats]:
    """Share of good rollouts that ended as bad: ours, and each rule's. What we found undecided counts too."""
    mine = float(np.mean([np.isfinite(one.ours.outcome.rolled_back) for one in every]))
    return mine, np.isfinite([one.backs for one in every]).mean(axis=0)


def beside(every: Sequence[Simulated], mine: float, theirs: Floats) -> dict[str, Any]:
    """The others in one bad scenario, given false-alarm rates: each tool's best in hindsight at our rate or below, its
    best at any rate up to 5 and 20%, and its documented configuration. Best: fewest bad answers on average."""
    bad = np.array([one.bad for one in every])
    back = np.isfinite([one.backs for one in every])
    known = rules()

    def row(place: int) -> dict[str, Any]:
        return {
            "rule": known[place].name,
            "false_alarms": round(float(theirs[place]), 4),
            "rolled_back": round(float(back[:, place].mean()), 4),
            "bad_answers": quantiles(bad[:, place]) | {"mean": round(float(bad[:, place].mean()), 1)},
        }

    found: dict[str, Any] = {}
    for tool in TOOLS:
        mine_or_less = {"at_our_rate": mine, "at_5_percent": 0.05, "at_20_percent": 0.2}
        means = bad.mean(axis=0)
        found[tool] = {"documented": row(known.index(documented(tool)))}
        for name, rate in mine_or_less.items():
            allowed = [n for n, rule in enumerate(known) if rule.watch.tool == tool and theirs[n] <= rate]
            found[tool][name] = row(min(allowed, key=lambda n: means[n])) if allowed else None
    return found


def quantiles(values: Sequence[float] | Floats) -> dict[str, float]:
    return {f"p{q}": round(float(np.percentile(values, q)), 1) for q in (50, 95)}


def plot(results: Mapping[str, Sequence[Simulated]], file: Path) -> None:
    """Bad answers against false alarms: a column a bad scenario, a row a good one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    good = [one for one in SCENARIOS if one.good and one.name in results]
    bad = [one for one in SCENARIOS if not one.good and one.name in results]
    figure, axes = plt.subplots(
        len(good),
        len(bad),
        figsize=(3.1 * len(bad), 3.1 * len(good)),
        sharey="col",
        squeeze=False,
        layout="constrained",
    )
    known = rules()
    for line, calm in zip(axes, good, strict=True):
        mine, theirs = alarms(results[calm.name])
        low, high = (100 * end for end in _interval(mine, len(results[calm.name])))
        for panel, scenario in zip(line, bad, strict=True):
            every = results[scenario.name]
            means = np.array([one.bad for one in every]).mean(axis=0)
            for tool, colour in TOOLS.items():
                which = np.array([rule.watch.tool == tool for rule in known])
                x, y = 100 * theirs[which], means[which]
                order = np.lexsort((y, x))
                best = np.minimum.accumulate(y[order])
                panel.plot(np.maximum(x, FLOOR), y, ".", color=colour, alpha=0.12, ms=3)
                panel.step(
                    np.maximum(x[order], FLOOR), best, where="post", color=colour, label=f"{tool}, best in hindsight"
                )
            y_ours = float(np.mean([one.ours.outcome.bad for one in every]))
            spread = np.array([[max(100 * mine, FLOOR) - max(low, FLOOR)], [high - max(100 * mine, FLOOR)]])
            panel.errorbar(
                max(100 * mine, FLOOR),
                y_ours,
                xerr=np.maximum(spread, 0),
                fmt="*",
                ms=13,
                color="black",
                label="Sluice",
            )
            panel.set(xscale="log", yscale="log", xlim=(FLOOR * 0.8, 120))
            if panel.get_subplotspec().is_first_row():
                panel.set_title(scenario.name, fontsize=10)
        line[0].set_ylabel("bad answers until it is out (mean)")
        line[len(bad) // 2].set_xlabel(f"false alarms in % of releases {calm.name}")
    axes[0][0].legend(fontsize=7)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def _interval(rate: float, n: int) -> tuple[float, float]:
    found = rate_interval(round(rate * n), n, confidence=0.95)
    return found.low, found.high


def table(result: Mapping[str, Any]) -> str:
    """For the terminal."""
    lines = []
    for row in result["scenarios"]:
        low, high = row["rolled_back_interval"]
        lines.append(
            f"{row['scenario']:36} rolled back {100 * row['rolled_back']:5.1f}% [{100 * low:.1f}, {100 * high:.1f}]"
            f" {row['ended_by']} detection {row.get('detection_s')} bad {row.get('bad_answers')}"
            f" promotion {row.get('promotion_s')}"
        )
        for tool, found in row.get("others", {}).get(SCENARIOS[0].name, {}).items():
            for name, one in found.items():
                if one:
                    lines.append(
                        f"    {tool:14} {name:14} false alarms {100 * one['false_alarms']:5.1f}%  rolled back "
                        f"{100 * one['rolled_back']:5.1f}%  bad {one['bad_answers']}  {one['rule']}"
                    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=2_000, help="of each scenario")
    parser.add_argument("--only", default="", help="bad scenarios whose name holds this text")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--policy", type=Path, default=POLICY)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rollout_simulation.json"))
    parser.add_argument("--image", type=Path, default=Path("docs/images/rollout-simulation.png"))
    chosen = parser.parse_args()
    begun = time.monotonic()
    policy, baseline = load_policy(chosen.policy), usual()
    result: dict[str, Any] = {"machine": machine(), "rollouts": chosen.rollouts, "scenarios": []}
    found: dict[str, list[Simulated]] = {}
    with multiprocessing.Pool(chosen.processes) as pool:
        for place, scenario in enumerate(SCENARIOS):
            if scenario.good or chosen.only in scenario.name:
                work = functools.partial(simulate, place, policy, baseline)
                found[scenario.name] = pool.map(work, range(chosen.rollouts), chunksize=5)
                print(f"{time.monotonic() - begun:6.0f} s  {scenario.name}", file=sys.stderr, flush=True)
    for scenario in SCENARIOS:
        if scenario.name in found:
            row = summary(scenario, found[scenario.name])
            if not scenario.good:
                row["others"] = {
                    calm.name: beside(found[scenario.name], *alarms(found[calm.name]))
                    for calm in SCENARIOS
                    if calm.good
                }
            result["scenarios"].append(row)
    result["seconds"] = round(time.monotonic() - begun)
    print(table(result))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(result, indent=2) + "\n")
    plot(found, chosen.image)


if __name__ == "__main__":
    main()
