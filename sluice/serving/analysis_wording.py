"""What an analysis says of a metric, in a sentence for people."""

from __future__ import annotations

from dataclasses import dataclass

from sluice.serving.comparison import Evidence, Limits
from sluice.serving.metrics import LiveMetric


@dataclass(frozen=True)
class Counts:
    """Values of each release and their means; None without values."""

    canary_n: int
    stable_n: int
    canary_mean: float | None
    stable_mean: float | None


def failing(about: LiveMetric, limits: Limits, counts: Counts, evidence: Evidence) -> str:
    """Why a metric fails."""
    low, bound = _amount(about, evidence.low), _amount(about, limits.fail)
    worse = "times stable's" if about.kind == "ratio" else "worse"
    return f"{_seen(about, counts)}; at least {low} {worse}, more than the {bound} allowed."


def passing(about: LiveMetric, limits: Limits, counts: Counts, evidence: Evidence, *, superior: bool) -> str:
    """Why a metric passes."""
    high, bound = _amount(about, evidence.high), _amount(about, limits.margin)
    same = 1.0 if about.kind == "ratio" else 0.0
    if superior or (evidence.high is not None and evidence.high < same):
        return f"{_seen(about, counts)}; shown to be better than stable."
    worse = "times stable's" if about.kind == "ratio" else "worse"
    return f"{_seen(about, counts)}; at most {high} {worse}, within the margin of {bound}."


def undecided(
    about: LiveMetric, limits: Limits, counts: Counts, evidence: Evidence, *, superior: bool, minimum: int
) -> str:
    """Why a metric is inconclusive, and what would decide it."""
    seen = _seen(about, counts)
    silent = [name for name, n in (("the canary", counts.canary_n), ("stable", counts.stable_n)) if n == 0]
    if silent:
        return f"{seen}; no values of {' and '.join(silent)} yet."
    if evidence.in_step == 0:
        return f"{seen}; nothing to compare in this step yet."
    if counts.canary_n < minimum:
        return f"{seen}; {minimum - counts.canary_n} more values of the canary are needed."
    bound = _amount(about, limits.margin)
    if evidence.against:
        return f"{seen}; in this step it looks worse than the margin of {bound}."
    worse = "times stable's" if about.kind == "ratio" else "worse"
    open_to = "it may be as much as stable's many times" if evidence.high is None else ""
    may = open_to or f"it may be {_amount(about, evidence.high)} {worse}"
    wanted = "not shown to be better yet" if superior else f"the margin is {bound}"
    return f"{seen}; {may}, {wanted}{_outlook(counts, evidence)}."


def impossible(about: LiveMetric, bad: tuple[int, int]) -> str:
    """There are too many values that the metric cannot have; `bad` of canary and stable."""
    return f"{_capital(about.noun)}: values that cannot be, {bad[0]} of the canary and {bad[1]} of stable."


def how_many_more(missing: int, noun: str, seen: int, elapsed: float) -> str:
    """ "12 more requests of the canary, about 9 min at this pace"; `seen` of them took `elapsed` seconds."""
    text = f"{missing} more {noun}{'' if missing == 1 else 's'} of the canary"
    return f"{text}, about {duration(missing * elapsed / seen)} at this pace" if seen > 2 and elapsed > 0 else text


def duration(seconds: float) -> str:
    """A length of time as people say it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _seen(about: LiveMetric, counts: Counts) -> str:
    sides = ((counts.canary_mean, counts.canary_n), (counts.stable_mean, counts.stable_n))
    if about.kind == "rate":
        canary, stable = (f"{(mean or 0.0) * n:.6g} of {n}" for mean, n in sides)
    else:
        canary, stable = ("nothing" if mean is None else f"{mean:.3g} {about.unit}".strip() for mean, _ in sides)
    return f"{_capital(about.noun)}: {canary} on the canary, {stable} on stable"


def _amount(about: LiveMetric, value: float | None) -> str:
    if value is None:
        return "many"
    if about.kind == "rate":
        return f"{100 * value:.3g} points"
    return f"{value:.2f}"


def _outlook(counts: Counts, evidence: Evidence) -> str:
    if evidence.more_blocks is None:
        return ""
    more = max(1, round(evidence.more_blocks * counts.canary_n / evidence.blocks))
    pace = f" ({duration(evidence.more_s)} at this pace)" if evidence.more_s else ""
    return f"; about {more} more values of the canary{pace} would decide"


def _capital(noun: str) -> str:
    return noun[0].upper() + noun[1:]
