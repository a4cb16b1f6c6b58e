"""The metrics of speed and cost."""

from __future__ import annotations

from sluice.evaluation.scores import Metric

SPEED_METRICS: tuple[Metric, ...] = (
    Metric(
        "speed.ttft_s", "Time to first token", "mean", False, "s", 3,
        "seconds from sending to the first token", "speed", None,
    ),
    Metric(
        "speed.latency_s", "Time to last token", "mean", False, "s", 2,
        "seconds from sending to the end of the answer", "speed", None,
    ),
    Metric(
        "speed.tokens_per_s", "Tokens a second", "mean", True, "tokens/s", 1,
        "answer tokens a second of one request, from the first token on", "speed", None,
    ),
    Metric(
        "speed.cost_per_1000", "Cost of 1,000 requests", "mean", False, "", 3,
        "the server's price for the time that 1,000 such requests hold it", "speed", None,
    ),
)  # fmt: skip
