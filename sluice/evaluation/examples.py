"""The items that tell most: those that gained most and those that lost most, both answers side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sluice.evaluation.comparison import Comparison
from sluice.evaluation.decision import Decision
from sluice.evaluation.evidence import Evidence

EACH = 10
LONGEST_CONTEXT = 4_000
"""Characters of one passage that the page shows."""


@dataclass(frozen=True)
class Example:
    """One item, both answers side by side. `gain` is in the main metric, more is better; `scores` has every metric of
    the item, champion's and candidate's value (None: it has none)."""

    item: str
    question: str
    reference: str
    contexts: tuple[str, ...]
    slices: Mapping[str, str]
    champion_answer: str
    candidate_answer: str
    champion_outcome: str
    candidate_outcome: str
    gain: float
    scores: Mapping[str, tuple[float | None, float | None]]


def pick_examples(decision: Decision, comparison: Comparison, evidence: Evidence, each: int = EACH) -> list[Example]:
    """The items that gained most in the main metric and those that lost most, at most `each` of both; ties by id."""
    found = comparison.metric(decision.policy.main_metric)
    if found is None:
        return []
    items = {item.id: item for item in evidence.items}
    gains = [(gain, item) for gain, (item, _, _) in zip(found.gains, found.pairs, strict=True) if item in items]
    ranked = sorted(gains, key=lambda row: (-row[0], row[1]))
    better = [row for row in ranked if row[0] > 0][:each]
    worse = [row for row in reversed(ranked) if row[0] < 0][:each]
    examples = []
    for gain, name in [*better, *worse]:
        item, old, new = items[name], evidence.champion_by_item.get(name), evidence.candidate_by_item.get(name)
        examples.append(
            Example(
                name,
                item.question,
                item.reference,
                tuple(context[:LONGEST_CONTEXT] for context in item.contexts),
                item.slices,
                old.answer if old else "",
                new.answer if new else "",
                old.outcome if old else "",
                new.outcome if new else "",
                gain,
                scores_of_item(evidence, name),
            )
        )
    return examples


def scores_of_item(evidence: Evidence, item: str) -> dict[str, tuple[float | None, float | None]]:
    """Every metric that was measured on this item: champion's and candidate's value."""
    old, new = evidence.champion_scores.columns, evidence.candidate_scores.columns
    found = {}
    for name in dict.fromkeys([*old, *new]):
        pair = tuple(side[name].values.get(item) if name in side else None for side in (old, new))
        if any(value is not None for value in pair):
            found[name] = (pair[0], pair[1])
    return found
