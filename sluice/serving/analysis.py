"""Is the canary worse than stable? Two releases, all their figures since the rollout began, a verdict for each metric
and for the whole.

Two questions are asked of every metric, each with its own chance of error, which holds however often one looks:
- Is it worse than `fail_above` allows? One gating metric that is, and the release fails, for good.
- Is it no worse than `margin`? All gating metrics have to be.
Neither is a verdict too: inconclusive. No data, a source that is down, too few samples or values that are no numbers
are never a pass. Method and figures: docs/canary-analysis.md.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sluice.serving.analysis_wording import Counts, how_many_more, metric_sentence
from sluice.serving.comparison import Comparison, Evidence, Limits
from sluice.serving.metrics import LIVE_METRICS, Kind, LiveMetric
from sluice.serving.observations import Sample
from sluice.serving.policy import AnalysisPolicy, MetricPolicy, Minimum

Verdict = Literal["pass", "fail", "inconclusive"]

CONVICTING = 50
"""Requests that are named for a failing metric, at most."""

_BAD_SHARE = 0.02
"""More values than this that are no numbers, and nothing is known of a metric."""


@dataclass(frozen=True)
class MetricResult:
    """One metric: its verdict in a word and in a sentence.

    `estimate`, `low` and `high` are the difference (rates and scores, positive is worse) or the ratio (times, costs) of
    canary and stable at the same moments; `low` and `high` are always valid and never disagree with the verdict; None
    where nothing is known. `bound_fail` and `bound_margin` are on the same scale. `canary_mean` and `stable_mean` are in
    the metric's own unit, over all values. `p_fail` and `p_pass`: always-valid p-values against "no worse than
    bound_fail" and "worse by bound_margin or more".
    """

    name: str
    kind: Kind
    gating: bool
    verdict: Verdict
    sentence: str
    estimate: float | None
    low: float | None
    high: float | None
    canary_n: int
    stable_n: int
    canary_mean: float | None
    stable_mean: float | None
    p_fail: float
    p_pass: float
    bound_fail: float
    bound_margin: float


@dataclass(frozen=True)
class Conviction:
    """A request of the canary behind a failing metric. `known` in seconds since the epoch."""

    request_id: str
    session: str
    metric: str
    value: float
    detail: str
    known: float


@dataclass(frozen=True)
class AnalysisResult:
    """The verdict of one look, with every metric's. `convicting` is empty unless a metric failed."""

    verdict: Verdict
    sentence: str
    metrics: tuple[MetricResult, ...]
    convicting: tuple[Conviction, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> AnalysisResult:
        """The inverse of `to_json`. Raises `KeyError` or `TypeError` on foreign content."""
        return cls(
            content["verdict"],
            content["sentence"],
            tuple(MetricResult(**metric) for metric in content["metrics"]),
            tuple(Conviction(**request) for request in content["convicting"]),
        )


class Analysis:
    """The comparison of one rollout: fed with samples, asked for verdicts, in any order. The same samples and the same
    beginnings of steps always give the same verdicts."""

    def __init__(self, policy: AnalysisPolicy, canary: str, stable: str) -> None:
        self._releases = {stable: False, canary: True}
        gating = sum(metric.gating for metric in policy.metrics.values())
        # Bonferroni: the chances of the metrics that may end the rollout add up to no more than `false_rollback`.
        fail_level = policy.false_rollback / gating
        self._metrics = {
            name: _Metric(LIVE_METRICS[name], limits, fail_level, policy.false_pass)
            for name, limits in policy.metrics.items()
        }
        self._most = policy.requests_per_session
        self._used: Counter[tuple[str, str, str]] = Counter()
        self._known: dict[str, list[float]] = {"error_rate": [], "thumbs_down": []}

    def add(self, samples: Iterable[Sample]) -> None:
        """Samples later than all that were added before. Those of other releases and metrics do not count."""
        for sample in sorted(samples, key=lambda each: each.known):
            canary = self._releases.get(sample.release)
            if canary is None:
                continue
            metric = self._metrics.get(sample.metric)
            if metric is not None and not metric.sound(sample.value):
                metric.bad[canary] += 1
                continue
            if self._most and sample.session:
                key = sample.metric, sample.release, sample.session
                self._used[key] += 1
                if self._used[key] > self._most:
                    continue
            if canary and sample.metric in self._known:
                insort(self._known[sample.metric], sample.known)
            if metric is not None:
                metric.add(sample, canary)

    def result(self, minimum: Minimum, *, since: float, missing: Mapping[str, str]) -> AnalysisResult:
        """The verdict now. `minimum` is that of the running step, which began at `since` (epoch seconds); `missing`
        says, by metric, why no figures can be had."""
        looks = [
            (metric, self._look(name, metric, minimum, since, missing.get(name)))
            for name, metric in self._metrics.items()
        ]
        results = tuple(result for _, result in looks)
        failed = [(metric, result) for metric, result in looks if result.gating and result.verdict == "fail"]
        if failed:
            sentence = " ".join(result.sentence for _, result in failed)
            convicting = tuple(request for metric, _ in failed for request in metric.convicting())
            return AnalysisResult("fail", sentence, results, convicting)
        feedback_asked = minimum.feedback > 0
        # Not "none of them is inconclusive": a pass needs every metric that decides to have passed.
        undecided = [
            result.sentence
            for _, result in looks
            if result.gating
            and result.verdict != "pass"
            and (result.name != "thumbs_down" or feedback_asked or "thumbs_down" in missing)
        ]
        undecided = [*self._too_few(minimum, since), *undecided]
        if undecided:
            return AnalysisResult("inconclusive", " ".join(undecided), results)
        count = sum(result.gating for result in results)
        requests = len(self._known["error_rate"])
        return AnalysisResult("pass", f"No worse than stable in {count} metrics over {requests} requests.", results)

    def _look(self, name: str, metric: _Metric, minimum: Minimum, since: float, missing: str | None) -> MetricResult:
        evidence = metric.comparison.evidence(since)
        verdict: Verdict = "inconclusive"
        if evidence.p_fail <= metric.tested.fail_level:
            verdict = "fail"
        elif evidence.p_pass <= metric.tested.pass_level and not (missing or metric.open(evidence)):
            verdict = "pass"
        sentence = missing if missing and verdict != "fail" else metric.sentence(verdict, evidence)
        counts = metric.counts()
        return MetricResult(
            name,
            metric.about.kind,
            metric.limits.gating,
            verdict,
            sentence,
            evidence.estimate,
            evidence.low,
            evidence.high,
            counts.canary_n,
            counts.stable_n,
            counts.canary_mean,
            counts.stable_mean,
            evidence.p_fail,
            evidence.p_pass,
            metric.tested.fail,
            metric.tested.margin,
        )

    def _too_few(self, minimum: Minimum, since: float) -> Iterator[str]:
        for name, noun, needed in (
            ("error_rate", "request", minimum.requests),
            ("thumbs_down", "judged answer", minimum.feedback),
        ):
            known = self._known[name]
            seen = len(known) - bisect_left(known, since)
            if seen < needed:
                elapsed = known[-1] - since if seen else 0.0
                yield f"{how_many_more(needed - seen, noun, seen, elapsed)} ({seen} of {needed} in this step)."


class _Metric:
    """One metric's limits, what was counted, and what is compared."""

    def __init__(self, about: LiveMetric, limits: MetricPolicy, fail_level: float, pass_level: float) -> None:
        self.about, self.limits = about, limits
        equal = 1.0 if about.kind == "ratio" else 0.0
        margin = equal if limits.superior else limits.margin
        self.tested = Limits(limits.fail_above, margin, fail_level, pass_level)
        self.comparison = Comparison(about.kind, self.tested)
        self.bad = [0, 0]
        self._n, self._sums = [0, 0], [0.0, 0.0]
        self._worst: list[tuple[float, float, int, Conviction]] = []

    def sound(self, value: float) -> bool:
        """Is `value` one that this metric can have?"""
        return math.isfinite(value) and value >= 0 and (self.about.kind == "ratio" or value <= 1)

    def add(self, sample: Sample, canary: bool) -> None:
        value = float(sample.value)
        if self.about.unit == "ms":
            # The gateway counts whole milliseconds: 0 is an answer faster than its clock.
            value = max(value, 0.5)
        self._n[canary] += 1
        self._sums[canary] += value
        self.comparison.add(canary, value, sample.known)
        if canary and (self.about.kind != "rate" or value > 0):
            self._remember(sample, value)

    def convicting(self) -> tuple[Conviction, ...]:
        """The canary's requests behind this metric, the latest last."""
        return tuple(sorted((each[3] for each in self._worst), key=lambda request: request.known))

    def open(self, evidence: Evidence) -> bool:
        """Is something missing, whatever the evidence shows?"""
        return self._n[1] < self.limits.minimum or evidence.holds or self._too_many_bad()

    def counts(self) -> Counts:
        means = [total / n if n else None for total, n in zip(self._sums, self._n, strict=True)]
        return Counts(self._n[1], self._n[0], means[1], means[0])

    def sentence(self, verdict: Verdict, evidence: Evidence) -> str:
        if verdict != "fail" and self._too_many_bad():
            which, count = ("canary", self.bad[1]) if self.bad[1] else ("stable", self.bad[0])
            return f"{self.about.noun.capitalize()}: {count} values of {which} are not possible; nothing can be said."
        return metric_sentence(self.about, self.limits, self.tested, verdict, self.counts(), evidence)

    def _too_many_bad(self) -> bool:
        return any(bad > _BAD_SHARE * (bad + n) for bad, n in zip(self.bad, self._n, strict=True))

    def _remember(self, sample: Sample, value: float) -> None:
        """Rates: the latest bad ones. Else the worst."""
        found = Conviction(sample.request_id, sample.session, self.about.name, value, sample.detail, sample.known)
        worse = {"rate": 0.0, "ratio": value, "score": -value}[self.about.kind]
        # The count breaks ties, so that convictions are never compared.
        heapq.heappush(self._worst, (worse, sample.known, self._n[1], found))
        if len(self._worst) > CONVICTING:
            heapq.heappop(self._worst)
