"""Candidate against champion on identical items: paired differences, their intervals, and what is missing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from sluice.evaluation.metrics import METRICS, Scores
from sluice.evaluation.statistics import (
    Interval,
    bootstrap_mean,
    holm,
    mcnemar_exact,
    minimum_detectable_effect,
    needed_n,
    score_interval,
    score_p,
    seed_of,
)
from sluice.evaluation.suite import NonInferiority, Policy, Superiority


@dataclass(frozen=True)
class MetricComparison:
    """One metric, candidate against champion, over the items where both have a value.

    `difference`, `low`, `high`: mean of candidate minus champion and its interval, in the metric's own unit and
    direction. `p` is one-sided against the check's null; `adjusted_p` after correction over the gating checks.
    `missing` counts items without a pair by cause. `pairs`: item, champion's value, candidate's. None where there are
    too few pairs to say.
    """

    metric: str
    n: int
    total: int
    missing: Mapping[str, int]
    champion: float | None = None
    candidate: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    adjusted_p: float | None = None
    minimum_detectable_effect: float | None = None
    needed_n: int | None = None
    pairs: tuple[tuple[str, float, float], ...] = ()

    @property
    def gain(self) -> Interval | None:
        """The interval turned so that more is better."""
        if self.low is None or self.high is None:
            return None
        if METRICS[self.metric].higher_is_better:
            return Interval(self.low, self.high)
        return Interval(-self.high, -self.low)

    @property
    def gains(self) -> tuple[float, ...]:
        """Each pair's difference, turned so that more is better."""
        sign = 1.0 if METRICS[self.metric].higher_is_better else -1.0
        return tuple(sign * (after - before) for _, before, after in self.pairs)

    @property
    def mean_gain(self) -> float | None:
        """The difference turned so that more is better."""
        if self.difference is None:
            return None
        return self.difference if METRICS[self.metric].higher_is_better else -self.difference


@dataclass(frozen=True)
class Comparison:
    """All metrics of one comparison; `total` items; outcomes of both sides counted by kind."""

    total: int
    confidence: float
    metrics: tuple[MetricComparison, ...]
    champion_outcomes: Mapping[str, int]
    candidate_outcomes: Mapping[str, int]

    def metric(self, name: str) -> MetricComparison | None:
        return next((found for found in self.metrics if found.metric == name), None)


def compare(champion: Scores, candidate: Scores, policy: Policy) -> Comparison:
    """Pair the scores by item. Order of items, of metrics and of calls does not matter: equal scores, equal result.

    Metrics without a check are compared for the reader. An item that one side lacks counts as missing.
    """
    items = tuple(sorted({*champion.items, *candidate.items}))
    checks = {check.metric: check for check in policy.checks}
    names = [*checks, *sorted({*champion.values, *candidate.values} - {*checks})]
    compared = [_compare_metric(name, items, champion, candidate, checks.get(name), policy) for name in names]
    # A lacking p-value stays in the family as 1: a check that cannot speak must not make the others' bar lower.
    gating = [index for index, name in enumerate(names) if name in checks and not checks[name].advisory]
    raw = [1.0 if (p := compared[index].p) is None else p for index in gating]
    adjusted = dict(zip(gating, holm(raw) if policy.correction == "holm" else raw, strict=True))
    final = tuple(
        _with_adjusted(one, adjusted.get(index, one.p) if one.p is not None else None)
        for index, one in enumerate(compared)
    )
    return Comparison(
        len(items), policy.confidence, final, Counter(champion.outcomes.values()), Counter(candidate.outcomes.values())
    )


def _with_adjusted(one: MetricComparison, adjusted: float | None) -> MetricComparison:
    return replace(one, adjusted_p=adjusted)


def _compare_metric(
    name: str,
    items: tuple[str, ...],
    champion: Scores,
    candidate: Scores,
    check: Superiority | NonInferiority | None,
    policy: Policy,
) -> MetricComparison:
    left, right = _column(champion, name), _column(candidate, name)
    missing: Counter[str] = Counter()
    pairs: list[tuple[str, float, float]] = []
    for item in items:
        before, after = left.get(item, "missing"), right.get(item, "missing")
        if isinstance(before, str) or isinstance(after, str):
            missing[after if isinstance(after, str) else str(before)] += 1
        else:
            pairs.append((item, before, after))
    n = len(pairs)
    bare = MetricComparison(name, n, len(items), dict(missing))
    if n < 2:
        return bare
    a = np.array([pair[1] for pair in pairs], dtype=np.float64)
    b = np.array([pair[2] for pair in pairs], dtype=np.float64)
    differences = b - a
    interval, p = _interval(name, pairs, differences, check, policy)
    deviation = float(differences.std(ddof=1))
    effect = _effect(check)
    return MetricComparison(
        name,
        n,
        len(items),
        dict(missing),
        float(a.mean()),
        float(b.mean()),
        float(differences.mean()),
        interval.low,
        interval.high,
        p,
        p,
        minimum_detectable_effect(deviation, n, alpha=policy.alpha, power=policy.power),
        needed_n(deviation, effect, alpha=policy.alpha, power=policy.power) if effect else None,
        tuple(pairs),
    )


def _interval(
    name: str,
    pairs: list[tuple[str, float, float]],
    differences: np.ndarray[tuple[int], np.dtype[np.float64]],
    check: Superiority | NonInferiority | None,
    policy: Policy,
) -> tuple[Interval, float | None]:
    """The interval of candidate minus champion, and the one-sided p-value of the check (on the gain)."""
    metric = METRICS[name]
    sign = 1.0 if metric.higher_is_better else -1.0
    if metric.kind == "binary" and all(pair[1] in (0.0, 1.0) and pair[2] in (0.0, 1.0) for pair in pairs):
        gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
        interval = score_interval(gained, lost, len(pairs), confidence=policy.confidence)
        if sign < 0:
            gained, lost = lost, gained
        if check is None:
            return interval, None
        superior = check.rule == "superiority"
        return interval, (mcnemar_exact(gained, lost) if superior else score_p(gained, lost, len(pairs), check.null))
    if np.ptp(differences) == 0:
        # Nothing varies, so nothing can be resampled: the interval is a point, the p-value that of the sign test.
        constant = float(differences[0])
        if check is None:
            return Interval(constant, constant), None
        return Interval(constant, constant), 0.5 ** len(pairs) if sign * constant > check.null else 1.0
    seed = seed_of([name, [[item, before, after] for item, before, after in pairs]])
    boot = bootstrap_mean(sign * differences, confidence=policy.confidence, seed=seed)
    interval = boot.interval if sign > 0 else Interval(-boot.interval.high, -boot.interval.low)
    return interval, None if check is None else boot.p_greater(check.null)


def _effect(check: Superiority | NonInferiority | None) -> float:
    """The difference that the check turns on; 0 when it names none."""
    if check is None:
        return 0.0
    return check.minimum_effect if check.rule == "superiority" else check.margin


def _column(scores: Scores, name: str) -> dict[str, float | str]:
    """Value, or cause why there is none, by item. A number that is not finite is no value, whoever made it."""
    column: dict[str, float | str] = {}
    causes = scores.causes.get(name, {})
    for item, value in zip(scores.items, scores.values.get(name, (None,) * len(scores.items)), strict=True):
        if value is None:
            column[item] = causes.get(item, "missing")
        elif not math.isfinite(value):
            column[item] = "not a finite number"
        else:
            column[item] = value
    return column
