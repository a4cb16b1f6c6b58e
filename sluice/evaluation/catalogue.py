"""All metrics that a suite can name: what each part of an evaluation measures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sluice.evaluation.answer_metrics import ANSWER_METRICS
from sluice.evaluation.benchmark_metrics import benchmark_metrics
from sluice.evaluation.judged_metrics import JUDGED_METRICS
from sluice.evaluation.safety_metrics import SAFETY_METRICS
from sluice.evaluation.scores import Metric
from sluice.evaluation.speed_metrics import SPEED_METRICS


def catalogue(tasks: Iterable[str] = ()) -> Mapping[str, Metric]:
    """Metrics by name; `tasks` are the benchmark tasks of a suite."""
    every = (*ANSWER_METRICS, *JUDGED_METRICS, *SAFETY_METRICS, *SPEED_METRICS, *benchmark_metrics(tasks))
    return {metric.name: metric for metric in every}
