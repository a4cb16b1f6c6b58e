"""Metrics of answers against references, per item. Each names its source; none needs a judge.

A value is a finite number, or there is none and a cause. An empty answer has a value (it is wrong); an item that the
serving path lost has none (nobody knows what the model would have said).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from sluice.evaluation.items import Item
from sluice.evaluation.json_answers import json_schema, json_valid
from sluice.evaluation.outcomes import Answer
from sluice.evaluation.scores import Column, Metric, Scores, column, scores_of
from sluice.evaluation.tool_calls import calls_of, tool_call, tool_call_name
from sluice.infra.errors import InputError

_WORD = re.compile(r"\w+")


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
        for place, other in enumerate(right, start=1):
            above = row[place]
            row[place] = diagonal + 1 if word == other else max(above, row[place - 1])
            diagonal = above
    return 2 * row[-1] / (len(left) + len(right))


def _to_reference(measure: Callable[[str, str], float]) -> Callable[[Answer, Item], float | None]:
    """`measure` for items with a reference: one with a schema or tools may be told right or wrong by those alone."""

    def value(answer: Answer, item: Item) -> float | None:
        told_otherwise = item.json_schema is not None or item.tools or item.expected_calls
        return None if told_otherwise and not item.reference else measure(answer.answer, item.reference)

    return value


_SQUAD = "Rajpurkar et al. 2016 (arXiv:1606.05250)"
_BFCL = "after the Berkeley Function-Calling Leaderboard (Patil et al. 2025)"

_DEFINED: tuple[tuple[Metric, Callable[[Answer, Item], float | None]], ...] = (
    (
        Metric(
            "token_f1", "Token F1", "mean", True, "", 3,
            "overlap of the answer's words with the reference's (SQuAD F1)", source=_SQUAD,
        ),
        _to_reference(token_f1),
    ),
    (
        Metric(
            "exact_match", "Exact match", "binary", True, "", 3,
            "share of answers with the reference's words in its order", source=_SQUAD,
        ),
        _to_reference(exact_match),
    ),
    (
        Metric(
            "rouge_l", "ROUGE-L", "mean", True, "", 3, "longest common subsequence of words with the reference",
            source="Lin 2004",
        ),
        _to_reference(rouge_l),
    ),
    (
        Metric(
            "json_valid", "Valid JSON", "binary", True, "", 3,
            "share of answers that are JSON, of the items with a schema", source="RFC 8259",
        ),
        lambda answer, item: json_valid(answer.answer, item.json_schema),
    ),
    (
        Metric(
            "json_schema", "JSON of the schema", "binary", True, "", 3,
            "share of answers that satisfy the item's JSON schema", source="JSON Schema 2020-12",
        ),
        lambda answer, item: json_schema(answer.answer, item.json_schema),
    ),
    (
        Metric(
            "tool_call", "Right tool calls", "binary", True, "", 3,
            "share of answers with exactly the expected calls and arguments", source=_BFCL,
        ),
        lambda answer, item: tool_call(calls_of(answer), item.expected_calls, item.tools),
    ),
    (
        Metric(
            "tool_call_name", "Right tools", "binary", True, "", 3,
            "share of answers that call the expected tools, whatever the arguments", source=_BFCL,
        ),
        lambda answer, item: tool_call_name(calls_of(answer), item.expected_calls, item.tools),
    ),
    (
        Metric(
            "answer_rate", "Answer rate", "binary", True, "", 3,
            "share of items with an answer that is not empty, refused, cut off or \"I do not know\"",
        ),
        lambda answer, _: float(answer.outcome == "answered"),
    ),
    (
        Metric("refusal_rate", "Refusals", "binary", False, "", 3, "share of items that the model declines to answer"),
        lambda answer, _: float(answer.outcome == "refused"),
    ),
    (
        Metric(
            "no_answer_rate", "No answer", "binary", False, "", 3,
            "share of items where the model says that it does not know, or that its context does not tell",
        ),
        lambda answer, _: float(answer.outcome == "no_answer"),
    ),
    (
        Metric(
            "answer_words", "Answer length", "mean", False, "words", 1, "words of the answer; less is better",
            bounds=None,
        ),
        lambda answer, _: float(len(words(answer.answer))),
    ),
)  # fmt: skip

ANSWER_METRICS: tuple[Metric, ...] = tuple(metric for metric, _ in _DEFINED)
_FUNCTIONS = {metric.name: (metric, function) for metric, function in _DEFINED}


def score_answers(
    answers: Iterable[Answer], items: Sequence[Item], metrics: Iterable[str], *, sequential: bool = False
) -> Scores:
    """Score each item with those of `metrics` that answers have; names of other groups are left to others.

    An item without an answer has the cause `missing`; an item that a metric does not apply to is not in its column.
    Raises `InputError` for two answers to one item, or an answer to an item nobody asked.
    """
    known = {item.id: item for item in items}
    by_item: dict[str, Answer] = {}
    for answer in answers:
        if answer.item_id in by_item:
            raise InputError(f"Item {answer.item_id!r} has two answers.")
        if answer.item_id not in known:
            raise InputError(f"Item {answer.item_id!r} has an answer but was not asked.", hint="Are they of one suite?")
        by_item[answer.item_id] = answer
    chosen = [_FUNCTIONS[name] for name in metrics if name in _FUNCTIONS]
    columns = [_column(metric, function, by_item, known, sequential) for metric, function in chosen]
    outcomes = {item: str(by_item[item].outcome) if item in by_item else "missing" for item in sorted(known)}
    return scores_of(columns, outcomes)


def _column(
    metric: Metric,
    function: Callable[[Answer, Item], float | None],
    answers: Mapping[str, Answer],
    items: Mapping[str, Item],
    sequential: bool,
) -> Column:
    found: dict[str, float | str] = {}
    for name, item in items.items():
        answer = answers.get(name)
        if answer is None:
            found[name] = "missing"
        elif answer.error is not None:
            found[name] = answer.error.split(":", 1)[0]
        elif (value := function(answer, item)) is not None:
            found[name] = value
    return column(metric, found, sequential=sequential)
