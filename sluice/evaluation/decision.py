"""A gate's decision as a value, and as the document that is signed and kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from sluice.evaluation import wording
from sluice.evaluation.comparison import MetricComparison
from sluice.evaluation.policy import AnyCheck, Policy
from sluice.evaluation.scores import Metric
from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json, require_digest
from sluice.statistics.paired import Interval

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
        document: dict[str, Json] = {
            "metric": self.check.metric,
            "slice": self.slice,
            "rule": self.check.rule,
            "advisory": self.advisory,
            "demoted": self.demoted,
            "need": wording.need(self.check, found.metric if found else None),
            "verdict": self.verdict,
            "reason": self.reason,
            "n": found.n if found else 0,
            "total": found.total if found else 0,
            "missing": dict(sorted(found.missing.items())) if found else {},
            "interval": _pair(found.low, found.high) if found else [None, None],
            "worst": _pair(found.worst_low, found.worst_high) if found else [None, None],
            "candidate_interval": _pair(found.candidate_low, found.candidate_high) if found else [None, None],
            "room": _pair(found.room.low, found.room.high) if found and found.room else [None, None],
            "p_adjusted": rounded(found.adjusted_p) if found else None,
            "measured": _metric_json(found.metric) if found else None,
        }
        for name in _NUMBERS:
            document[name] = rounded(getattr(found, name)) if found else None
        for name in _PLAIN:
            document[name] = getattr(found, name) if found else None
        return document


@dataclass(frozen=True)
class Decision:
    """The gate's decision. Times are ISO 8601 in UTC. `report` is the digest of the report artifact, once it exists:
    the report shows the decision, so the decision is sealed with `with_report` after the report is stored.
    `second_approver_because`: the changes that two people have to approve, in words; empty when one person may."""

    verdict: Verdict
    summary: str
    checks: tuple[CheckResult, ...]
    total: int
    subjects: Subjects
    policy: Policy
    created: str
    expires: str
    report: str | None = None
    second_approver_because: tuple[str, ...] = ()

    @property
    def reasons(self) -> tuple[str, ...]:
        """One sentence for each gating check, those that stand in the way first; then the advisory ones."""
        order = {"fail": 0, "inconclusive": 1, "pass": 2}
        ranked = sorted(self.checks, key=lambda result: (result.advisory, order[result.verdict]))
        return tuple(result.reason for result in ranked)

    @property
    def approvers(self) -> int:
        """How many different people have to approve."""
        return 2 if self.second_approver_because else 1

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
            "approvers": self.approvers,
            "second_approver_because": list(self.second_approver_because),
        }


_NUMBERS = ("champion", "candidate", "difference", "p", "minimum_detectable_effect")
_PLAIN = ("needed_n", "always_valid", "judge", "obstacle")


def read_decision(document: Mapping[str, Any]) -> Decision:
    """The decision that `Decision.to_json` wrote; its comparisons have no pairs. Raises `InputError` for another."""
    try:
        if document["version"] != DECISION_VERSION:
            raise ValueError(f"version {document['version']!r} is not {DECISION_VERSION}")
        policy = Policy.model_validate(document["policy"])
        subjects = Subjects(**{one.name: document[one.name] for one in fields(Subjects)})
        return Decision(
            document["verdict"],
            document["summary"],
            tuple(_read_check(row, policy) for row in document["checks"]),
            document["items"],
            subjects,
            policy,
            document["created"],
            document["expires"],
            document["report"],
            tuple(document["second_approver_because"]),
        )
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise InputError(f"This is no decision of a gate: {type(error).__name__} {error}.") from error


def _read_check(row: Mapping[str, Any], policy: Policy) -> CheckResult:
    names = (row["slice"], row["slice"].partition("=")[0])  # a check of its own comes before that of the dimension
    check = next(one for name in names for one in policy.checks if (one.metric, one.slice) == (row["metric"], name))
    evidence = None
    if row["measured"] is not None:
        bounds = row["measured"]["bounds"]
        evidence = MetricComparison(
            Metric(**{**row["measured"], "bounds": tuple(bounds) if bounds else None}),
            row["slice"],
            row["n"],
            row["total"],
            row["missing"],
            **dict(zip(("low", "high"), row["interval"], strict=True)),
            **dict(zip(("worst_low", "worst_high"), row["worst"], strict=True)),
            **dict(zip(("candidate_low", "candidate_high"), row["candidate_interval"], strict=True)),
            room=None if None in row["room"] else Interval(*row["room"]),
            adjusted_p=row["p_adjusted"],
            **{name: row[name] for name in (*_NUMBERS, *_PLAIN)},
        )
    return CheckResult(check, row["slice"], row["advisory"], row["verdict"], row["reason"], evidence, row["demoted"])


def _metric_json(metric: Metric) -> Json:
    return {**asdict(metric), "bounds": list(metric.bounds) if metric.bounds else None}


def rounded(number: float | None) -> float | None:
    """Six decimals: more is noise of the bootstrap. What is not finite has no place in canonical JSON."""
    return None if number is None or not math.isfinite(number) else round(number, 6)


def _pair(low: float | None, high: float | None) -> Json:
    return [rounded(low), rounded(high)]
