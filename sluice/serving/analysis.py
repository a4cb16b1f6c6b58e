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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sluice.serving.analysis_wording import Counts, failing, how_many_more, impossible, passing, undecided
from sluice.serving.comparison import Comparison, Evidence, Limits
from sluice.serving.counting import Counting
from sluice.serving.metrics import LIVE_METRICS, Kind
from sluice.serving.observations import Sample
from sluice.serving.policy import AnalysisPolicy, MetricPolicy, Minimum

Verdict = Literal["pass", "fail", "inconclusive"]

CONVICTING = 50
"""Requests that are named for a failing metric, at most."""


@dataclass(frozen=True)
class MetricResult:
    """One metric: its verdict in a word and in a sentence.

    `estimate`, `low` and `high` are the difference (rates and scores, positive is worse) or the ratio (times, costs) of
    canary and stable at the same moments. The interval is always valid and does not disagree with the verdict; None
    where nothing is known, and `high` of a ratio without an upper bound. `bound_fail` and `bound_margin`: on the same
    scale. `canary_mean` and `stable_mean` are in the metric's own unit, over all values that counted. `p_fail` and
    `p_pass`: always-valid p-values against "no worse than bound_fail" and "worse by bound_margin or more".
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
    """The comparison of one rollout: fed with samples, asked for verdicts. The same samples and the same beginnings of
    steps always give the same verdicts."""

    def __init__(self, policy: AnalysisPolicy, canary: str, stable: str) -> None:
        self._releases = {stable: False, canary: True}
        gating = sum(metric.gating for metric in policy.metrics.values())
        # Bonferroni: the chances of all metrics that may end the rollout add up to no more than `false_rollback`.
        fail_level = policy.false_rollback / max(1, gating)
        counted = dict.fromkeys((*policy.metrics, "error_rate", "thumbs_down"))
        self._counting = {name: Counting(LIVE_METRICS[name], policy.requests_per_session) for name in counted}
        self._metrics = {
            name: _Metric(self._counting[name], name, limits, fail_level, policy.false_pass)
            for name, limits in policy.metrics.items()
        }

    def add(self, samples: Iterable[Sample]) -> None:
        """Samples later than all that were added before. Those of other releases and metrics do not count."""
        for sample in sorted(samples, key=lambda each: each.known):
            canary, counting = self._releases.get(sample.release), self._counting.get(sample.metric)
            if canary is None or counting is None:
                continue
            value = counting.value_of(sample, canary)
            if value is not None and sample.metric in self._metrics:
                self._metrics[sample.metric].add(sample, canary, value)

    def moved(self, jump: float) -> None:
        """The clock jumped by so many seconds: what was added moves with it, so that a step counts its own samples."""
        for counting in self._counting.values():
            counting.moved(jump)
        for metric in self._metrics.values():
            metric.moved(jump)

    def result(self, minimum: Minimum, *, since: float, missing: Mapping[str, str]) -> AnalysisResult:
        """The verdict now. `minimum` is that of the running step, which began at `since` (epoch seconds); `missing`
        says, by metric, why no figures can be had. When and how often one asks changes no verdict."""
        results = tuple(metric.result(since, missing.get(name)) for name, metric in self._metrics.items())
        deciding = [result for result in results if result.gating]
        failed = [result for result in deciding if result.verdict == "fail"]
        if failed:
            convicting = tuple(each for result in failed for each in self._metrics[result.name].convicting())
            return AnalysisResult("fail", " ".join(result.sentence for result in failed), results, convicting)
        # Not "none of them is inconclusive": a pass needs every metric that decides to have passed.
        still_open = [*self._too_few(minimum, since)]
        for result in deciding:
            optional = result.name == "thumbs_down" and minimum.feedback == 0 and result.name not in missing
            if result.verdict != "pass" and not optional:
                still_open.append(result.sentence)
        if not deciding:
            still_open.append("No metric decides: nothing can pass.")
        if still_open:
            return AnalysisResult("inconclusive", " ".join(still_open), results)
        requests = self._counting["error_rate"].n[1]
        sentence = f"No worse than stable in {len(deciding)} metrics over {requests} requests of the canary."
        return AnalysisResult("pass", sentence, results)

    def _too_few(self, minimum: Minimum, since: float) -> Iterator[str]:
        needs = (("error_rate", "request", minimum.requests), ("thumbs_down", "judged answer", minimum.feedback))
        for name, noun, needed in needs:
            seen, elapsed = self._counting[name].canary_since(since)
            if seen < needed:
                yield f"{how_many_more(needed - seen, noun, seen, elapsed)} ({seen} of {needed} in this step)."


class _Metric:
    """One metric: its limits, what was counted, and what is compared."""

    def __init__(
        self, counting: Counting, name: str, limits: MetricPolicy, fail_level: float, pass_level: float
    ) -> None:
        self._about, self._policy, self._counting = LIVE_METRICS[name], limits, counting
        equal = 1.0 if self._about.kind == "ratio" else 0.0
        margin = equal if limits.superior else limits.margin
        self._limits = Limits(limits.fail_above, margin, fail_level, pass_level)
        self._comparison = Comparison(self._about.kind, self._limits)
        self._worst: list[tuple[float, float, int, Conviction]] = []

    def add(self, sample: Sample, canary: bool, value: float) -> None:
        """One value that counts."""
        self._comparison.add(canary, value, sample.known)
        if canary and (self._about.kind != "rate" or value > 0):
            self._remember(sample, value)

    def moved(self, jump: float) -> None:
        """The clock jumped by so many seconds."""
        self._comparison.moved(jump)

    def result(self, since: float, missing: str | None) -> MetricResult:
        """The verdict; `missing` says why there are no figures, though there may have been some before."""
        evidence = self._comparison.evidence(since)
        counting = self._counting
        counts = Counts(counting.n[1], counting.n[0], counting.mean(True), counting.mean(False))
        verdict, sentence = self._judged(evidence, counts, missing)
        return MetricResult(
            name=self._about.name,
            kind=self._about.kind,
            gating=self._policy.gating,
            verdict=verdict,
            sentence=sentence,
            estimate=evidence.estimate,
            low=evidence.low,
            high=evidence.high,
            canary_n=counts.canary_n,
            stable_n=counts.stable_n,
            canary_mean=counts.canary_mean,
            stable_mean=counts.stable_mean,
            p_fail=evidence.p_fail,
            p_pass=evidence.p_pass,
            bound_fail=self._limits.fail,
            bound_margin=self._limits.margin,
        )

    def convicting(self) -> tuple[Conviction, ...]:
        """The canary's requests behind this metric, the latest last."""
        return tuple(sorted((each[3] for each in self._worst), key=lambda request: request.known))

    def _judged(self, evidence: Evidence, counts: Counts, missing: str | None) -> tuple[Verdict, str]:
        about, limits, superior = self._about, self._limits, self._policy.superior
        if evidence.p_fail <= limits.fail_level:
            return "fail", failing(about, limits, counts, evidence)
        if missing:
            return "inconclusive", missing
        if self._counting.too_many_bad():
            stable, canary = self._counting.bad
            return "inconclusive", impossible(about, (canary, stable))
        enough = evidence.in_step > 0 and counts.canary_n >= self._policy.minimum
        if evidence.p_pass <= limits.pass_level and enough and not evidence.against:
            return "pass", passing(about, limits, counts, evidence, superior=superior)
        sentence = undecided(about, limits, counts, evidence, superior=superior, minimum=self._policy.minimum)
        return "inconclusive", sentence

    def _remember(self, sample: Sample, value: float) -> None:
        """Of rates the latest that are bad, else the worst."""
        found = Conviction(sample.request_id, sample.session, self._about.name, value, sample.detail, sample.known)
        worse = {"rate": 0.0, "ratio": value, "score": -value}[self._about.kind]
        # The count breaks ties, so that convictions are never compared.
        heapq.heappush(self._worst, (worse, sample.known, self._counting.n[1], found))
        if len(self._worst) > CONVICTING:
            heapq.heappop(self._worst)
