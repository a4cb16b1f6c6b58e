"""The gate: a policy and a paired comparison in, a decision out.

Three verdicts. `pass`: every gating check was shown. `fail`: one was refuted. `inconclusive`: neither, be it for too
few items, too many errors, a number that is none, or an interval that straddles the margin. Only `pass` opens the way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Literal

from sluice.evaluation import wording
from sluice.evaluation.comparison import Comparison, MetricComparison
from sluice.evaluation.policy import AnyCheck, NonInferiority, Policy, Superiority
from sluice.evaluation.scores import Metric
from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json, require_digest

Verdict = Literal["pass", "fail", "inconclusive"]

DECISION_VERSION = 1


@dataclass(frozen=True)
class Subjects:
    """Digests of what a decision rests on. `index` is None for an application that retrieves nothing; `evidence` has
    the measurements by name (`evaluation`, `benchmark-candidate`, `calibration`, ...)."""

    candidate: str
    champion: str
    holdout: str
    suite: str
    index: str | None = None
    evidence: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, digest in self.digests().items():
            require_digest(digest, name)

    def digests(self) -> dict[str, str]:
        """All digests by name."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "evidence"}
        return {name: digest for name, digest in own.items() if digest is not None} | dict(self.evidence)

    def to_json(self) -> Json:
        own = {one.name: getattr(self, one.name) for one in fields(self)}
        return {**own, "evidence": dict(sorted(self.evidence.items()))}


@dataclass(frozen=True)
class CheckResult:
    """One check of the policy on one slice: its verdict, what it needs, and why it came out so.

    `advisory`: it does not gate, because the policy says so or for the reason in `demoted`.
    """

    check: AnyCheck
    slice: str
    advisory: bool
    verdict: Verdict
    reason: str
    evidence: MetricComparison | None
    demoted: str = ""

    @property
    def title(self) -> str:
        """`Token F1`, or `Token F1 in category=permits`."""
        name = self.evidence.metric.title if self.evidence else self.check.metric
        return f"{name} in {self.slice}" if self.slice else name

    def to_json(self) -> Json:
        found = self.evidence
        return {
            "metric": self.check.metric,
            "slice": self.slice,
            "rule": self.check.rule,
            "advisory": self.advisory,
            "demoted": self.demoted,
            "need": wording.need(self.check, found.metric if found else None),
            "verdict": self.verdict,
            "reason": self.reason,
            "n": found.n if found else 0,
            "missing": dict(sorted(found.missing.items())) if found else {},
            "champion": _rounded(found.champion) if found else None,
            "candidate": _rounded(found.candidate) if found else None,
            "difference": _rounded(found.difference) if found else None,
            "interval": [_rounded(found.low), _rounded(found.high)] if found else [None, None],
            "p_adjusted": _rounded(found.adjusted_p) if found else None,
            "minimum_detectable_effect": _rounded(found.minimum_detectable_effect) if found else None,
        }


@dataclass(frozen=True)
class Decision:
    """The gate's decision. Times are ISO 8601 in UTC. `report` is the digest of the report artifact, once it exists:
    the report shows the decision, so the decision is sealed with `with_report` after the report is stored."""

    verdict: Verdict
    summary: str
    checks: tuple[CheckResult, ...]
    total: int
    subjects: Subjects
    policy: Policy
    created: str
    expires: str
    report: str | None = None

    @property
    def reasons(self) -> tuple[str, ...]:
        """One sentence for each gating check, those that stand in the way first; then the advisory ones."""
        order = {"fail": 0, "inconclusive": 1, "pass": 2}
        ranked = sorted(self.checks, key=lambda result: (result.advisory, order[result.verdict]))
        return tuple(result.reason for result in ranked)

    def with_report(self, digest: str) -> Decision:
        """The decision, resting on its stored report too."""
        return replace(self, report=require_digest(digest, "report"))

    def to_json(self) -> Json:
        return {
            "version": DECISION_VERSION,
            "verdict": self.verdict,
            "summary": self.summary,
            "reasons": list(self.reasons),
            "checks": [result.to_json() for result in self.checks],
            "items": self.total,
            **self.subjects.to_json(),
            "report": self.report,
            "policy": self.policy.model_dump(mode="json"),
            "created": self.created,
            "expires": self.expires,
        }


def decide(
    comparison: Comparison, policy: Policy, subjects: Subjects, now: datetime, *, longest_valid_hours: float = math.inf
) -> Decision:
    """Apply the policy. The same inputs give the same decision, byte for byte.

    `longest_valid_hours` is the installation's limit: it can shorten the policy's validity, never lengthen it. Raises
    `InputError` for a `now` without a time zone, or a comparison made at another confidence.
    """
    if now.tzinfo is None:
        raise InputError(f"now = {now.isoformat()} has no time zone.")
    if comparison.confidence != policy.confidence:
        raise InputError(f"The comparison has confidence {comparison.confidence}, the policy {policy.confidence}.")
    checks = tuple(_judge(check, comparison, policy) for check in policy.checks)
    gating = [result for result in checks if not result.advisory]
    verdict: Verdict = "inconclusive"
    if any(result.verdict == "fail" for result in gating):
        verdict = "fail"
    elif gating and all(result.verdict == "pass" for result in gating):
        verdict = "pass"
    created = now.astimezone(UTC).replace(microsecond=0)
    expires = created + timedelta(hours=min(policy.valid_days * 24, longest_valid_hours))
    return Decision(
        verdict,
        _summary(verdict, gating, comparison.total),
        checks,
        comparison.total,
        subjects,
        policy,
        created.isoformat(),
        expires.replace(microsecond=0).isoformat(),
    )


def _judge(check: AnyCheck, comparison: Comparison, policy: Policy) -> CheckResult:
    found = comparison.metric(check.metric)
    demoted = comparison.demoted.get(check.metric, "")
    advisory = check.advisory or bool(demoted)
    title = found.metric.title if found else check.metric
    obstacle = _obstacle(found, policy)
    bare = CheckResult(check, "", advisory, "inconclusive", f"{title}: {obstacle}.", found, demoted)
    if obstacle or found is None or found.gain is None or found.mean_gain is None or found.adjusted_p is None:
        return bare
    shown = f"{title} {wording.difference(found)}"
    significant = found.adjusted_p <= policy.alpha
    if check.rule == "superiority":
        verdict, why = _superior(check, found, found.gain.low, found.gain.high, found.mean_gain, significant)
    elif check.rule == "non_inferiority":
        verdict, why = _not_inferior(check, found.metric, found.gain.low, found.gain.high, significant)
    else:
        return bare
    return replace(bare, verdict=verdict, reason=f"{shown}: {why}.")


def _obstacle(found: MetricComparison | None, policy: Policy) -> str:
    """Why the evidence cannot count at all; empty when it can."""
    if found is None or found.total == 0:
        return "there is nothing to compare, the suite gave 0 items"
    lacking = found.total - found.n
    if lacking > policy.error_budget * found.total:
        return (
            f"{lacking} of {found.total} items ({lacking / found.total:.1%}) lack a score "
            f"({wording.counts(found.missing)}), and the error budget is {policy.error_budget:.1%}"
        )
    if found.n < policy.minimum_n:
        return f"{found.n} items have scores on both sides, and the policy needs {policy.minimum_n}"
    gain = found.gain
    numbers = (found.mean_gain, gain.low if gain else None, gain.high if gain else None, found.adjusted_p)
    if any(number is None or not math.isfinite(number) for number in numbers):
        return "the comparison gave no finite interval"
    return ""


def _superior(
    check: Superiority, found: MetricComparison, low: float, high: float, mean: float, significant: bool
) -> tuple[Verdict, str]:
    if low > 0 and significant and mean >= check.minimum_effect:
        return "pass", "better than the champion" + (
            f", and by at least {check.minimum_effect:g}" if check.minimum_effect else ""
        )
    if high <= 0:
        return "fail", "not better than the champion"
    if high < check.minimum_effect:
        return "fail", f"not better by {check.minimum_effect:g}, which the interval excludes"
    if low > 0 and significant:
        return "inconclusive", f"better, but the measured gain is below the {check.minimum_effect:g} asked for"
    if low > 0:
        return "inconclusive", "better on its own, but not after correction for several checks"
    more = f"; {found.needed_n} items would show {check.minimum_effect:g}" if found.needed_n else ""
    return "inconclusive", f"a gain is neither shown nor excluded{more}"


def _not_inferior(
    check: NonInferiority, metric: Metric, low: float, high: float, significant: bool
) -> tuple[Verdict, str]:
    tolerated = float(check.margin)
    margin = f"{tolerated:g}{' ' + metric.unit if metric.unit else ''}"
    loss = f"{'a drop' if metric.higher_is_better else 'an increase'} of {margin}"
    if low > -tolerated and significant:
        return "pass", f"{loss} is excluded"
    if high < -tolerated:
        return "fail", f"worse than the champion by more than {margin}"
    if low > -tolerated:
        return "inconclusive", f"{loss} is excluded on its own, but not after correction for several checks"
    return "inconclusive", f"{loss} is not excluded"


def _summary(verdict: Verdict, gating: list[CheckResult], total: int) -> str:
    """One sentence that a reader understands who never saw a gate before."""
    items = f"on {total} held-out questions"
    if verdict == "pass":
        better = [_scored(result) for result in gating if result.check.rule == "superiority"]
        kept = [result.title for result in gating if result.check.rule == "non_inferiority"]
        claims = ([f"better in {wording.joined(better)}"] if better else []) + (
            [f"not worse in {wording.joined(kept)}"] if kept else []
        )
        return f"The candidate may replace the champion: {items} its answers are {' and '.join(claims)}."
    if verdict == "fail":
        failed = [
            f"{'not better' if result.check.rule == 'superiority' else 'worse'} in {_scored(result)}"
            for result in gating
            if result.verdict == "fail"
        ]
        return f"The candidate must not replace the champion: {items} its answers are {wording.joined(failed)}."
    open_checks = [result.reason.rstrip(".") for result in gating if result.verdict == "inconclusive"]
    return f"The evidence does not decide, so the champion stays. {'. '.join(open_checks)}."


def _scored(result: CheckResult) -> str:
    found = result.evidence
    if found is None:
        return result.title
    new, old = (wording.value(v, found.metric) for v in (found.candidate, found.champion))
    return f"{result.title} ({new} against {old})"


def _rounded(number: float | None) -> float | None:
    """Six decimals: more is noise of the bootstrap. What is not finite has no place in canonical JSON."""
    return None if number is None or not math.isfinite(number) else round(number, 6)
