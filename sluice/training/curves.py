"""The curves of a training run as SVG, for its report. Drawn from numbers only; 5 steps or 100,000.

Where attempts began and guards acted is marked in each figure. A step whose number is NaN or infinite leaves a gap and
a red cross, it is never drawn over; a value far above the others is named in the title instead of flattening the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sluice.infra.page_style import BAD, BEFORE, FIGURE_STYLE, NOW, UNSURE, as_svg
from sluice.training.journal import StepMetrics, Validation

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

    Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

SMALL = (3.5, 2.4)
MOST_POINTS = 1200
"""Beyond so many steps a curve is drawn as the band and the median of equal bins: more no screen shows."""
MOST_DOTS = 300
SMOOTHED_FROM = 60
"""From so many steps on a moving median stands in front of the single values."""


@dataclass(frozen=True)
class Curves:
    """What is drawn: steps (one line each, in order), lines of steps that were done again later, and the marks."""

    steps: Sequence[StepMetrics]
    validations: Sequence[Validation] = ()
    done_again: Sequence[StepMetrics] = ()
    attempts: Sequence[int] = ()
    guards: Sequence[int] = ()


def loss_svg(curves: Curves, *, narrow: bool = False) -> str:
    """Training and validation loss by step, over the page's whole width, or for a narrow screen."""

    def finish(axes: Axes) -> None:
        if curves.done_again:
            some = curves.done_again[:: 1 + len(curves.done_again) // MOST_DOTS]
            axes.plot(
                [one.step for one in some],
                [one.loss for one in some],
                ".",
                color=BEFORE,
                ms=3,
                alpha=0.6,
                label="done again later",
            )
        if curves.validations:
            steps, losses = [one.step for one in curves.validations], [one.loss for one in curves.validations]
            axes.plot(steps, losses, color=NOW, lw=1.6, marker="o", ms=4, label="validation")

    above = [one.loss for one in curves.validations]
    size = SMALL if narrow else (10, 3.0)
    return _figure(curves, "Loss", lambda one: one.loss, finish, size=size, colour=BEFORE, label="training", also=above)


def rate_svg(curves: Curves) -> str:
    """Learning rate by step."""
    return _figure(curves, "Learning rate", lambda one: one.learning_rate, smooth=False)


def gradient_svg(curves: Curves) -> str:
    """Gradient norm by step, before clipping."""
    return _figure(curves, "Gradient norm", lambda one: one.grad_norm)


def speed_svg(curves: Curves) -> str:
    """Tokens a second of all devices, by step."""
    return _figure(curves, "Tokens a second", lambda one: one.tokens_per_second, zero=True)


def _figure(
    curves: Curves,
    title: str,
    value: Callable[[StepMetrics], float],
    finish: Callable[[Axes], None] | None = None,
    *,
    size: tuple[float, float] = SMALL,
    colour: str = NOW,
    label: str | None = None,
    smooth: bool = True,
    zero: bool = False,
    also: Sequence[float] = (),
) -> str:
    import matplotlib as mpl
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    steps = np.array([one.step for one in curves.steps], dtype=np.float64)
    values = np.array([value(one) for one in curves.steps], dtype=np.float64)
    with mpl.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for attempt in curves.attempts:
            axes.axvline(attempt, color=UNSURE, lw=0.9, ls=(0, (3, 3)), alpha=0.8)
        _draw(axes, steps, values, colour, label, smooth)
        if finish:
            finish(axes)
        finite = np.concatenate([values[np.isfinite(values)], np.array([v for v in also if np.isfinite(v)])])
        above = _limit(axes, finite, zero)
        if above:
            title += f" ({above} value{'s' if above > 1 else ''} above, up to {finite.max():.3g})"
        axes.set(title=title, xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if finite.size and finite.max() >= 10_000:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        else:
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
        _mark(axes, curves, steps[~np.isfinite(values)])
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="upper right")
        return as_svg(figure)


def _draw(axes: Axes, steps: Floats, values: Floats, colour: str, label: str | None, smooth: bool) -> None:
    import numpy as np

    if len(steps) > MOST_POINTS:
        # Bins of equally many steps; one without any finite number stays a gap.
        parts = np.array_split(np.arange(len(steps)), MOST_POINTS // 3)
        found = [_bin(values[part]) for part in parts]
        middle = np.array([steps[part].mean() for part in parts])
        low, median, high = (np.array(column) for column in zip(*found, strict=True))
        axes.fill_between(middle, low, high, color=colour, alpha=0.25, lw=0)
        axes.plot(middle, median, color=colour, lw=1.4, label=label)
    elif smooth and len(steps) >= SMOOTHED_FROM:
        axes.plot(steps, values, color=colour, lw=0.8, alpha=0.35)
        axes.plot(steps, _moving_median(values, max(5, len(values) // 40)), color=colour, lw=1.6, label=label)
    else:
        marker = "o" if len(steps) <= 12 else None
        axes.plot(steps, values, color=colour, lw=1.4, marker=marker, ms=3, label=label)


def _bin(values: Floats) -> tuple[float, float, float]:
    import numpy as np

    finite = values[np.isfinite(values)]
    return (finite.min(), np.median(finite), finite.max()) if len(finite) else (np.nan, np.nan, np.nan)


def _moving_median(values: Floats, window: int) -> Floats:
    """Median of the finite values in `window` around each; NaN where the value itself is not finite."""
    import numpy as np

    finite = np.isfinite(values)
    half = window // 2
    padded = np.pad(np.where(finite, values, np.nan), half, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    found = np.full(len(values), np.nan)
    found[finite] = np.nanmedian(windows[finite], axis=1)
    return found


def _limit(axes: Axes, finite: Floats, zero: bool) -> int:
    """Keep single values from flattening all others; how many lie above the picture."""
    import numpy as np

    if not len(finite):
        return 0
    low, usual, high = float(finite.min()), float(np.percentile(finite, 99, method="lower")), float(finite.max())
    room = max(usual - low, abs(usual) * 0.05, 1e-12)
    top = high if len(finite) < 20 or high - low <= 2.5 * room else usual + 0.4 * room
    bottom = 0.0 if zero or 0 <= low < 0.5 * top else low
    margin = 0.06 * max(top - bottom, 1e-12)
    axes.set_ylim(bottom - (0 if bottom == 0 else margin), top + margin)
    return int((finite > top + margin).sum())


def _mark(axes: Axes, curves: Curves, broken: Floats) -> None:
    options: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False, "ls": "none", "zorder": 5}
    if len(curves.guards):
        axes.plot(curves.guards, [0.03] * len(curves.guards), marker="^", ms=5, color=UNSURE, **options)
    if len(broken):
        axes.plot(broken, [0.97] * len(broken), marker="x", ms=5, color=BAD, **options)
