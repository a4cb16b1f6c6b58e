"""Two columns of one metric, item by item: the pairs, what is missing, and what it could have been at worst."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from sluice.evaluation.items import asking_order
from sluice.evaluation.scores import Column, Metric
from sluice.statistics.paired import Floats, Interval

DIFFERENT_JUDGES = "different judges"
OUT_OF_RANGE = "out of range"


@dataclass(frozen=True)
class Pairing:
    """Values [n] of both sides on the items where both have one; with `candidate_only`, `own` [n] are all values of
    the candidate, and `n`, `total` and `missing` are of the candidate alone. `sequential`: in the order of asking."""

    metric: Metric
    items: tuple[str, ...]
    before: Floats
    after: Floats
    own: Floats
    total: int
    missing: Mapping[str, int] = field(default_factory=dict)
    worst: Interval | None = None
    candidate_only: bool = False
    sequential: bool = False

    @property
    def n(self) -> int:
        return len(self.own) if self.candidate_only else len(self.items)

    @property
    def pairs(self) -> tuple[tuple[str, float, float], ...]:
        return tuple(zip(self.items, self.before.tolist(), self.after.tolist(), strict=True))

    @property
    def champion_mean(self) -> float | None:
        return float(self.before.mean()) if len(self.before) else None

    @property
    def candidate_mean(self) -> float | None:
        values = self.own if self.candidate_only else self.after
        return float(values.mean()) if len(values) else None

    @property
    def difference(self) -> float | None:
        return float((self.after - self.before).mean()) if len(self.items) else None


def pair(
    metric: Metric, champion: Column | None, candidate: Column | None, *, candidate_only: bool = False
) -> Pairing:  # fmt: skip
    """Pair two columns by item. An item that one side lacks is missing; values of different judges are no pair."""
    judges = {one.judge for one in (champion, candidate) if one is not None}
    sequential = any(one.sequential for one in (champion, candidate) if one is not None)
    every = {*(champion.values if champion else ()), *(candidate.values if candidate else ())}
    lost: dict[str, Counter[str]] = {"pair": Counter(), "own": Counter()}
    rows: list[tuple[str, float, float]] = []
    own: list[float] = []
    bounds: list[tuple[float | None, float | None]] = []
    for item in asking_order(every) if sequential else sorted(every):
        before, after = _value(champion, item), _value(candidate, item)
        if not isinstance(after, str):
            own.append(after)
        elif candidate and item in candidate.values:
            lost["own"][after] += 1
        if isinstance(after, str) or isinstance(before, str):
            lost["pair"][after if isinstance(after, str) else str(before)] += 1
        elif len(judges) > 1:
            lost["pair"][DIFFERENT_JUDGES] += 1
        else:
            rows.append((item, before, after))
            continue
        comparable = len(judges) < 2
        bounds.append((_number(before) if comparable else None, _number(after) if comparable else None))
    missing = lost["own" if candidate_only else "pair"]
    a, b, c = (np.array(column, dtype=np.float64) for column in ([r[1] for r in rows], [r[2] for r in rows], own))
    worst = _worst_mean(metric, c, missing.total()) if candidate_only else _worst_difference(metric, b - a, bounds)
    total = len(own) + missing.total() if candidate_only else len(every)
    return Pairing(
        metric, tuple(r[0] for r in rows), a, b, c, total, dict(missing), worst, candidate_only, sequential
    )  # fmt: skip


def _worst_difference(
    metric: Metric, differences: Floats, missing: list[tuple[float | None, float | None]]
) -> Interval | None:
    """The mean difference over all items when every value that is missing had its lowest, or its highest, possible
    effect. Source: Manski 1989, "Anatomy of the Selection Problem", Journal of Human Resources 24:343-360."""
    if not missing:
        return None
    if metric.bounds is None:
        return None
    low, high = metric.bounds
    least, most = float(differences.sum()), float(differences.sum())
    for before, after in missing:
        least += (low if after is None else after) - (high if before is None else before)
        most += (high if after is None else after) - (low if before is None else before)
    n = len(differences) + len(missing)
    return Interval(least / n, most / n)


def _worst_mean(metric: Metric, values: Floats, missing: int) -> Interval | None:
    """The same for the candidate's own mean."""
    if not missing or metric.bounds is None:
        return None
    total, n = float(values.sum()), len(values) + missing
    return Interval((total + metric.bounds[0] * missing) / n, (total + metric.bounds[1] * missing) / n)


def _number(value: float | str) -> float | None:
    return None if isinstance(value, str) else value


def _value(column: Column | None, item: str) -> float | str:
    """Value, or cause why there is none."""
    value = column.values.get(item) if column else None
    if column and value is not None:
        low, high = column.metric.bounds or (value, value)
        return value if low <= value <= high else OUT_OF_RANGE
    return column.causes.get(item, "missing") if column else "missing"
