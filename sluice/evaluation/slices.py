"""Where a candidate gains and where it loses: the mean gain of each metric on each slice of the items."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from sluice.evaluation.comparison import Comparison, MetricComparison, Slices

FEW = 5
"""Pairs below which a slice's mean is hardly more than one item's luck: it is shown, and called neither good nor bad."""


@dataclass(frozen=True)
class Cell:
    """One metric on one slice (`category=permits`): mean gain (more is better) of `n` pairs.

    `strength` is the gain in standard deviations of the metric's gains over all items, which makes metrics of
    different units comparable (Cohen's d of the paired differences); 0 where nothing varies.
    """

    metric: MetricComparison
    slice: str
    n: int
    gain: float
    strength: float


def slice_cells(comparison: Comparison, slices: Slices) -> list[Cell]:
    """Cells in the order of the metrics, then of the slices. A metric whose items have no slices has none."""
    cells = []
    for one in comparison.metrics:
        if one.slice or not one.pairs:
            continue
        deviation = _deviation(one.gains)
        groups: dict[str, list[float]] = {}
        for gain, (item, _, _) in zip(one.gains, one.pairs, strict=True):
            for dimension, value in slices.get(item, {}).items():
                groups.setdefault(f"{dimension}={value}", []).append(gain)
        for name, gains in sorted(groups.items()):
            mean = math.fsum(gains) / len(gains)
            cells.append(Cell(one, name, len(gains), mean, mean / deviation if deviation else 0.0))
    return cells


def worst_slices(cells: Iterable[Cell], metrics: Iterable[str], limit: int = 3) -> list[Cell]:
    """The slices that lose most in one of these metrics, worst first; none that gains, none of fewer than `FEW`."""
    wanted = set(metrics)
    losing = [cell for cell in cells if cell.metric.metric.name in wanted and cell.gain < 0 and cell.n >= FEW]
    return sorted(losing, key=lambda cell: (cell.strength, cell.metric.metric.name, cell.slice))[:limit]


def _deviation(gains: tuple[float, ...]) -> float:
    if len(gains) < 2:
        return 0.0
    mean = math.fsum(gains) / len(gains)
    return math.sqrt(math.fsum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1))
