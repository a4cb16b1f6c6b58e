"""Two columns of one metric, item by item: the pairs, what is missing, and what it could have been at worst."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sluice.evaluation.items import asking_order
from sluice.evaluation.scores import Column, Metric
from sluice.statistics.paired import Floats, Interval, worst_case

DIFFERENT_JUDGES = "different judges"
OUT_OF_RANGE = "out of range"


@dataclass(frozen=True)
class Measured:
    """What a check can count on: `total` items, those that lack a score by cause, and `worst`, the mean difference (or
    mean) when all that is missing was lowest, or highest, for the candidate; None when nothing is missing or the metric
    has no bounds. `items` [n] are those with all scores, in the order of asking when `sequential`; `planned`: how many
    there could be at most, if it was known beforehand."""

    metric: Metric
    items: tuple[str, ...]
    total: int
    missing: Mapping[str, int]
    worst: Interval | None
    sequential: bool
    planned: int | None

    @property
    def n(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class Pairing(Measured):
    """Values [n] of both sides on the items where both have one."""

    before: Floats
    after: Floats

    @property
    def pairs(self) -> tuple[tuple[str, float, float], ...]:
        return tuple(zip(self.items, self.before.tolist(), self.after.tolist(), strict=True))


@dataclass(frozen=True)
class Alone(Measured):
    """Values [n] of one side."""

    values: Floats


def pair(metric: Metric, champion: Column | None, candidate: Column | None) -> Pairing:
    """Pair two columns by item. An item that one side lacks is missing; values of different judges are no pair."""
    items, sequential, planned = _items(champion, candidate)
    judges = {one.judge for one in (champion, candidate) if one is not None}
    missing: Counter[str] = Counter()
    before, after = np.full(len(items), np.nan), np.full(len(items), np.nan)
    for number, item in enumerate(items):
        old, new = _value(champion, item), _value(candidate, item)
        if len(judges) > 1:
            old = new = DIFFERENT_JUDGES
        if cause := next((one for one in (new, old) if isinstance(one, str)), ""):
            missing[cause] += 1
        before[number] = np.nan if isinstance(old, str) else old
        after[number] = np.nan if isinstance(new, str) else new
    worst = worst_case(before, after, *metric.bounds) if missing and metric.bounds else None
    both = np.isfinite(before) & np.isfinite(after)
    kept = _kept(items, both)
    return Pairing(metric, kept, len(items), missing, worst, sequential, planned, before[both], after[both])


def alone(metric: Metric, side: Column | None, other: Column | None = None) -> Alone:
    """One column by itself. An item that only the `other` release has was asked and is missing."""
    items, sequential, planned = _items(side, other)
    missing: Counter[str] = Counter()
    values = np.full(len(items), np.nan)
    for number, item in enumerate(items):
        if isinstance(value := _value(side, item), str):
            missing[value] += 1
        else:
            values[number] = value
    worst = worst_case(np.zeros(len(items)), values, *metric.bounds) if missing and metric.bounds else None
    known = np.isfinite(values)
    return Alone(metric, _kept(items, known), len(items), missing, worst, sequential, planned, values[known])


def _items(*columns: Column | None) -> tuple[tuple[str, ...], bool, int | None]:
    found = [one for one in columns if one is not None]
    every = {item for one in found for item in one.values}
    sequential = any(one.sequential for one in found)
    planned = max((one.planned for one in found if one.planned is not None), default=None)
    return asking_order(every) if sequential else tuple(sorted(every)), sequential, planned


def _kept(items: tuple[str, ...], which: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> tuple[str, ...]:
    return tuple(item for item, keep in zip(items, which, strict=True) if keep)


def _value(column: Column | None, item: str) -> float | str:
    """Value, or cause why there is none."""
    value = column.values.get(item) if column else None
    if column and value is not None:
        low, high = column.metric.bounds or (value, value)
        return value if low <= value <= high else OUT_OF_RANGE
    return column.causes.get(item, "missing") if column else "missing"
