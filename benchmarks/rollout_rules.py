"""How Argo Rollouts and Flagger decide about the same traffic: constants, over windows, with a limit of failures.

Semantics, from their documentation (and, where it is silent, from their source):

- Argo Rollouts, AnalysisTemplate: https://argoproj.github.io/argo-rollouts/features/analysis/ and `assessMetricStatus`
  in analysis/analysis.go. A measurement every `interval`; with a success condition alone, one that does not meet it has
  failed. The run fails when failed measurements exceed `failureLimit`, over the whole run; it errs when consecutive
  errors exceed `consecutiveErrorLimit` (4 unless set); an empty query result is an error. `inconclusiveLimit` counts
  measurements between two conditions; with one condition there are none, and a rollout that waits for a person at
  night is no rollback. The analysis runs in the background and the steps go on meanwhile (`setWeight`, `pause`).
- Flagger, Canary: https://docs.flagger.app/usage/how-it-works, .../usage/metrics and `advanceCanary` in
  pkg/controller/scheduler.go. A check every `interval`; a failed one, and one without values, adds to a count that no
  good check takes back, and the weight waits; the next check finds the count at `threshold` and rolls back.
  `stepWeights` are the weights; a gate (webhook `confirm-traffic-increase`) holds each for its minimum time, so that it
  raises no faster than ours.

Both get the weights and minimum times of our policy, and, as custom metrics, all that our analysis sees: failed answers
(5xx), time to first token (a quantile over the window), the judge's mean score. Flagger's own request-duration is the
99th percentile.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.rollout_traffic import CANARY, HORIZON_S, Bools, Ints, Traffic

Signal = Literal["errors", "first token", "quality"]
Tool = Literal["Argo Rollouts", "Flagger"]

SUCCESS = (0.90, 0.95, 0.97, 0.98, 0.985, 0.99, 0.995)
"""Least success rate; 0.95 is that of Argo's documentation, 0.99 that of Flagger's."""
SLOWER = (2.0, 1.5, 1.3, 1.2, 1.1, 1.05, 1.0)
"""Largest latency, over what stable had on the days before."""
POORER = (0.20, 0.12, 0.08, 0.05, 0.03, 0.02, 0.01)
"""Least mean score: so much below what stable had on the days before."""
LIMITS = (0, 1, 2, 3, 5, 9, 19)
"""Failed measurements that are let pass (Argo's failureLimit; Flagger's threshold less one)."""
CADENCES = ((60.0, 60.0), (60.0, 300.0), (300.0, 300.0))
"""Interval between two measurements, and the window of each, seconds."""
CONSECUTIVE_ERRORS = 4
QUANTILES = (0.5, 0.95, 0.99)


@dataclass(frozen=True)
class Step:
    """A weight, and how long it is held at least; the last one's time includes baking."""

    weight: float
    minimum_s: float


@dataclass(frozen=True)
class Baseline:
    """What stable had on the days before the rollout: quantiles of the time to first token, and the mean score."""

    first_token: dict[float, float]
    score: float


@dataclass(frozen=True)
class Measured:
    """One window of the canary; None where there is no value. `first_token` by quantile, ms."""

    success: float | None
    first_token: dict[float, float] | None
    score: float | None


@dataclass(frozen=True)
class Watch:
    """What one configuration looks at, and when; `signals` each at the `strictness`-th of its thresholds."""

    tool: Tool
    signals: tuple[Signal, ...]
    strictness: int
    quantile: float
    interval_s: float
    window_s: float


@dataclass(frozen=True)
class Rule:
    """One configuration: what it watches, and how many failed measurements it lets pass."""

    watch: Watch
    limit: int

    @property
    def name(self) -> str:
        watch = self.watch
        says: dict[Signal, str] = {
            "errors": f"success >= {SUCCESS[watch.strictness]}",
            "first token": f"p{100 * watch.quantile:g} first token <= {SLOWER[watch.strictness]} x usual",
            "quality": f"score >= usual - {POORER[watch.strictness]}",
        }
        limit = f"failureLimit {self.limit}" if watch.tool == "Argo Rollouts" else f"threshold {self.limit + 1}"
        watched = ", ".join(says[signal] for signal in watch.signals)
        return f"{watched}; {limit}, interval {watch.interval_s:g} s, window {watch.window_s:g} s"


@dataclass(frozen=True)
class Outcome:
    """How a rollout ended: rolled back at `rolled_back`, or promoted at `promoted` (seconds; inf: not). `exposed` and
    `bad` count the answers that users got from the canary until then, or until the horizon."""

    rolled_back: float
    promoted: float
    exposed: int
    bad: int


ALL: tuple[Signal, ...] = ("errors", "first token", "quality")


def watches() -> list[Watch]:
    """Each signal alone, as if one knew what will break, and all together."""
    found = []
    tools: tuple[tuple[Tool, float], ...] = (("Argo Rollouts", 0.95), ("Flagger", 0.99))
    for tool, usual in tools:
        looked: tuple[tuple[tuple[Signal, ...], float], ...] = (
            (("errors",), usual), (("first token",), usual), (("first token",), 0.5), (("quality",), usual),
            (ALL, usual), (ALL, 0.5),
        )  # fmt: skip
        for (signals, quantile), strictness, cadence in itertools.product(looked, range(len(SUCCESS)), CADENCES):
            found.append(Watch(tool, signals, strictness, quantile, *cadence))
    return found


def rules() -> list[Rule]:
    """Every configuration that is tried, in the order of `Rollouts.outcomes`."""
    return [Rule(watch, limit) for watch in watches() for limit in LIMITS]


class Exposure:
    """Who met the canary of one traffic, for any history of weights."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._met: dict[tuple[tuple[float, float], ...], tuple[Ints, Ints]] = {}

    def outcome(self, raised: Sequence[tuple[float, float]], end: float, *, failed: bool) -> Outcome:
        """`raised` holds (since, weight); the canary was rolled back at `end`, or else promoted to everybody then."""
        traffic, key = self._traffic, tuple(raised)
        if key not in self._met:
            met = on_canary(traffic, raised, slice(None))
            self._met[key] = np.append(0, met.cumsum()), np.append(0, (met & traffic.bad).cumsum())
        last = int(np.searchsorted(traffic.start, end))
        exposed, bad = (int(one[last]) for one in self._met[key])
        if failed:
            return Outcome(end, np.inf, exposed, bad)
        return Outcome(np.inf, end, exposed + len(traffic.start) - last, bad + int(traffic.bad[last:].sum()))


class Rollouts:
    """One traffic, and what each rule does with it."""

    def __init__(self, traffic: Traffic, steps: Sequence[Step], baseline: Baseline) -> None:
        self._traffic = traffic
        self._steps = tuple(steps)
        self._baseline = baseline
        self.exposure = Exposure(traffic)
        self._ended = np.argsort(traffic.end[CANARY], kind="stable")
        self._ends = traffic.end[CANARY][self._ended]
        known = np.where(np.isnan(traffic.score[CANARY]), np.inf, traffic.score_known[CANARY])
        self._judged = np.argsort(known, kind="stable")
        self._knowns = known[self._judged]
        self._measured: dict[tuple[float, float, tuple[tuple[float, float], ...]], Measured] = {}

    def outcomes(self) -> list[Outcome]:
        """One for each of `rules()`."""
        found = []
        for watch in watches():
            raised, end, backs = self._argo(watch) if watch.tool == "Argo Rollouts" else self._flagger(watch)
            for back in backs:
                found.append(self.exposure.outcome(raised, min(back, end), failed=back <= end))
        return found

    def _argo(self, watch: Watch) -> tuple[list[tuple[float, float]], float, list[float]]:
        """Weights, time of the promotion, and for each of `LIMITS` the time of the rollback (inf: none). The weights
        depend on the clock alone."""
        starts = np.cumsum([0.0, *(step.minimum_s for step in self._steps)])
        raised = [(float(since), step.weight) for since, step in zip(starts[:-1], self._steps, strict=True)]
        end = float(starts[-1])
        checks = np.arange(watch.interval_s, end + 1, watch.interval_s)
        backs = [np.inf] * len(LIMITS)
        verdicts = [self._verdicts(watch, float(now), raised) for now in checks]
        for signal in range(len(watch.signals)):
            failed = [now for now, good in zip(checks, verdicts, strict=True) if good[signal] is False]
            erred = _run_of_none([good[signal] for good in verdicts], CONSECUTIVE_ERRORS)
            for place, limit in enumerate(LIMITS):
                over = failed[limit] if len(failed) > limit else np.inf
                backs[place] = min(backs[place], over, np.inf if erred is None else checks[erred])
        return raised, end, backs

    def _flagger(self, watch: Watch) -> tuple[list[tuple[float, float]], float, list[float]]:
        """The same. A failed check holds the weight, whatever the threshold: all limits share one history."""
        raised = [(0.0, self._steps[0].weight)]
        failed: list[float] = []
        end = now = 0.0
        # With more failures than this every threshold has been reached.
        while not end and len(failed) <= LIMITS[-1]:
            now += watch.interval_s
            if now > HORIZON_S:
                end = np.inf
            elif not all(self._verdicts(watch, now, raised)):
                failed.append(now)
            elif now - raised[-1][0] >= self._steps[len(raised) - 1].minimum_s:
                if len(raised) == len(self._steps):
                    end = now
                else:
                    raised.append((now, self._steps[len(raised)].weight))
        found = [failed[limit] + watch.interval_s if len(failed) > limit else np.inf for limit in LIMITS]
        return raised, end or np.inf, found

    def _verdicts(self, watch: Watch, now: float, raised: Sequence[tuple[float, float]]) -> list[bool | None]:
        """Is each signal good in the window that ends now? None: no value."""
        one = self._measure(now, watch.window_s, raised)
        level, usual = watch.strictness, self._baseline
        found: list[bool | None] = []
        for signal in watch.signals:
            if signal == "errors":
                found.append(None if one.success is None else one.success >= SUCCESS[level])
            elif signal == "quality":
                found.append(None if one.score is None else one.score >= usual.score - POORER[level])
            elif one.first_token is None:
                found.append(None)
            else:
                q = watch.quantile
                found.append(one.first_token[q] <= SLOWER[level] * usual.first_token[q])
        return found

    def _measure(self, now: float, window_s: float, raised: Sequence[tuple[float, float]]) -> Measured:
        # Requests end soon after they start: older weights than the last two do not matter for a window.
        key = (now, window_s, tuple(raised[-2:]))
        if key not in self._measured:
            traffic, since = self._traffic, now - window_s
            ended = self._ended[slice(*np.searchsorted(self._ends, (since, now)))]
            ended = ended[on_canary(traffic, raised, ended)]
            scored = self._judged[slice(*np.searchsorted(self._knowns, (since, now)))]
            scored = scored[on_canary(traffic, raised, scored)]
            times = traffic.first_token[CANARY][ended]
            times = np.sort(times[~np.isnan(times)])
            self._measured[key] = Measured(
                success=float(1 - traffic.failed[CANARY][ended].mean()) if len(ended) else None,
                first_token={q: float(times[int(q * len(times))]) for q in QUANTILES} if len(times) else None,
                score=float(traffic.score[CANARY][scored].mean()) if len(scored) else None,
            )
        return self._measured[key]


def on_canary(traffic: Traffic, raised: Sequence[tuple[float, float]], which: Ints | slice) -> Bools:
    """Of the requests `which`: is it on the canary, when its weights were `raised` (since, weight)?"""
    since, weights = zip(*raised, strict=True)
    weight = np.array([0.0, *weights])[np.searchsorted(since, traffic.start[which], side="right")]
    found: Bools = traffic.place[which] < weight
    return found


def _run_of_none(verdicts: Sequence[bool | None], limit: int) -> int | None:
    """Where more than `limit` verdicts in a row are None for the first time."""
    run = 0
    for place, good in enumerate(verdicts):
        run = run + 1 if good is None else 0
        if run > limit:
            return place
    return None


def documented(tool: Tool) -> Rule:
    """The configuration that the tool's own documentation shows first."""
    if tool == "Argo Rollouts":
        return Rule(Watch(tool, ("errors",), SUCCESS.index(0.95), 0.95, 300.0, 300.0), 3)
    return Rule(Watch(tool, ("errors",), SUCCESS.index(0.99), 0.99, 60.0, 60.0), 9)
