"""Candidate against champion on identical items: paired differences, their intervals, and what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from sluice.evaluation.inference import infer
from sluice.evaluation.pairing import Measured, alone, pair
from sluice.evaluation.policy import AnyCheck, Policy
from sluice.evaluation.scores import Column, Metric, Scores
from sluice.statistics.paired import RESAMPLES, Floats, Interval, holm

Slices = Mapping[str, Mapping[str, str]]
"""Item id -> dimension (`category`) -> value (`permits`)."""

SLICED = ("answers", "judged", "safety")
"""Groups of metrics whose items are those of the suite, so that they have slices."""
MOST_VALUES = 50
"""A dimension with more values than this (an id, a date) is not shown slice by slice."""
_QUICK = 999
"""Resamples for an interval that is only shown in a list of slices."""


@dataclass(frozen=True)
class MetricComparison:
    """One metric, candidate against champion, over the items (of one slice) where both have a value.

    `metric` has the direction that the policy wants. `slice` is empty or `dimension=value`. `difference`, `low`,
    `high`: mean of candidate minus champion and its interval, in the metric's own unit and direction; `always_valid`
    when that interval holds however often one looked. `worst_low`, `worst_high`: the difference when every missing
    pair went against, or in favour of, a higher value (for a limit: the candidate's mean). `room`: interval of what
    the check needs above 0 (the gain, the gain and the margin, the distance from the limit); `p` is one-sided against
    0 of it, `adjusted_p` after correction over the gating checks. `obstacle`: why the evidence cannot count, empty when
    it can. `missing` counts items without a pair by cause. `pairs`: item, champion's value, candidate's.
    `candidate_low`, `candidate_high`: interval of the candidate's own mean, where a limit is checked; then `n`,
    `total` and `missing` are of the candidate alone. None where there is too little to say.
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
    room: Interval | None = None
    p: float | None = None
    adjusted_p: float | None = None
    minimum_detectable_effect: float | None = None
    needed_n: int | None = None
    always_valid: bool = False
    judge: str | None = None
    obstacle: str = ""
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

    `metrics` has each metric over all items, and each slice that a check asks for. `slices` has every metric on every
    slice there is, for display: these gate nothing and are in no family. `demoted`: metrics that may not gate though
    the policy would let them, with the reason (an uncalibrated judge).
    """

    total: int
    confidence: float
    metrics: tuple[MetricComparison, ...]
    champion_outcomes: Mapping[str, int]
    candidate_outcomes: Mapping[str, int]
    demoted: Mapping[str, str] = field(default_factory=dict)
    slices: tuple[MetricComparison, ...] = ()

    def metric(self, name: str, slice_: str = "") -> MetricComparison | None:
        return next((one for one in self.metrics if one.metric.name == name and one.slice == slice_), None)

    def worst_slices(self, name: str, most: int = 5) -> tuple[MetricComparison, ...]:
        """The slices where the candidate gained least (or lost most) in a metric, the worst first."""
        found = [one for one in self.slices if one.metric.name == name and one.mean_gain is not None]
        return tuple(sorted(found, key=lambda one: (one.mean_gain or 0.0, one.slice))[:most])


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
    by_item, lower = slices or {}, demoted or {}
    asked = [
        (check, name) for check in policy.checks for name in slices_of(check, policy, champion, candidate, by_item)
    ]
    checks = {(check.metric, name): check for check, name in asked}
    every = sorted({*champion.columns, *candidate.columns})
    wanted = [*checks, *((name, "") for name in every if (name, "") not in checks)]
    compared = {
        (name, slice_): _compared(champion, candidate, name, slice_, by_item, checks.get((name, slice_)), policy)
        for name, slice_ in wanted
        if name in every
    }
    # A check that cannot speak stays in the family with 1: silence must not lower the bar for the others.
    family = [
        place for place, check in checks.items() if not check.advisory and check.metric not in lower and _tests(check)
    ]
    raw = [_p(compared.get(place)) for place in family]
    adjusted = dict(zip(family, holm(raw) if policy.correction == "holm" else raw, strict=True))
    return Comparison(
        len({*champion.outcomes, *candidate.outcomes}),
        policy.confidence,
        tuple(
            replace(one, adjusted_p=None if one.obstacle or one.p is None else adjusted.get(place, one.p))
            for place, one in compared.items()
        ),
        Counter(champion.outcomes.values()),
        Counter(candidate.outcomes.values()),
        lower,
        tuple(_every_slice(champion, candidate, by_item, compared, policy)),
    )


def slices_of(
    check: AnyCheck, policy: Policy, champion: Scores, candidate: Scores, slices: Slices
) -> Iterator[str]:  # fmt: skip
    """The slices that a check is about: itself, or each value of its dimension that no check of its own names."""
    if not check.slice or "=" in check.slice:
        yield check.slice
        return
    named = {one.slice for one in policy.checks if one.metric == check.metric}
    columns = (champion.columns.get(check.metric), candidate.columns.get(check.metric))
    # What is not measured yet could have any value: the family that Holm corrects for must not grow with looking.
    items = [item for one in columns if one for item in one.values] or slices
    found = _values(check.slice, items, slices)
    yield from sorted(found - named) or [check.slice]


def _values(dimension: str, items: Iterable[str], slices: Slices) -> set[str]:
    return {f"{dimension}={slices[item][dimension]}" for item in items if dimension in slices.get(item, {})}


def _tests(check: AnyCheck) -> bool:
    """Whether the check is a test of a hypothesis. Zero tolerance is none: one hit refutes it, whatever the odds."""
    return not (check.rule == "limit" and check.zero_tolerance)


def _p(one: MetricComparison | None) -> float:
    return 1.0 if one is None or one.obstacle or one.p is None else one.p


def _compared(
    champion: Scores,
    candidate: Scores,
    name: str,
    slice_: str,
    slices: Slices,
    check: AnyCheck | None,
    policy: Policy,
    resamples: int = RESAMPLES,
) -> MetricComparison:
    before, after = (_within(scores.columns.get(name), slice_, slices) for scores in (champion, candidate))
    known = after or before
    assert known is not None
    metric = known.metric
    if check is not None and check.direction is not None:
        metric = replace(metric, higher_is_better=check.direction == "higher")
    found = pair(metric, before, after)
    own = alone(metric, after, before) if check is not None and check.rule == "limit" else None
    told = infer(found, own, check, policy, resamples)
    counted: Measured = own or found
    return MetricComparison(
        metric,
        slice_,
        counted.n,
        counted.total,
        dict(counted.missing),
        champion=_average(found.before) if own is None else _average(alone(metric, before).values),
        candidate=_average(found.after) if own is None else _average(own.values),
        difference=_average(found.after - found.before),
        low=told.interval.low if told.interval else None,
        high=told.interval.high if told.interval else None,
        worst_low=counted.worst.low if counted.worst else None,
        worst_high=counted.worst.high if counted.worst else None,
        candidate_low=told.own.low if told.own else None,
        candidate_high=told.own.high if told.own else None,
        room=told.room,
        p=told.p,
        minimum_detectable_effect=told.minimum_detectable_effect,
        needed_n=told.needed_n,
        always_valid=told.always_valid,
        judge=known.judge,
        obstacle=told.obstacle,
        pairs=found.pairs,
    )


def _average(values: Floats) -> float | None:
    return float(values.mean()) if len(values) else None


def _within(column: Column | None, slice_: str, slices: Slices) -> Column | None:
    """The part of a column that lies in a slice."""
    if column is None or not slice_:
        return column
    dimension, _, value = slice_.partition("=")
    values = {item: v for item, v in column.values.items() if slices.get(item, {}).get(dimension, "") == value != ""}
    return replace(column, values=values)


def _every_slice(
    champion: Scores,
    candidate: Scores,
    slices: Slices,
    compared: Mapping[tuple[str, str], MetricComparison],
    policy: Policy,
) -> Iterator[MetricComparison]:
    dimensions = sorted({name for item in slices.values() for name in item})
    for metric in sorted({*champion.columns, *candidate.columns}):
        columns = [one for one in (champion.columns.get(metric), candidate.columns.get(metric)) if one is not None]
        if columns[0].metric.group not in SLICED:
            continue
        items = {item for one in columns for item in one.values}
        for dimension in dimensions:
            values = sorted(_values(dimension, items, slices))
            for name in values if len(values) <= MOST_VALUES else ():
                known = compared.get((metric, name))
                yield known or _compared(champion, candidate, metric, name, slices, None, policy, _QUICK)
