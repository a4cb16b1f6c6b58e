"""Numbers and verdicts in words, the same in the decision, the report and the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from sluice.evaluation.comparison import MetricComparison
from sluice.evaluation.metrics import METRICS, Metric
from sluice.evaluation.suite import NonInferiority, Superiority


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
    metric = METRICS[one.metric]
    if one.low is None or one.high is None:
        return "–"
    return f"{change(one.difference, metric)} [{change(one.low, metric)}, {change(one.high, metric)}]"


def need(check: Superiority | NonInferiority) -> str:
    """What the check asks for, as short as a table cell."""
    metric = METRICS[check.metric]
    unit = f" {metric.unit}" if metric.unit else ""
    if check.rule == "superiority":
        direction = "better" if metric.higher_is_better else "lower"
        return f"{direction}, by {check.minimum_effect:g}{unit} or more" if check.minimum_effect else direction
    loss = "lower" if metric.higher_is_better else "more"
    return f"less than {check.margin:g}{unit} {loss}"


def counts(found: Mapping[str, int]) -> str:
    """`5 timeout, 2 http 500`, most frequent first."""
    return ", ".join(f"{count} {name}" for name, count in sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))


def joined(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
