"""What a rollout compares two releases by. Every metric is a stream of values, one for each request that has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["rate", "ratio", "score"]
"""`rate`: 0 or 1 a request, 1 is bad; compared by the difference of means. `ratio`: a positive quantity of which more
is worse (time, money); compared by the ratio of typical values. `score`: 0 to 1, more is better; by the difference."""

Source = Literal["gateway", "traces"]


@dataclass(frozen=True)
class LiveMetric:
    """One metric. `noun` completes "5 of 100 requests with ..."; `unit` is that of its values, empty for rates."""

    name: str
    kind: Kind
    noun: str
    source: Source
    unit: str = ""


LIVE_METRICS = {
    metric.name: metric
    for metric in (
        # From the gateway's access log: exact, for every request.
        LiveMetric("error_rate", "rate", "failed or broken answers", "gateway"),
        LiveMetric("empty_answers", "rate", "empty answers", "gateway"),
        LiveMetric("truncated_answers", "rate", "answers cut at the limit", "gateway"),
        LiveMetric("time_to_first_token", "ratio", "time to first token", "gateway", "ms"),
        LiveMetric("time_per_token", "ratio", "time per token after the first", "gateway", "ms"),
        LiveMetric("total_time", "ratio", "time of the whole answer", "gateway", "ms"),
        # From the trace store, joined by release: what the answers said, and what people and judges said of them.
        LiveMetric("refusals", "rate", "refusals", "traces"),
        LiveMetric("invalid_json", "rate", "answers that are not the JSON asked for", "traces"),
        LiveMetric("invalid_tool_calls", "rate", "tool calls that are not valid", "traces"),
        LiveMetric("thumbs_down", "rate", "thumbs down", "traces"),
        LiveMetric("judge_score", "score", "the judge's score", "traces"),
        LiveMetric("cost_per_request", "ratio", "cost of a request", "traces", "EUR"),
    )
}
