"""Is the canary worse than stable? One window of time, two releases, a verdict for each metric and for the whole.

Two questions are asked of every metric, each with its own confidence:
- Is it worse? Only if the difference is larger than `fail_above` and more than chance (`fail_confidence`, high,
  because the question is asked again every few seconds).
- Is it as good? Only if the whole interval (`pass_confidence`) stays within `tolerance`.
Neither is a verdict too: inconclusive. No data, too few samples or a value that is not a number is never a pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sluice.serving.intervals import Interval, median_ratio, rate_difference

Verdict = Literal["pass", "fail", "inconclusive"]

_FEWEST = 3
"""A median of fewer values than this says nothing."""


@dataclass(frozen=True)
class ReleaseSamples:
    """What one release did in a window. Counts of requests; latencies in milliseconds, of whole 2xx answers only.

    `errors` are answers other than 2xx, `broken` streams that did not end, `empty` answers without text, `truncated`
    answers cut at the token limit; the last two are counted among the whole answers.
    """

    release: str
    requests: int
    errors: int = 0
    broken: int = 0
    empty: int = 0
    truncated: int = 0
    ttft_ms: tuple[float, ...] = ()
    total_ms: tuple[float, ...] = ()
    thumbs_up: int = 0
    thumbs_down: int = 0

    @property
    def feedback(self) -> int:
        """Answers that a user judged."""
        return self.thumbs_up + self.thumbs_down

    @property
    def whole(self) -> int:
        """Answers that arrived complete."""
        return self.requests - self.errors - self.broken


class MetricPolicy(BaseModel):
    """Limits of one metric: for rates a difference (0.1: ten points more), for latencies a ratio (1.5: half more)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gating: bool = True
    fail_above: float = Field(ge=0, description="a worse value than this, if more than chance, fails")
    tolerance: float = Field(gt=0, description="the interval must end below this to pass")

    @model_validator(mode="after")
    def _ordered(self) -> MetricPolicy:
        if self.tolerance < self.fail_above:
            raise ValueError(f"tolerance {self.tolerance} is below fail_above {self.fail_above}: nothing could pass")
        return self


class AnalysisPolicy(BaseModel):
    """How canary and stable are compared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pass_confidence: float = Field(0.9, gt=0.5, lt=1)
    fail_confidence: float = Field(0.99, gt=0.5, lt=1)
    error_rate: MetricPolicy
    empty_answers: MetricPolicy
    truncated_answers: MetricPolicy
    thumbs_down: MetricPolicy
    time_to_first_token: MetricPolicy
    total_time: MetricPolicy

    @model_validator(mode="after")
    def _ratios(self) -> AnalysisPolicy:
        for name in ("time_to_first_token", "total_time"):
            if getattr(self, name).fail_above < 1:
                raise ValueError(f"{name}.fail_above is a ratio of medians and cannot be below 1")
        if not any(getattr(self, name).gating for name in METRICS):
            raise ValueError("no metric is gating: every release would pass")
        return self


METRICS = ("error_rate", "empty_answers", "truncated_answers", "thumbs_down", "time_to_first_token", "total_time")


class Minimum(BaseModel):
    """Fewest samples of the canary for a step to pass. 0 feedback: judged if there is any, not required."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests: int = Field(ge=1)
    feedback: int = Field(0, ge=0)


@dataclass(frozen=True)
class MetricResult:
    """One metric: its verdict in a word and in a sentence. `required`: does it decide at this step?

    `difference`, `low` and `high` are the difference of rates or the ratio of medians; None without data.
    """

    name: str
    verdict: Verdict
    required: bool
    sentence: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class AnalysisResult:
    """The verdict of one look at one window, with every metric's."""

    verdict: Verdict
    sentence: str
    metrics: tuple[MetricResult, ...]
    canary: ReleaseSamples
    stable: ReleaseSamples

    def to_json(self) -> dict[str, Any]:
        """For records and screens; counts and medians instead of the single samples."""
        return {
            "verdict": self.verdict,
            "sentence": self.sentence,
            "metrics": [asdict(metric) for metric in self.metrics],
            "canary": _shown(self.canary),
            "stable": _shown(self.stable),
        }


def analyse(canary: ReleaseSamples, stable: ReleaseSamples, policy: AnalysisPolicy, minimum: Minimum) -> AnalysisResult:
    """Compare two releases of one window. Pure: the same samples always give the same result."""
    looks = _Looks(policy, minimum)
    metrics = (
        looks.rate("error_rate", "failed or broken answers", canary, stable, _failed(canary), _failed(stable)),
        looks.rate("empty_answers", "empty answers", canary, stable,
                   _part(canary.empty, canary), _part(stable.empty, stable)),
        looks.rate("truncated_answers", "answers cut at the limit", canary, stable,
                   _part(canary.truncated, canary), _part(stable.truncated, stable)),
        looks.rate("thumbs_down", "thumbs down", canary, stable,
                   (canary.thumbs_down, canary.feedback), (stable.thumbs_down, stable.feedback)),
        looks.latency("time_to_first_token", "time to first token", canary.ttft_ms, stable.ttft_ms),
        looks.latency("total_time", "time of the whole answer", canary.total_ms, stable.total_ms),
    )  # fmt: skip
    failed = [metric for metric in metrics if metric.required and metric.verdict == "fail"]
    if failed:
        return AnalysisResult("fail", " ".join(metric.sentence for metric in failed), metrics, canary, stable)
    if canary.requests < minimum.requests or canary.feedback < minimum.feedback:
        sentence = (
            f"{canary.requests} of {minimum.requests} requests and {canary.feedback} of {minimum.feedback} judgements "
            "so far."
        )
        return AnalysisResult("inconclusive", sentence, metrics, canary, stable)
    # Not "none of them is inconclusive": a pass needs every metric that decides to have passed.
    open_metrics = [metric for metric in metrics if metric.required and metric.verdict != "pass"]
    if open_metrics:
        sentence = " ".join(metric.sentence for metric in open_metrics)
        return AnalysisResult("inconclusive", sentence, metrics, canary, stable)
    count = sum(metric.required for metric in metrics)
    sentence = f"No worse than stable in {count} metrics over {canary.requests} requests."
    return AnalysisResult("pass", sentence, metrics, canary, stable)


class _Looks:
    """Judges single metrics under one policy."""

    def __init__(self, policy: AnalysisPolicy, minimum: Minimum) -> None:
        self._policy = policy
        self._minimum = minimum

    def rate(
        self,
        name: str,
        noun: str,
        canary: ReleaseSamples,
        stable: ReleaseSamples,
        of_canary: tuple[int, int],
        of_stable: tuple[int, int],
    ) -> MetricResult:
        limits: MetricPolicy = getattr(self._policy, name)
        required = limits.gating
        if name == "thumbs_down" and self._minimum.feedback == 0 and of_canary[1] == 0:
            required = False
        counts = f"{_share(of_canary)} on the canary, {_share(of_stable)} on stable"
        if not of_canary[1] or not of_stable[1]:
            return MetricResult(name, "inconclusive", required, f"No data on {noun} ({counts}).")
        strict = rate_difference(of_canary, of_stable, self._policy.fail_confidence)
        loose = rate_difference(of_canary, of_stable, self._policy.pass_confidence)
        result = _judge(name, f"{noun.capitalize()}: {counts}", limits, required, strict, loose, 0.0)
        if name == "thumbs_down" and self._minimum.feedback == 0 and result.verdict == "inconclusive":
            return MetricResult(**{**asdict(result), "required": False})
        return result

    def latency(self, name: str, noun: str, canary: Sequence[float], stable: Sequence[float]) -> MetricResult:
        limits: MetricPolicy = getattr(self._policy, name)
        if len(canary) < _FEWEST or len(stable) < _FEWEST:
            sentence = f"Too few answers for the {noun} ({len(canary)} on the canary, {len(stable)} on stable)."
            return MetricResult(name, "inconclusive", limits.gating, sentence)
        if not all(math.isfinite(value) and value > 0 for value in (*canary, *stable)):
            # Envoy counts whole milliseconds: a 0 is an answer faster than its clock.
            if all(math.isfinite(value) and value >= 0 for value in (*canary, *stable)):
                canary, stable = [max(value, 0.5) for value in canary], [max(value, 0.5) for value in stable]
            else:
                sentence = f"The {noun} holds a value that is not a time."
                return MetricResult(name, "inconclusive", limits.gating, sentence)
        strict = median_ratio(canary, stable, self._policy.fail_confidence)
        loose = median_ratio(canary, stable, self._policy.pass_confidence)
        text = f"{noun.capitalize()}: {strict.estimate:.2f} times stable's"
        return _judge(name, text, limits, limits.gating, strict, loose, 1.0)


def _judge(
    name: str, text: str, limits: MetricPolicy, required: bool, strict: Interval, loose: Interval, equal: float
) -> MetricResult:
    """`equal` is the value at which canary and stable are the same: 0 for a difference, 1 for a ratio."""
    verdict: Verdict
    if strict.low > equal and strict.estimate > limits.fail_above:
        verdict, why = "fail", f"worse than the {limits.fail_above:g} allowed, and not by chance"
    elif loose.high <= limits.tolerance:
        verdict, why = "pass", f"at most {loose.high:.2f}, within {limits.tolerance:g}"
    else:
        verdict, why = "inconclusive", f"may be as much as {loose.high:.2f}, more than {limits.tolerance:g}"
    return MetricResult(name, verdict, required, f"{text} ({why}).", strict.estimate, loose.low, loose.high)


def _failed(samples: ReleaseSamples) -> tuple[int, int]:
    return samples.errors + samples.broken, samples.requests


def _part(count: int, samples: ReleaseSamples) -> tuple[int, int]:
    return count, samples.whole


def _share(counts: tuple[int, int]) -> str:
    return f"{counts[0]} of {counts[1]}"


def _shown(samples: ReleaseSamples) -> dict[str, Any]:
    shown = asdict(samples)
    for name in ("ttft_ms", "total_ms"):
        values = sorted(shown.pop(name))
        shown[f"median_{name}"] = values[len(values) // 2] if values else None
    return shown
