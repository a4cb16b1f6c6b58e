"""Where a metric's figures stand between "as stable" and its margin, so that all metrics are drawn on one scale.

Worse is always to the right: "as stable" at `SAME`, the margin at `MARGIN` (for a metric that has to be better than
stable, whose margin is "as stable", the fail line is there). Ratios are placed by their logarithm: twice and half are
equally far from 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sluice.serving.analysis import MetricResult

SAME, MARGIN = 0.4, 0.8
"""Of the width; what lies beyond it is drawn at the edge."""
_SMALLEST = 0.1


@dataclass(frozen=True)
class Place:
    """A metric's marks as shares of the width, 0 to 1: it fails beyond `fail` and passes before `margin`. `low`,
    `middle` and `high` are None without data; `cut_low` and `cut_high`: the interval goes on beyond the edge."""

    fail: float
    margin: float
    low: float | None = None
    middle: float | None = None
    high: float | None = None
    cut_low: bool = False
    cut_high: bool = False


def place_of(metric: MetricResult) -> Place:
    """The marks of one metric."""
    fail, margin = (_inside(share_of(metric, bound)) for bound in (metric.bound_fail, metric.bound_margin))
    if metric.estimate is None or metric.low is None or metric.high is None:
        return Place(fail, margin)
    low, middle, high = (share_of(metric, value) for value in (metric.low, metric.estimate, metric.high))
    return Place(fail, margin, _inside(low), _inside(middle), _inside(high), low < 0, high > 1)


def share_of(metric: MetricResult, value: float) -> float:
    """Where a value of the metric stands; outside of 0 to 1 for one beyond the edges."""
    whole = harm(metric, metric.bound_margin) or harm(metric, metric.bound_fail) or _SMALLEST
    return SAME + (MARGIN - SAME) * harm(metric, value) / whole


def harm(metric: MetricResult, value: float) -> float:
    """How much worse than stable a difference or ratio is: 0 for equal, larger is worse, for scores too."""
    if metric.kind == "ratio":
        return math.log(value) if value > 0 else -math.inf
    return value


def difference_text(metric: MetricResult, value: float | None) -> str:
    """A difference or ratio in people's units: points of a hundred, a factor, or the score's own."""
    if value is None:
        return "–"
    if metric.kind == "ratio":
        return f"×{value:.2f}"
    return f"{value * 100:+.1f} pts" if metric.kind == "rate" else f"{value:+.2f}"


def interval_text(metric: MetricResult) -> str:
    """The interval in the same units, the unit once."""
    if metric.low is None or metric.high is None:
        return "–"
    if metric.kind == "rate":
        return f"{metric.low * 100:+.1f} to {metric.high * 100:+.1f}"
    form = "{:.2f} to {:.2f}" if metric.kind == "ratio" else "{:+.2f} to {:+.2f}"
    return form.format(metric.low, metric.high)


def _inside(share: float) -> float:
    return min(max(share, 0.0), 1.0)
