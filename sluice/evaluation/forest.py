"""Forest plots: the intervals of all differences, turned so that right is better, on one scale for metrics of any unit.

The scale is a share: of a metric's range where it has one (0 to 1: percentage points), else of the champion's value.
What a check needs is shaded, no change is dashed; for a limit it is the distance from the limit that is drawn. A
verdict has a shape besides its colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sluice.evaluation import wording
from sluice.evaluation.comparison import MetricComparison
from sluice.evaluation.decision import CheckResult
from sluice.infra.page_style import BAD, FIGURE_STYLE, GOOD, INK, QUIET, UNSURE, Drawing, drawn

COLOURS = {"pass": GOOD, "fail": BAD, "inconclusive": UNSURE, "shown": QUIET}
_WIDTH, _HEIGHT = 250.0, 26.0
_SMALLEST_REACH = 0.01
_MOST = 40
"""Rows of the picture: more would be longer than a page. The report's table has them all."""
_FIRST = {"fail": 0, "inconclusive": 1}


@dataclass(frozen=True)
class ForestRow:
    """One line: the metric and its check's result. `low`, `middle`, `high`, `needed` are shares (see above), more is
    better; None where there is nothing to draw."""

    one: MetricComparison
    result: CheckResult | None
    low: float | None = None
    middle: float | None = None
    high: float | None = None
    needed: float | None = None

    @property
    def verdict(self) -> str:
        return self.result.verdict if self.result else "shown"


def forest_row(one: MetricComparison, result: CheckResult | None) -> ForestRow:
    """The line of one metric."""
    whole = _whole(one)
    shown, needed = one.gain, _needed(one, result)
    middle = one.mean_gain
    if result is not None and result.check.rule == "limit":
        if result.check.zero_tolerance:  # one hit decides, no interval does
            return ForestRow(one, result)
        shown, needed = one.room, 0.0
        middle = None if shown is None else (shown.low + shown.high) / 2
    if shown is None or middle is None or not whole:
        return ForestRow(one, result)
    return ForestRow(
        one, result, shown.low / whole, middle / whole, shown.high / whole, None if needed is None else needed / whole
    )


def reach_of(rows: Sequence[ForestRow]) -> float:
    """How far the scale goes on both sides of 0: to hold every row that gates, or else every row. What goes beyond
    ends in an arrow."""
    shown = [row for row in rows if row.middle is not None]
    gating = [row for row in shown if row.result is not None and not row.result.advisory]
    marks = [abs(mark) for row in gating or shown for mark in (row.low, row.high, row.needed) if mark is not None]
    return max([*marks, _SMALLEST_REACH]) * 1.08


def row_svg(row: ForestRow, reach: float) -> str:
    """A table cell with the row's interval."""
    if row.low is None or row.middle is None or row.high is None:
        return ""
    y = _HEIGHT / 2
    colour = COLOURS[row.verdict]
    parts = [
        f'<svg class="interval" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" width="{_WIDTH:g}" height="{_HEIGHT:g}" '
        f'role="img" aria-label="{row.low:+.1%} to {row.high:+.1%}">'
    ]
    if row.needed is not None:
        start = _x(row.needed, reach)
        parts.append(
            f'<rect x="{start}" y="1" width="{_WIDTH - start:.1f}" height="24" fill="{GOOD}" opacity=".09"/>'
            f'<line x1="{start}" x2="{start}" y1="1" y2="25" stroke="{GOOD}" stroke-width="1.5"/>'
        )
    zero = _x(0, reach)
    parts.append(f'<line x1="{zero}" x2="{zero}" y1="0" y2="26" stroke="{INK}" stroke-dasharray="2 2" opacity=".5"/>')
    left, right = _x(row.low, reach), _x(row.high, reach)
    width = 3 if row.result else 2
    parts.append(f'<line x1="{left}" x2="{right}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="{width}"/>')
    for beyond, edge, tip in ((row.low < -reach, 0.0, 7.0), (row.high > reach, _WIDTH, _WIDTH - 7)):
        if beyond:
            parts.append(f'<path d="M{tip} {y - 5} L{edge} {y} L{tip} {y + 5} Z" fill="{colour}"/>')
    if abs(row.middle) <= reach:
        parts.append(_mark(row.verdict, _x(row.middle, reach), y, colour))
    return "".join([*parts, "</svg>"])


def axis_svg(reach: float) -> str:
    """The scale above the cells of a group."""
    step = _step(reach)
    count = int(reach / step)
    parts = [f'<svg class="interval" viewBox="0 0 {_WIDTH:g} 16" width="{_WIDTH:g}" height="16" aria-hidden="true">']
    for index in range(-count, count + 1):
        place = _x(index * step, reach)
        if not 14 <= place <= _WIDTH - 14:
            continue
        text = "0" if index == 0 else f"{'+' if index > 0 else '−'}{abs(index) * step * 100:g}%"
        parts.append(f'<text x="{place}" y="12" text-anchor="middle" font-size="11" fill="{QUIET}">{text}</text>')
    return "".join([*parts, "</svg>"])


def forest_drawing(rows: Sequence[ForestRow], confidence: float) -> Drawing | None:
    """The same as one figure, for a page that shows pictures only; None when no row has an interval."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.middle is not None]
    if not shown:
        return None
    more = len(shown) - _MOST
    if more > 0:
        # What gates and does not pass first; then whole metrics before slices.
        shown.sort(
            key=lambda row: (
                row.result is None or row.result.advisory, _FIRST.get(row.verdict, 2), bool(row.one.slice)
            )
        )  # fmt: skip
        shown = shown[:_MOST]
    reach = reach_of(shown) * 100
    markers = {"pass": "o", "fail": "X", "inconclusive": "D", "shown": "."}
    with mpl.rc_context({**FIGURE_STYLE, "font.size": 10.5, "axes.titlesize": 11}):
        figure = Figure(figsize=(8.4, 0.36 * len(shown) + 1.0), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(reversed(shown)):
            colour = COLOURS[row.verdict]
            ends = [min(max((end or 0.0) * 100, -reach), reach) for end in (row.low, row.high)]
            axes.plot(ends, [place, place], color=colour, lw=2.4, solid_capstyle="butt")
            axes.plot(
                [(row.middle or 0.0) * 100], [place], markers[row.verdict], color=colour, ms=7.5,
                mfc="white" if row.verdict == "inconclusive" else colour, mew=1.6,
            )  # fmt: skip
            if row.needed is not None:
                start = max(row.needed * 100, -reach)
                axes.fill_between([start, reach], place - 0.42, place + 0.42, color=GOOD, alpha=0.1, lw=0)
                axes.plot([row.needed * 100] * 2, [place - 0.42, place + 0.42], color=GOOD, lw=1.5)
            limit = row.result is not None and row.result.check.rule == "limit"
            figures = wording.own(row.one) if limit else wording.difference(row.one)
            advisory = row.result is not None and row.result.advisory
            text = f"{figures}  {f'({row.verdict})' if advisory else row.verdict}"
            axes.annotate(
                text, (1.01, place), xycoords=("axes fraction", "data"), va="center", color=INK, annotation_clip=False
            )
        axes.axvline(0, color=INK, lw=0.9, ls=(0, (2, 2)))
        axes.set_xlim(-reach, reach)
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.set_yticks(range(len(shown)), [_title(row) for row in reversed(shown)], color=INK)
        axes.tick_params(axis="y", length=0)
        axes.set(
            title=f"Gain over the champion, {confidence:.0%} intervals; shaded: what is needed"
            + (f" ({more} more in the report)" if more > 0 else ""),
            xlabel="% of the metric's range, or of the champion's value",
        )
        # MLflow shows a picture in its own size, and has about 700 pixels for it.
        return drawn(figure, dpi=82)


def _title(row: ForestRow) -> str:
    name = row.result.title if row.result else row.one.metric.title
    name = name if row.result or not row.one.slice else f"{name} in {row.one.slice}"
    return f"{name[:41]}…" if len(name) > 42 else name


def _whole(one: MetricComparison) -> float:
    """What 100% is, in the metric's unit; 0 when nothing says."""
    if one.metric.bounds is not None:
        return one.metric.bounds[1] - one.metric.bounds[0]
    return abs(one.champion or 0.0)


def _needed(one: MetricComparison, result: CheckResult | None) -> float | None:
    """The gain that the whole interval has to exceed."""
    if result is None or result.check.rule == "limit":
        return None
    if result.check.rule == "superiority":
        return 0.0
    share = result.check.share
    return -float(result.check.margin) if share is None else -share * abs(one.champion or 0.0)


def _x(share: float, reach: float) -> float:
    inside = min(max(share, -reach), reach)
    return round((inside + reach) / (2 * reach) * _WIDTH, 1)


def _step(reach: float) -> float:
    """A round step that gives at most two ticks on each side."""
    rough = reach / 2
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.8)


def _mark(verdict: str, x: float, y: float, colour: str) -> str:
    if verdict == "fail":
        return (
            f'<path d="M{x - 5} {y - 5} L{x + 5} {y + 5} M{x - 5} {y + 5} L{x + 5} {y - 5}" stroke="{colour}" '
            'stroke-width="3"/>'
        )
    if verdict == "inconclusive":
        return (
            f'<path d="M{x} {y - 6} L{x + 6} {y} L{x} {y + 6} L{x - 6} {y} Z" fill="#fff" stroke="{colour}" '
            'stroke-width="2"/>'
        )
    return f'<circle cx="{x}" cy="{y}" r="{5 if verdict == "pass" else 3.5}" fill="{colour}"/>'
