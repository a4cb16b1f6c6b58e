"""What an analysis says of a metric, in a sentence for people."""

from __future__ import annotations

from dataclasses import dataclass

from sluice.serving.comparison import Evidence, Limits
from sluice.serving.metrics import LiveMetric
from sluice.serving.policy import MetricPolicy


@dataclass(frozen=True)
class Counts:
    """Values of each release and their means; None without values."""

    canary_n: int
    stable_n: int
    canary_mean: float | None
    stable_mean: float | None


def metric_sentence(
    about: LiveMetric, policy: MetricPolicy, tested: Limits, verdict: str, counts: Counts, evidence: Evidence
) -> str:
    """What was seen, and what it means for the verdict."""
    seen = f"{about.noun[0].upper()}{about.noun[1:]}: {_seen(about, counts)}"
    if evidence.blocks == 0:
        return f"{seen}; nothing to compare yet."
    if verdict == "fail":
        return f"{seen}; {_amount(about, evidence.low)}, more than the {_limit(about, tested.fail)} allowed."
    if verdict == "pass":
        wanted = "better than stable" if policy.superior else f"within {_limit(about, tested.margin)}"
        return f"{seen}; at most {_limit(about, evidence.high)}, {wanted}."
    if counts.canary_n < policy.minimum:
        return f"{seen}; {policy.minimum - counts.canary_n} more of the canary are needed."
    if evidence.holds:
        return f"{seen}; in this step it looks worse than {_limit(about, tested.margin)}."
    wanted = "to be shown better" if policy.superior else f"more than {_limit(about, tested.margin)}"
    return f"{seen}; may be as much as {_limit(about, evidence.high)}, {wanted}{_more(counts, evidence)}."


def how_many_more(missing: int, noun: str, seen: int, elapsed: float) -> str:
    """ "12 more requests of the canary, about 9 min at this pace"; `seen` of them took `elapsed` seconds."""
    text = f"{missing} more {noun}{'' if missing == 1 else 's'} of the canary"
    return f"{text}, about {duration(missing * elapsed / seen)} at this pace" if seen > 2 and elapsed > 0 else text


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _seen(about: LiveMetric, counts: Counts) -> str:
    if about.kind == "rate":
        return f"{_part(counts.canary_mean, counts.canary_n)} on the canary, {_part(counts.stable_mean, counts.stable_n)} on stable"
    return f"{_mean(about, counts.canary_mean)} on the canary, {_mean(about, counts.stable_mean)} on stable"


def _part(mean: float | None, count: int) -> str:
    return f"{(mean or 0.0) * count:.6g} of {count}"


def _mean(about: LiveMetric, mean: float | None) -> str:
    return "nothing" if mean is None else f"{mean:.3g} {about.unit}".strip()


def _amount(about: LiveMetric, value: float | None) -> str:
    worse = "times stable's" if about.kind == "ratio" else "worse"
    return f"at least {_limit(about, value)} {worse}"


def _limit(about: LiveMetric, value: float | None) -> str:
    if value is None:
        return "nothing known"
    if about.kind == "ratio":
        return f"{value:.2f}"
    return f"{value:.2f}" if about.kind == "score" else f"{100 * value:.3g} points"


def _more(counts: Counts, evidence: Evidence) -> str:
    if evidence.more_blocks is None:
        return ""
    return f"; about {round(evidence.more_blocks * counts.canary_n / evidence.blocks)} more of the canary would decide"
