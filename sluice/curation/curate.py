"""From harvested records to examples one can defend: an ordered list of steps, each with counts and reasons.

Nothing disappears silently: a step gets candidates and gives back each of them once, kept or dropped for a reason in
words. The result depends on the records, the holdout and the policy alone, not on the order of the records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sluice.curation.candidate import Candidate, Verdicts
from sluice.curation.evidence import is_negative
from sluice.curation.holdout import HoldoutItem
from sluice.curation.policy import CurationPolicy
from sluice.curation.records import Message, TraceRecord
from sluice.curation.steps import curation_steps
from sluice.infra.progress import Report, no_report


@dataclass(frozen=True)
class StepCounts:
    """A step's account: `before` = `after` + the sum over `reasons`."""

    name: str
    before: int
    after: int
    reasons: Mapping[str, int]


@dataclass(frozen=True)
class Example:
    """One line of a dataset: the prompt verbatim as it was sent, and the answer to learn."""

    trace_id: str
    messages: tuple[Message, ...]
    rule: str
    user: str
    session: str
    question: str
    score_ids: tuple[str, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Curation:
    """Examples ordered by trace id, the account of each step, and the traces with a negative last word."""

    examples: tuple[Example, ...]
    steps: tuple[StepCounts, ...]
    dropped: Mapping[str, str]
    negatives: tuple[str, ...]
    policy: CurationPolicy
    records: int

    @property
    def by_rule(self) -> dict[str, int]:
        """How many examples by which evidence."""
        return dict(sorted(Counter(example.rule for example in self.examples).items()))

    @property
    def by_reason(self) -> dict[str, int]:
        """How many records were dropped for which reason, in the order of the steps."""
        totals: dict[str, int] = {}
        for step in self.steps:
            for reason, count in step.reasons.items():
                totals[reason] = totals.get(reason, 0) + count
        return totals


def curate(
    records: Iterable[TraceRecord],
    holdout: Sequence[HoldoutItem],
    policy: CurationPolicy = CurationPolicy(),
    *,
    existing: Collection[str] | None = None,
    report: Report = no_report,
) -> Curation:
    """Run every step over the records. `existing` are the trace ids that the store still has (None: not asked)."""
    once = {record.id: record for record in records}
    ordered = sorted(once.values(), key=lambda record: (record.started_ms, record.id))
    candidates = tuple(Candidate(record) for record in ordered)
    accounts: list[StepCounts] = []
    dropped: dict[str, str] = {}
    steps = curation_steps(holdout, policy, existing)
    for number, step in enumerate(steps, start=1):
        verdicts = step.decide(candidates)
        _require_complete(step.name, candidates, verdicts)
        reasons = Counter(verdicts.dropped.values())
        accounts.append(StepCounts(step.name, len(candidates), len(verdicts.kept), dict(sorted(reasons.items()))))
        dropped.update(verdicts.dropped)
        candidates = verdicts.kept
        report(number, len(steps), f"{step.name}: {accounts[-1].before} to {accounts[-1].after}")
    examples = tuple(sorted((_example(candidate) for candidate in candidates), key=lambda e: e.trace_id))
    negatives = tuple(sorted(record.id for record in ordered if is_negative(record)))
    return Curation(examples, tuple(accounts), dropped, negatives, policy, len(ordered))


def _example(candidate: Candidate) -> Example:
    record = candidate.record
    return Example(
        trace_id=record.id,
        messages=(*record.messages, Message("assistant", candidate.label)),
        rule=candidate.rule,
        user=record.user,
        session=record.session,
        question=record.question,
        score_ids=candidate.score_ids,
    )


def _require_complete(name: str, candidates: Sequence[Candidate], verdicts: Verdicts) -> None:
    """A step that loses or invents a record is a defect of ours, and must not make a dataset."""
    told = [candidate.record.id for candidate in verdicts.kept] + list(verdicts.dropped)
    if sorted(told) != sorted(candidate.record.id for candidate in candidates):
        raise AssertionError(f"The curation step {name!r} did not account for each record exactly once.")
