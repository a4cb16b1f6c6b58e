"""The retrieval gate: may this index take over? Labelled queries, the current index on the same queries, intervals.

Two rules, for recall@k and for the mean reciprocal rank alike: the candidate's lower bound reaches the policy's floor,
and its paired difference to the current index is not worse than `-margin` (non-inferiority). An interval that covers
the limit is inconclusive, and inconclusive is not a pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from sluice.infra.errors import InputError
from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import Json
from sluice.rag.queries import LabelledQuery
from sluice.rag.retrieve import DEPTH, Retriever

Verdict = Literal["pass", "fail", "inconclusive"]
_BATCH = 128


@dataclass(frozen=True)
class GatePolicy:
    """`k`: passages that a prompt gets. Floors and margin are differences of rates in [0, 1]."""

    k: int = 2
    recall_floor: float = 0.5
    reciprocal_rank_floor: float = 0.4
    margin: float = 0.02
    confidence: float = 0.95
    min_queries: int = 100

    def __post_init__(self) -> None:
        for name, good in (
            ("k", 1 <= self.k <= DEPTH),
            ("recall_floor", 0 < self.recall_floor < 1),
            ("reciprocal_rank_floor", 0 < self.reciprocal_rank_floor < 1),
            ("margin", 0 < self.margin < 1),
            ("confidence", 0.5 < self.confidence < 1),
            ("min_queries", self.min_queries >= 1),
        ):
            if not good:
                raise InputError(f"Retrieval gate policy: {name} = {getattr(self, name)!r} is out of range.")


@dataclass(frozen=True)
class Measurement:
    """One index on the labelled queries: `ranks[i]` is the 1-based rank of the first right chunk, None past 20."""

    index_digest: str
    ranks: tuple[int | None, ...]

    def recall(self, k: int) -> float:
        """Share of queries with a right chunk among the first `k`; NaN without queries."""
        return sum(self.hits(k)) / len(self.ranks) if self.ranks else math.nan

    @property
    def mean_reciprocal_rank(self) -> float:
        """Mean of 1/rank, 0 for what was not found; NaN without queries."""
        return sum(self.reciprocal_ranks()) / len(self.ranks) if self.ranks else math.nan

    def hits(self, k: int) -> list[float]:
        return [1.0 if rank is not None and rank <= k else 0.0 for rank in self.ranks]

    def reciprocal_ranks(self) -> list[float]:
        return [1.0 / rank if rank is not None else 0.0 for rank in self.ranks]


@dataclass(frozen=True)
class Check:
    """One rule's outcome: the estimate, its interval and the limit it was held against."""

    name: str
    estimate: float
    low: float
    high: float
    limit: float
    verdict: Verdict

    @property
    def reason(self) -> str:
        return (
            f"{self.name}: {self.estimate:.3f}, interval {self.low:.3f} to {self.high:.3f}, "
            f"limit {self.limit:.3f}: {self.verdict}"
        )


@dataclass(frozen=True)
class GateResult:
    """The decision about one index, with everything it rests on."""

    verdict: Verdict
    reasons: tuple[str, ...]
    candidate: str
    current: str | None
    checks: tuple[Check, ...]
    metrics: dict[str, float]
    current_metrics: dict[str, float] | None
    queries: int
    policy: GatePolicy

    def to_json(self) -> Json:
        """For the decision artifact. Holds no NaN: a metric that could not be measured is absent."""
        return asdict(self) | {"reasons": list(self.reasons), "checks": [asdict(check) for check in self.checks]}

    @classmethod
    def from_json(cls, value: Json) -> GateResult:
        """The inverse of `to_json`. Raises `KeyError` or `TypeError` on foreign content."""
        return cls(
            **{
                **value,
                "reasons": tuple(value["reasons"]),
                "checks": tuple(Check(**check) for check in value["checks"]),
                "policy": GatePolicy(**value["policy"]),
            }
        )


def measure(retriever: Retriever, queries: Sequence[LabelledQuery], report: Report = no_report) -> Measurement:
    """Ask every query. Raises `UnavailableError`: a query that was not answered is no miss but no measurement."""
    ranks: list[int | None] = []
    digests: set[str] = set()
    for start in range(0, len(queries), _BATCH):
        batch = queries[start : start + _BATCH]
        answers = retriever.retrieve_many([query.question for query in batch], DEPTH)
        for query, answer in zip(batch, answers, strict=True):
            digests.add(answer.index_digest)
            found = (n for n, passage in enumerate(answer.passages, 1) if passage.id in query.chunk_ids)
            ranks.append(next(found, None))
        report(len(ranks), len(queries), f"asked {len(ranks)} of {len(queries)} labelled queries")
    if len(digests) != 1:
        raise InputError(
            f"The queries were answered by {len(digests)} indexes.",
            hint="Measure a collection by its own name; there must be at least one query.",
        )
    return Measurement(digests.pop(), tuple(ranks))


def judge(candidate: Measurement, current: Measurement | None, policy: GatePolicy | None = None) -> GateResult:
    """Decide about `candidate` against `current` (None: there is no index yet, so only the floors count)."""
    chosen = policy or GatePolicy()
    if current is not None and len(current.ranks) != len(candidate.ranks):
        raise InputError(
            f"The indexes were asked {len(candidate.ranks)} and {len(current.ranks)} queries.",
            hint="Ask both the same ones.",
        )
    measures: list[tuple[str, float, Callable[[Measurement], list[float]]]] = [
        (f"recall@{chosen.k}", chosen.recall_floor, lambda m: m.hits(chosen.k)),
        ("mean reciprocal rank", chosen.reciprocal_rank_floor, lambda m: m.reciprocal_ranks()),
    ]
    checks = []
    if len(candidate.ranks) >= max(chosen.min_queries, 1):
        for name, floor, values in measures:
            checks.append(_check(f"{name}, floor", values(candidate), 0.0, floor, chosen))
            if current is not None and current.index_digest != candidate.index_digest:
                pairs = zip(values(candidate), values(current), strict=True)
                checks.append(_check(f"{name}, change", [a - b for a, b in pairs], -1.0, -chosen.margin, chosen))
    reasons = [check.reason for check in checks]
    verdicts = {check.verdict for check in checks}
    verdict: Verdict
    if not checks:
        verdict = "inconclusive"
        reasons.append(f"{len(candidate.ranks)} labelled queries are fewer than the {chosen.min_queries} required")
    elif "fail" in verdicts:
        verdict = "fail"
    else:
        verdict = "pass" if verdicts == {"pass"} else "inconclusive"
    if current is None:
        reasons.append("there is no current index to compare with")
    return GateResult(
        verdict,
        tuple(reasons),
        candidate.index_digest,
        current.index_digest if current else None,
        tuple(checks),
        _metrics(candidate),
        _metrics(current) if current else None,
        len(candidate.ranks),
        chosen,
    )


def _metrics(measured: Measurement) -> dict[str, float]:
    if not measured.ranks:
        return {}
    recalls = {f"recall@{k}": round(measured.recall(k), 6) for k in (1, 2, 3, 5, 10)}
    return recalls | {"mrr": round(measured.mean_reciprocal_rank, 6)}


def _check(name: str, values: list[float], lowest: float, limit: float, policy: GatePolicy) -> Check:
    """`values` are within [lowest, 1]."""
    import numpy as np

    from sluice.statistics.bounded import bounded_mean

    found = np.asarray(values, dtype=np.float64)
    interval = bounded_mean(found, lowest, 1.0, confidence=policy.confidence).interval
    verdict: Verdict = "inconclusive"
    if interval.low >= limit:
        verdict = "pass"
    elif interval.high < limit:
        verdict = "fail"
    return Check(name, float(found.mean()), interval.low, interval.high, limit, verdict)
