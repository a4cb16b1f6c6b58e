"""Candidate against champion on identical items: paired differences, their intervals, and what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from sluice.evaluation.policy import AnyCheck, Policy
from sluice.evaluation.scores import Column, Metric, Scores
from sluice.statistics.paired import (
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

Slices = Mapping[str, Mapping[str, str]]
"""Item id -> dimension (`category`) -> value (`permits`)."""


@dataclass(frozen=True)
class MetricComparison:
    """One metric, candidate against champion, over the items (of one slice) where both have a value.

    `metric` has the direction that the policy wants. `slice` is empty or `dimension=value`. `difference`, `low`,
    `high`: mean of candidate minus champion and its interval, in the metric's own unit and direction; `always_valid`
    when that interval holds however often one looked. `worst_low`, `worst_high`: the difference when every missing
    pair went against, or in favour of, the candidate. `p` is one-sided against the check's null; `adjusted_p` after
    correction over the gating checks. `missing` counts items without a pair by cause. `pairs`: item, champion's
    value, candidate's. `candidate_low`, `candidate_high`: interval of the candidate's own mean. None where there is
    too little to say.
    """

    metric: Metric
    slice: str
    n: int
    total: int
    missing: Mapping[str, int]
    champion: float | None = None
    candidate: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    worst_low: float | None = None
    worst_high: float | None = None
    candidate_low: float | None = None
    candidate_high: float | None = None
    p: float | None = None
    adjusted_p: float | None = None
    minimum_detectable_effect: float | None = None
    needed_n: int | None = None
    always_valid: bool = False
    judge: str | None = None
    pairs: tuple[tuple[str, float, float], ...] = ()

    @property
    def name(self) -> str:
        """`token_f1`, or `token_f1[category=permits]`."""
        return f"{self.metric.name}[{self.slice}]" if self.slice else self.metric.name

    @property
    def gain(self) -> Interval | None:
        """The interval turned so that more is better."""
        if self.low is None or self.high is None:
            return None
        return Interval(self.low, self.high) if self.metric.higher_is_better else Interval(-self.high, -self.low)

    @property
    def gains(self) -> tuple[float, ...]:
        """Each pair's difference, turned so that more is better."""
        sign = 1.0 if self.metric.higher_is_better else -1.0
        return tuple(sign * (after - before) for _, before, after in self.pairs)

    @property
    def mean_gain(self) -> float | None:
        """The difference turned so that more is better."""
        if self.difference is None:
            return None
        return self.difference if self.metric.higher_is_better else -self.difference


@dataclass(frozen=True)
class Comparison:
    """All metrics of one comparison; `total` items; outcomes of both sides counted by kind.

    `demoted`: metrics that may not gate though the policy would let them, with the reason (an uncalibrated judge).
    """

    total: int
    confidence: float
    metrics: tuple[MetricComparison, ...]
    champion_outcomes: Mapping[str, int]
    candidate_outcomes: Mapping[str, int]
    demoted: Mapping[str, str] = field(default_factory=dict)

    def metric(self, name: str, slice_: str = "") -> MetricComparison | None:
        return next((one for one in self.metrics if one.metric.name == name and one.slice == slice_), None)


def compare(
    champion: Scores,
    candidate: Scores,
    policy: Policy,
    *,
    slices: Slices | None = None,
    demoted: Mapping[str, str] | None = None,
) -> Comparison:
    """Pair the scores by item. Order of items, of metrics and of calls does not matter: equal scores, equal result.

    Metrics without a check are compared for the reader. An item that one side lacks counts as missing.
    """
    checks = {check.metric: check for check in policy.checks}
    names = [*checks, *sorted({*champion.columns, *candidate.columns} - {*checks})]
    compared = [
        _compare_metric(champion.columns.get(name), candidate.columns.get(name), checks.get(name), policy)
        for name in names
        if name in champion.columns or name in candidate.columns
    ]
    # A lacking p-value stays in the family as 1: a check that cannot speak must not make the others' bar lower.
    gating = [
        index for index, one in enumerate(compared) if (c := checks.get(one.metric.name)) is not None and not c.advisory
    ]
    raw = [1.0 if (p := compared[index].p) is None else p for index in gating]
    adjusted = dict(zip(gating, holm(raw) if policy.correction == "holm" else raw, strict=True))
    final = tuple(
        replace(one, adjusted_p=adjusted.get(index, one.p) if one.p is not None else None)
        for index, one in enumerate(compared)
    )
    items = {*champion.outcomes, *candidate.outcomes}
    return Comparison(
        len(items),
        policy.confidence,
        final,
        Counter(champion.outcomes.values()),
        Counter(candidate.outcomes.values()),
        demoted or {},
    )


def _compare_metric(
    champion: Column | None, candidate: Column | None, check: AnyCheck | None, policy: Policy
) -> MetricComparison:
    known = candidate or champion
    assert known is not None
    missing: Counter[str] = Counter()
    pairs: list[tuple[str, float, float]] = []
    items = sorted({*(champion.values if champion else ()), *(candidate.values if candidate else ())})
    for item in items:
        before, after = _value(champion, item), _value(candidate, item)
        if isinstance(before, str) or isinstance(after, str):
            missing[after if isinstance(after, str) else str(before)] += 1
        else:
            pairs.append((item, before, after))
    n = len(pairs)
    bare = MetricComparison(known.metric, "", n, len(items), dict(missing), judge=known.judge)
    if n < 2:
        return bare
    a = np.array([pair[1] for pair in pairs], dtype=np.float64)
    b = np.array([pair[2] for pair in pairs], dtype=np.float64)
    differences = b - a
    interval, p = _interval(known.metric, pairs, differences, check, policy)
    deviation = float(differences.std(ddof=1))
    effect = _effect(check)
    return replace(
        bare,
        champion=float(a.mean()),
        candidate=float(b.mean()),
        difference=float(differences.mean()),
        low=interval.low,
        high=interval.high,
        p=p,
        adjusted_p=p,
        minimum_detectable_effect=minimum_detectable_effect(deviation, n, alpha=policy.alpha, power=policy.power),
        needed_n=needed_n(deviation, effect, alpha=policy.alpha, power=policy.power) if effect else None,
        pairs=tuple(pairs),
    )


def _interval(
    metric: Metric,
    pairs: list[tuple[str, float, float]],
    differences: np.ndarray[tuple[int], np.dtype[np.float64]],
    check: AnyCheck | None,
    policy: Policy,
) -> tuple[Interval, float | None]:
    """The interval of candidate minus champion, and the one-sided p-value of the check (on the gain)."""
    sign = 1.0 if metric.higher_is_better else -1.0
    null = _null(check)
    if metric.kind == "binary" and all(pair[1] in (0.0, 1.0) and pair[2] in (0.0, 1.0) for pair in pairs):
        gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
        interval = score_interval(gained, lost, len(pairs), confidence=policy.confidence)
        if sign < 0:
            gained, lost = lost, gained
        if check is None or null is None:
            return interval, None
        superior = check.rule == "superiority"
        return interval, (mcnemar_exact(gained, lost) if superior else score_p(gained, lost, len(pairs), null))
    if np.ptp(differences) == 0:
        # Nothing varies, so nothing can be resampled: the interval is a point, the p-value that of the sign test.
        constant = float(differences[0])
        if null is None:
            return Interval(constant, constant), None
        return Interval(constant, constant), 0.5 ** len(pairs) if sign * constant > null else 1.0
    seed = seed_of([metric.name, [[item, before, after] for item, before, after in pairs]])
    boot = bootstrap_mean(sign * differences, confidence=policy.confidence, seed=seed)
    interval = boot.interval if sign > 0 else Interval(-boot.interval.high, -boot.interval.low)
    return interval, None if null is None else boot.p_greater(null)


def _null(check: AnyCheck | None) -> float | None:
    """The gain that the interval has to exclude."""
    if check is None or check.rule == "limit":
        return None
    return 0.0 if check.rule == "superiority" else -float(check.margin)


def _effect(check: AnyCheck | None) -> float:
    """The difference that the check turns on; 0 when it names none."""
    if check is None or check.rule == "limit":
        return 0.0
    return check.minimum_effect if check.rule == "superiority" else float(check.margin)


def _value(column: Column | None, item: str) -> float | str:
    """Value, or cause why there is none."""
    value = column.values.get(item) if column else None
    if value is not None:
        return value
    return column.causes.get(item, "missing") if column else "missing"
