"""Numbers and verdicts in words, the same in the decision, the report and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sluice.evaluation.policy import AnyCheck, NonInferiority
from sluice.evaluation.scores import Metric

if TYPE_CHECKING:
    from sluice.evaluation.comparison import MetricComparison


def value(number: float | None, metric: Metric) -> str:
    """A score, or a dash where there is none."""
    return "–" if number is None else f"{number:.{metric.decimals}f}"


def change(number: float | None, metric: Metric) -> str:
    """A difference with its sign; a true minus, so that columns align."""
    if number is None:
        return "–"
    text = f"{number:+.{metric.decimals}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("+-")


def difference(one: MetricComparison) -> str:
    """`+0.339 [+0.270, +0.411]`."""
    metric = one.metric
    if one.low is None or one.high is None:
        return "–"
    return f"{change(one.difference, metric)} [{change(one.low, metric)}, {change(one.high, metric)}]"


def own(one: MetricComparison) -> str:
    """The candidate's own mean: `0.012 [0.004, 0.031]`."""
    if one.candidate_low is None or one.candidate_high is None:
        return value(one.candidate, one.metric)
    low, high = value(one.candidate_low, one.metric), value(one.candidate_high, one.metric)
    return f"{value(one.candidate, one.metric)} [{low}, {high}]"


def need(check: AnyCheck, metric: Metric | None) -> str:
    """What the check asks for, as short as a table cell."""
    unit = f" {metric.unit}" if metric and metric.unit else ""
    higher = metric is None or metric.higher_is_better
    if check.rule == "limit":
        bounds = (("at most", check.at_most), ("at least", check.at_least))
        return " and ".join(f"{word} {bound:g}{unit}" for word, bound in bounds if bound is not None)
    if check.rule == "superiority":
        direction = "better" if higher else "lower"
        return f"{direction}, by {check.minimum_effect:g}{unit} or more" if check.minimum_effect else direction
    return f"less than {margin(check, metric)} {'lower' if higher else 'more'}"


def margin(check: NonInferiority, metric: Metric | None) -> str:
    """`0.05`, `20 words` or `10%`."""
    if isinstance(check.margin, str):
        return check.margin
    return f"{check.margin:g}{f' {metric.unit}' if metric and metric.unit else ''}"


def counts(found: Mapping[str, int]) -> str:
    """`5 timeout, 2 http 500`, most frequent first."""
    return ", ".join(f"{count} {name}" for name, count in sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))


def joined(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
