"""Figures of the report: SVG for the page, PNG beside it for MLflow. Drawn from numbers only, never from texts.

The bytes depend on the data alone (fixed ids, no date), so the same evaluation gives the same report digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sluice.evaluation.comparison import MetricComparison
from sluice.evaluation.policy import AnyCheck
from sluice.infra.page_style import BAD, BEFORE, FIGURE_STYLE, GOOD, INK, NOW, QUIET, UNSURE, Drawing, drawn

CHAMPION, CANDIDATE = BEFORE, NOW
BETTER, WORSE = GOOD, BAD
VERDICTS = {"pass": GOOD, "fail": BAD, "inconclusive": UNSURE}


@dataclass(frozen=True)
class TrainingPoint:
    """Losses after `step` optimizer steps; None where one was not measured."""

    step: int
    loss: float | None = None
    validation_loss: float | None = None


def paired_drawing(one: MetricComparison) -> Drawing:
    """Left: each item's gain, sorted, with the mean and its interval. Right: how both releases' scores spread."""
    import matplotlib as mpl
    import numpy as np
    from matplotlib.figure import Figure

    metric = one.metric
    gains = np.sort(np.array(one.gains, dtype=np.float64))[::-1]
    with mpl.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(10, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
        left.bar(range(len(gains)), gains, width=1.0, color=np.where(gains >= 0, BETTER, WORSE), alpha=0.55)
        if one.gain is not None and one.mean_gain is not None:
            left.axhspan(one.gain.low, one.gain.high, color=CANDIDATE, alpha=0.18, lw=0)
            left.axhline(one.mean_gain, color=CANDIDATE, lw=1.4, label="mean, with its interval")
            left.legend(loc="upper right")
        left.axhline(0, color=INK, lw=0.8)
        left.set(title=f"{metric.title}: gain on each item", xlabel=_counted(one), xmargin=0.01)
        before, after = [old for _, old, _ in one.pairs], [new for _, _, new in one.pairs]
        low, high = min(before + after), max(before + after)
        bins = np.linspace(low, high if high > low else low + 1, 21).tolist()
        right.hist(before, bins=bins, color=CHAMPION, alpha=0.45, label="champion")
        right.hist(after, bins=bins, histtype="step", color=CANDIDATE, lw=1.6, label="candidate")
        right.set(title=f"{metric.title}: spread of the scores", xlabel="score", ylabel="items")
        right.yaxis.get_major_locator().set_params(integer=True)
        right.legend(loc="best")
        return drawn(figure)


def training_drawing(points: Sequence[TrainingPoint]) -> Drawing:
    """Loss by step, in training and on the validation split."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(10, 2.4), layout="constrained")
        axes = figure.subplots()
        train = [(point.step, point.loss) for point in points if point.loss is not None]
        validation = [(point.step, point.validation_loss) for point in points if point.validation_loss is not None]
        if train:
            axes.plot(*zip(*train, strict=True), color=CHAMPION, lw=1.4, label="training")
        if validation:
            axes.plot(*zip(*validation, strict=True), color=CANDIDATE, lw=1.6, marker="o", ms=4, label="validation")
        axes.set(title="Training loss", xlabel="step", ylim=(0, None))
        if train or validation:
            axes.legend(loc="upper right")
        return drawn(figure)


def interval_svg(one: MetricComparison, check: AnyCheck | None, verdict: str) -> str:
    """A table cell: the interval of the difference, on a scale that holds 0 and the margin. Shaded: what is needed."""
    if one.low is None or one.high is None or one.difference is None:
        return ""
    sign = 1 if one.metric.higher_is_better else -1
    threshold = (
        None
        if check is None or check.rule == "limit"
        else sign * (check.minimum_effect if check.rule == "superiority" else -float(check.margin))
    )
    marks = [0.0, one.low, one.high] + ([] if threshold is None else [threshold])
    reach = max(max(marks) - min(marks), 1e-9)
    start, stop = min(marks) - 0.12 * reach, max(marks) + 0.12 * reach
    width, middle = 180.0, 12.0

    def x(number: float) -> float:
        return round((number - start) / (stop - start) * width, 1)

    colour = VERDICTS.get(verdict, QUIET)
    parts = [f'<svg class="interval" viewBox="0 0 {width:g} 24" width="{width:g}" height="24" aria-hidden="true">']
    if threshold is not None:
        left, right = (x(threshold), width) if sign > 0 else (0.0, x(threshold))
        parts.append(
            f'<rect x="{left}" y="2" width="{max(right - left, 0):.1f}" height="20" fill="{BETTER}" opacity=".1"/>'
        )
        parts.append(f'<line x1="{x(threshold)}" x2="{x(threshold)}" y1="2" y2="22" stroke="{BETTER}" opacity=".6"/>')
    parts.append(f'<line x1="{x(0)}" x2="{x(0)}" y1="2" y2="22" stroke="{INK}" stroke-dasharray="2 2" opacity=".6"/>')
    parts.append(
        f'<line x1="{x(one.low)}" x2="{x(one.high)}" y1="{middle}" y2="{middle}" stroke="{colour}" stroke-width="3" '
        f'stroke-linecap="round"/><circle cx="{x(one.difference)}" cy="{middle}" r="4.5" fill="{colour}"/></svg>'
    )
    return "".join(parts)


def _counted(one: MetricComparison) -> str:
    better, worse = sum(gain > 0 for gain in one.gains), sum(gain < 0 for gain in one.gains)
    return f"items, sorted: {better} better, {one.n - better - worse} the same, {worse} worse"
