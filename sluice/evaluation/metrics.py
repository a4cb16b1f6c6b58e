"""Metrics of answers against references, per item. Each names its source; none needs a judge.

A value is a finite number, or there is none and a cause. An empty answer has a value (it is wrong); an item that the
serving path lost has none (nobody knows what the model would have said).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from sluice.evaluation.outcomes import Answer
from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Metric:
    """One metric: its kind (`binary` values are 0 or 1) decides the statistics, `higher_is_better` the direction."""

    name: str
    title: str
    kind: Literal["mean", "binary"]
    higher_is_better: bool
    unit: str
    decimals: int
    description: str
    function: Callable[[Answer, str], float]


def words(text: str) -> list[str]:
    """Lower-case word tokens (Unicode letters, digits, underscore)."""
    return _WORD.findall(text.lower())


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the two bags of words, 0 to 1.

    Source: SQuAD's `f1_score` (Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1). SQuAD also drops the English
    articles; here they stay, since references are not English only. Two empty texts agree (1), as in SQuAD 2.0.
    """
    left, right = Counter(words(answer)), Counter(words(reference))
    if not left or not right:
        return float(left == right)
    return 2 * (left & right).total() / (left.total() + right.total())


def exact_match(answer: str, reference: str) -> float:
    """1 when the word tokens are the same in the same order, else 0 (Rajpurkar et al. 2016, section 6.1)."""
    return float(words(answer) == words(reference))


def rouge_l(answer: str, reference: str) -> float:
    """F-measure (beta = 1) of the longest common subsequence of words, 0 to 1.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.1, without stemming.
    """
    left, right = words(answer), words(reference)
    if not left or not right:
        return float(left == right)
    row = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for column, other in enumerate(right, start=1):
            above = row[column]
            row[column] = diagonal + 1 if word == other else max(above, row[column - 1])
            diagonal = above
    return 2 * row[-1] / (len(left) + len(right))


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            Metric(
                "token_f1", "Token F1", "mean", True, "", 3,
                "overlap of the answer's words with the reference's (SQuAD F1)",
                lambda answer, reference: token_f1(answer.answer, reference),
            ),
            Metric(
                "exact_match", "Exact match", "binary", True, "", 3,
                "share of answers with the reference's words in its order",
                lambda answer, reference: exact_match(answer.answer, reference),
            ),
            Metric(
                "rouge_l", "ROUGE-L", "mean", True, "", 3,
                "longest common subsequence of words with the reference",
                lambda answer, reference: rouge_l(answer.answer, reference),
            ),
            Metric(
                "answer_rate", "Answer rate", "binary", True, "", 3,
                "share of items with an answer that is not empty, refused or cut off",
                lambda answer, _: float(answer.outcome == "answered"),
            ),
            Metric(
                "answer_words", "Answer length", "mean", False, "words", 1,
                "words of the answer; less is better",
                lambda answer, _: float(len(words(answer.answer))),
            ),
        )
    }
)  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """Scores of one release on the items, in item order.

    `values[metric][i]` belongs to `items[i]`; None means no value, and `causes[metric][item_id]` says why.
    `outcomes[item_id]` is the answer's outcome, or `missing`.
    """

    items: tuple[str, ...]
    values: Mapping[str, tuple[float | None, ...]]
    causes: Mapping[str, Mapping[str, str]]
    outcomes: Mapping[str, str]

    def to_json(self) -> Json:
        return {
            "items": list(self.items),
            "values": {metric: list(values) for metric, values in self.values.items()},
            "causes": {metric: dict(causes) for metric, causes in self.causes.items()},
            "outcomes": dict(self.outcomes),
        }


def score(answers: Iterable[Answer], references: Mapping[str, str], metrics: Sequence[str]) -> Scores:
    """Score each referenced item. An item without an answer has no value, cause `missing`.

    Raises `InputError` for an unknown metric, two answers to one item, or an answer to an item nobody asked.
    """
    for name in metrics:
        if name not in METRICS:
            raise InputError(f"The metric {name!r} is unknown.", hint=f"There are {', '.join(METRICS)}.")
    by_item: dict[str, Answer] = {}
    for answer in answers:
        if answer.item_id in by_item:
            raise InputError(f"Item {answer.item_id!r} has two answers.")
        if answer.item_id not in references:
            raise InputError(f"Item {answer.item_id!r} has an answer but no reference.", hint="Are they of one suite?")
        by_item[answer.item_id] = answer
    items = tuple(sorted(references))
    values: dict[str, tuple[float | None, ...]] = {}
    causes: dict[str, dict[str, str]] = {}
    for name in metrics:
        causes[name] = {}
        column: list[float | None] = []
        for item_id in items:
            found = _value(METRICS[name], by_item.get(item_id), references[item_id])
            if isinstance(found, str):
                causes[name][item_id] = found
                column.append(None)
            else:
                column.append(found)
        values[name] = tuple(column)
    outcomes = {item: str(by_item[item].outcome) if item in by_item else "missing" for item in items}
    return Scores(items, values, causes, outcomes)


def _value(metric: Metric, answer: Answer | None, reference: str) -> float | str:
    """The metric's value, or the cause why there is none."""
    if answer is None:
        return "missing"
    if answer.error is not None:
        return answer.error.split(":", 1)[0]
    value = metric.function(answer, reference)
    return value if math.isfinite(value) else "not a finite number"
