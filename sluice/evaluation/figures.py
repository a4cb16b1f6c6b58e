"""Figures of the report: SVG for the page, PNG beside it for MLflow. Drawn from numbers, never from a model's texts.

The bytes depend on the data alone (fixed ids, no date), so the same evaluation gives the same report digest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sluice.evaluation.comparison import MetricComparison
from sluice.infra.page_style import BAD, BEFORE, FIGURE_STYLE, GOOD, INK, NOW, QUIET, UNSURE, Drawing, drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sluice.evaluation.calibration import MetricCalibration
    from sluice.evaluation.stopping import Stopping

CHAMPION, CANDIDATE = BEFORE, NOW
_ACROSS = 3
_PANELS = 6


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

    gains = np.sort(np.array(one.gains, dtype=np.float64))[::-1]
    with mpl.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(10, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
        # Two areas, not a bar an item: thousands of bars take a minute and a megabyte.
        edges = np.arange(len(gains) + 1) - 0.5
        for side, colour in ((np.maximum(gains, 0), GOOD), (np.minimum(gains, 0), BAD)):
            left.stairs(side, edges, fill=True, color=colour, alpha=0.55, lw=0)
        if one.gain is not None and one.mean_gain is not None:
            left.axhspan(one.gain.low, one.gain.high, color=CANDIDATE, alpha=0.18, lw=0)
            left.axhline(one.mean_gain, color=CANDIDATE, lw=1.4, label="mean, with its interval")
            left.legend(loc="upper right")
        left.axhline(0, color=INK, lw=0.8)
        left.set(title=f"{one.metric.title}: gain on each item", xlabel=_counted(one), xmargin=0.01)
        _spread(right, one)
        right.set(title=f"{one.metric.title}: spread of the scores", xlabel="score", ylabel="items")
        right.legend(loc="best")
        return drawn(figure)


def spread_drawing(metrics: Sequence[MetricComparison]) -> Drawing | None:
    """How the scores of both releases spread, one small histogram a metric; None when no metric has a spread."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    shown = [one for one in metrics if one.metric.kind == "mean" and not one.slice and one.pairs]
    if not shown:
        return None
    rows = math.ceil(len(shown) / _ACROSS)
    with mpl.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(10, 1.95 * rows), layout="constrained")
        places = figure.subplots(rows, _ACROSS, squeeze=False).ravel()
        for axes, one in zip(places, shown, strict=False):
            _spread(axes, one)
            axes.set(title=f"{one.metric.title}{f' ({one.metric.unit})' if one.metric.unit else ''}")
        for axes in places[len(shown) :]:
            axes.set_axis_off()
        figure.legend(*places[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
        return drawn(figure)


def sequential_drawing(stopping: Stopping, metrics: Sequence[MetricComparison]) -> Drawing | None:
    """Always-valid intervals of the difference over the number of items, one panel a metric, and where its check was
    decided; None with fewer than two looks."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    shown = [(one, found) for one in metrics if len(found := _looks(stopping, one)) > 1][:_PANELS]
    if not shown:
        return None
    across = min(len(shown), 2)
    rows = math.ceil(len(shown) / across)
    with mpl.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(10, 2.3 * rows + 0.3), layout="constrained")
        places = figure.subplots(rows, across, squeeze=False).ravel()
        for axes, (one, found) in zip(places, shown, strict=False):
            items, means, lows, highs, verdicts = zip(*found, strict=True)
            axes.fill_between(items, lows, highs, color=CANDIDATE, alpha=0.18, lw=0, label="always-valid interval")
            axes.plot(items, means, color=CANDIDATE, lw=1.4, marker="o", ms=3, label="difference")
            axes.axhline(0, color=INK, lw=0.9, ls=(0, (2, 2)))
            axes.axvline(stopping.asked, color=INK, lw=1)
            decided = next((index for index, verdict in enumerate(verdicts) if verdict in ("pass", "fail")), None)
            if decided is not None:
                colour = GOOD if verdicts[decided] == "pass" else BAD
                axes.plot([items[decided]], [means[decided]], "o", ms=11, mfc="none", mec=colour, mew=2)
                axes.annotate(
                    verdicts[decided], (items[decided], highs[decided]), (0, 3), color=colour, ha="center",
                    textcoords="offset points",
                )  # fmt: skip
            if stopping.asked < stopping.total:
                axes.axvspan(stopping.asked, stopping.total, color=QUIET, alpha=0.1, lw=0, label="never asked")
            axes.set(title=f"{_named(one)}: candidate minus champion", xlabel="items", xlim=(0, stopping.total))
            axes.margins(y=0.15)
        for axes in places[len(shown) :]:
            axes.set_axis_off()
        figure.legend(*places[0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
        return drawn(figure)


def agreement_drawing(metrics: Sequence[tuple[str, MetricCalibration, bool]], floor: float) -> Drawing | None:
    """Cohen's kappa of a judge with people, with its interval and the policy's floor: title, calibration and whether
    it may gate, for each metric."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    if not metrics:
        return None
    shown = [*reversed(metrics)]
    with mpl.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(10, 0.42 * len(shown) + 0.95), layout="constrained")
        axes = figure.subplots()
        for place, (_, one, gates) in enumerate(shown):
            colour = GOOD if gates else UNSURE
            axes.plot([one.kappa_low, one.kappa_high], [place] * 2, color=colour, lw=2.6, solid_capstyle="round")
            axes.plot(
                [one.kappa], [place], "o" if gates else "D", color=colour, ms=7, mew=1.6,
                mfc=colour if gates else "white",
            )  # fmt: skip
            axes.annotate(
                f"{one.kappa:.2f} [{one.kappa_low:.2f}, {one.kappa_high:.2f}]  {'may gate' if gates else 'advisory'}",
                (1.01, place), xycoords=("axes fraction", "data"), va="center", color=INK, annotation_clip=False,
            )  # fmt: skip
        axes.axvspan(floor, 1, color=GOOD, alpha=0.08, lw=0)
        axes.axvline(floor, color=GOOD, lw=1.4)
        axes.set_yticks(range(len(shown)), [title for title, _, _ in shown], color=INK)
        axes.tick_params(axis="y", length=0)
        lowest = min(one.kappa_low for _, one, _ in shown)
        axes.set(
            title=f"Agreement with people: the whole interval has to lie above the floor of {floor:g}",
            xlabel="Cohen's kappa (0: as by chance, 1: always)",
            xlim=(min(-0.05, lowest - 0.05), 1),
            ylim=(-0.6, len(shown) - 0.4),
        )
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


def _looks(stopping: Stopping, one: MetricComparison) -> list[tuple[int, float, float, float, str]]:
    """Items, difference, low, high and verdict at each look that had an interval of this metric and slice."""
    return [
        (look.items, check["difference"], *check["interval"], check["verdict"])
        for look in stopping.looks
        for check in look.checks
        if (check["metric"], check["slice"]) == (one.metric.name, one.slice)
        and None not in (check["difference"], *check["interval"])
    ]


def _named(one: MetricComparison) -> str:
    return f"{one.metric.title} in {one.slice}" if one.slice else one.metric.title


def _spread(axes: Axes, one: MetricComparison) -> None:
    """Champion's scores filled, candidate's as an outline: told apart without colours too."""
    import numpy as np

    before, after = [old for _, old, _ in one.pairs], [new for _, _, new in one.pairs]
    low, high = one.metric.bounds or (min(before + after), max(before + after))
    bins = np.linspace(low, high if high > low else low + 1, 21).tolist()
    axes.hist(before, bins=bins, color=CHAMPION, alpha=0.45, label="champion")
    axes.hist(after, bins=bins, histtype="step", color=CANDIDATE, lw=1.6, label="candidate")
    axes.locator_params(axis="y", integer=True)


def _counted(one: MetricComparison) -> str:
    better, worse = sum(gain > 0 for gain in one.gains), sum(gain < 0 for gain in one.gains)
    return f"items, sorted: {better} better, {one.n - better - worse} the same, {worse} worse"
