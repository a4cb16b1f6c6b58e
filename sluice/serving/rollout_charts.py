"""A rollout's drawings over time, as HTML and SVG that stretch with the page: the share of the sessions, and each
metric's estimate with its always-valid interval.

Lines are SVG without a fixed proportion; text and marks are HTML beside them, so that they keep their size at every
width. Colours come from the page's stylesheet, which knows light and dark. A point is a pair (share of the time,
share of the height), both 0 to 1, the height from below.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from sluice.serving.analysis import MetricResult
from sluice.serving.interval_scale import SAME, difference_text, interval_text, place_of
from sluice.serving.metrics import LIVE_METRICS
from sluice.serving.rollout_state import RolloutState

Point = tuple[float, float]

MARKS = {"pass": "✓", "fail": "✕", "inconclusive": "?"}
_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 172800)
_TICKS = 6


def weight_chart(state: RolloutState) -> str:
    """The canary's share over time as a step line, and what was decided where."""
    begun, lasted = _window(state)
    line: list[Point] = []
    share = 0.0
    for event in state.events:
        at = (event.time - begun) / lasted
        line += [(at, share), (at, event.weight / 100)]
        share = event.weight / 100
    line.append((1.0, share))
    decided = [event for event in state.events if event.verdict and event.kind != "look"]
    marks = "".join(
        f'<i class="mark {event.verdict}" style="left:{(event.time - begun) / lasted:.2%};bottom:{event.weight}%" '
        f'title="{escape(event.sentence, quote=True)}">{MARKS[event.verdict]}</i>'
        for event in decided
        if event.verdict
    )
    area = [(line[0][0], 0.0), *line, (1.0, 0.0)]
    grid = "".join(f'<line class="grid" x1="0" x2="100" y1="{100 - y}" y2="{100 - y}"/>' for y in (0, 25, 50, 75, 100))
    drawn = f'{grid}<polygon class="area" points="{_points(area)}"/><polyline class="line" points="{_points(line)}"/>'
    labels = "".join(f'<b class="y" style="bottom:{y}%">{y}%</b>' for y in (0, 50, 100))
    return (
        f'<div class="chart tall">{_svg(drawn, "share of the sessions over time")}{labels}{marks}{_axis(lasted)}</div>'
    )


def metric_chart(state: RolloutState, name: str) -> str:
    """One metric over time: worse is up, the three lines are "as stable", "fails above" and the margin."""
    begun, lasted = _window(state)
    series = [(min(max((time - begun) / lasted, 0.0), 1.0), one) for time, one in history(state, name)]
    last = series[-1][1]
    place = place_of(last)
    lines = [("same", SAME), ("fails", place.fail), ("margin", place.margin)]
    drawn = "".join(f'<line class="{kind}" x1="0" x2="100" y1="{_y(at)}" y2="{_y(at)}"/>' for kind, at in lines)
    for part in _unbroken(series):
        known = [(at, place_of(one)) for at, one in part]
        upper = [(at, place.high or 0.0) for at, place in known]
        lower = [(at, place.low or 0.0) for at, place in known]
        middle = [(at, place.middle or 0.0) for at, place in known]
        drawn += f'<polygon class="band" points="{_points([*upper, *reversed(lower)])}"/>'
        drawn += f'<polyline class="line" points="{_points(middle)}"/>'
    end = ""
    if place.middle is not None:
        end = f'<i class="dot" style="left:{series[-1][0]:.2%};bottom:{place.middle:.2%}"></i>'
    noun = LIVE_METRICS[name].noun
    fails, passes = (difference_text(last, bound) for bound in (last.bound_fail, last.bound_margin))
    about = "" if noun == title(name).lower() else f"{noun}: "
    tone = last.verdict if last.gating else "shown"
    word = f"{MARKS[last.verdict]} {last.verdict}" if last.gating else f"({last.verdict}, not deciding)"
    return (
        f'<div class="metric {tone}"><h3>{escape(title(name))} <span class="word">{word}</span></h3>'
        f'<p class="quiet">{escape(about)}{_difference(last)}; '
        f"fails above {fails}, passes below {passes}</p>"
        f'<div class="chart">{_svg(drawn, f"{title(name)} over time")}{end}{_axis(lasted)}</div></div>'
    )


def history(state: RolloutState, name: str) -> list[tuple[float, MetricResult]]:
    """(time in epoch seconds, result) of every analysis that was kept since users are asked, oldest first: what the
    shadow showed before was another comparison."""
    looks = [(one.time, one.analysis) for one in state.events if one.analysis is not None and one.time >= state.begun]
    if state.analysis is not None and (not looks or looks[-1][1] != state.analysis):
        looks.append((state.events[-1].time, state.analysis))
    return [(time, one) for time, analysis in looks for one in analysis.metrics if one.name == name]


def title(name: str) -> str:
    """A metric's name as a heading."""
    return name.replace("_", " ").capitalize()


def _difference(metric: MetricResult) -> str:
    if metric.estimate is None:
        return "no data"
    return f"{difference_text(metric, metric.estimate)} ({interval_text(metric)})"


def _unbroken(series: Sequence[tuple[float, MetricResult]]) -> Iterable[list[tuple[float, MetricResult]]]:
    """The parts in which figures are known; a gap is not drawn over."""
    part: list[tuple[float, MetricResult]] = []
    for at, one in series:
        if one.low is None or one.high is None or one.estimate is None:
            if part:
                yield part
            part = []
        else:
            part.append((at, one))
    if part:
        yield part


def _window(state: RolloutState) -> tuple[float, float]:
    """Begin (epoch seconds) and length (seconds) of what is drawn. A clock that jumped back bends lines, no more."""
    times = [event.time for event in state.events]
    return times[0], max(max(times) - times[0], 1.0)


def _axis(lasted: float) -> str:
    step = next((step for step in _STEPS_S if lasted / step <= _TICKS), math.ceil(lasted / _TICKS / 86400) * 86400)
    count = int(lasted / step)
    ticks = [number * step for number in range(count + 1) if number * step <= lasted * 0.97]
    return "".join(f'<b class="x" style="left:{tick / lasted:.2%}">{_tick(tick)}</b>' for tick in ticks)


def _tick(seconds: int) -> str:
    """0, 30 s, 1:30 min, 2:15 h, 3 d."""
    if seconds < 60:
        return f"{seconds} s" if seconds else "0"
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02d} min"
    return f"{seconds // 3600}:{seconds % 3600 // 60:02d} h" if seconds < 172800 else f"{seconds / 86400:g} d"


def _svg(drawn: str, label: str) -> str:
    return (
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{escape(label, quote=True)}">'
        f"{drawn}</svg>"
    )


def _points(points: Iterable[Point]) -> str:
    return " ".join(f"{100 * x:.2f},{_y(y)}" for x, y in points)


def _y(share: float) -> str:
    return f"{100 * (1 - share):.2f}"
