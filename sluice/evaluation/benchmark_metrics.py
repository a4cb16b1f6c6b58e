"""The metrics that benchmark tasks give: one accuracy for each task."""

from __future__ import annotations

from collections.abc import Iterable

from sluice.evaluation.scores import Metric


def benchmark_metrics(tasks: Iterable[str]) -> tuple[Metric, ...]:
    """`benchmark.TASK` for each task."""
    return tuple(
        Metric(
            f"benchmark.{task}", f"Benchmark {task}", "binary", True, "", 3,
            f"share of items of the task {task} answered right", "benchmark", (0.0, 1.0),
            "lm-evaluation-harness 0.4 (Biderman et al. 2024, arXiv:2405.14782)",
        )
        for task in tasks
    )  # fmt: skip
