"""Metrics of answers against references, per item. Each names its source; none needs a judge.

A value is a finite number, or there is none and a cause. An empty answer has a value (it is wrong); an item that the
serving path lost has none (nobody knows what the model would have said).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sluice.evaluation.items import Item
from sluice.evaluation.json_answers import json_schema, json_valid
from sluice.evaluation.judged_scores import Embedder
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


def bleu(answer: str, reference: str) -> float:
    """Sentence BLEU with exponential smoothing, 0 to 1, by sacrebleu.

    Source: Papineni et al. 2002; smoothing of Chen and Cherry 2014 (method 3). RAGAS's BLEU is not used: of a text of
    several sentences it compares the first ones only.
    """
    from sacrebleu import sentence_bleu

    return _bounded(sentence_bleu(answer, [reference]).score / 100)


def chrf(answer: str, reference: str) -> float:
    """Similarity of two strings by their n-grams of characters, 0 to 1: chrF2 (Popovic 2015), by sacrebleu."""
    from sacrebleu import sentence_chrf

    return _bounded(sentence_chrf(answer, [reference]).score / 100)


def _bounded(value: float) -> float:
    return min(max(float(value), 0.0), 1.0)  # a perfect match is 1.0000000000000004 there


def _everything(item: Item) -> bool:
    return True


def _has_reference(item: Item) -> bool:
    """An item with a schema or tools may be told right or wrong by those alone."""
    return bool(item.reference) or not (_has_schema(item) or _has_tools(item))


def _has_schema(item: Item) -> bool:
    return item.json_schema is not None


def _has_tools(item: Item) -> bool:
    return bool(item.tools or item.expected_calls)


@dataclass(frozen=True)
class _Definition:
    """A metric, its value for an answer, and the items that it applies to."""

    metric: Metric
    value: Callable[[Answer, Item], float]
    applies: Callable[[Item], bool] = _everything


_SQUAD = "Rajpurkar et al. 2016 (arXiv:1606.05250)"
_BLEU = "Papineni et al. 2002 (ACL), by sacrebleu"
_BFCL = "after the Berkeley Function-Calling Leaderboard (Patil et al. 2025)"

_DEFINED = (
    _Definition(
        Metric(
            "token_f1", "Token F1", "mean", True, "", 3,
            "overlap of the answer's words with the reference's (SQuAD F1)", source=_SQUAD,
        ),
        lambda answer, item: token_f1(answer.answer, item.reference),
        _has_reference,
    ),
    _Definition(
        Metric(
            "exact_match", "Exact match", "binary", True, "", 3,
            "share of answers with the reference's words in its order", source=_SQUAD,
        ),
        lambda answer, item: exact_match(answer.answer, item.reference),
        _has_reference,
    ),
    _Definition(
        Metric(
            "rouge_l", "ROUGE-L", "mean", True, "", 3, "longest common subsequence of words with the reference",
            source="Lin 2004",
        ),
        lambda answer, item: rouge_l(answer.answer, item.reference),
        _has_reference,
    ),
    _Definition(
        Metric("bleu", "BLEU", "mean", True, "", 3, "n-grams of words in common with the reference", source=_BLEU),
        lambda answer, item: bleu(answer.answer, item.reference),
        _has_reference,
    ),
    _Definition(
        Metric(
            "string_similarity", "String similarity", "mean", True, "", 3,
            "n-grams of characters in common with the reference (chrF2)", source="Popovic 2015 (WMT), by sacrebleu",
        ),
        lambda answer, item: chrf(answer.answer, item.reference),
        _has_reference,
    ),
    _Definition(
        Metric(
            "json_valid", "Valid JSON", "binary", True, "", 3,
            "share of answers that are JSON, of the items with a schema", source="RFC 8259",
        ),
        lambda answer, _: json_valid(answer.answer),
        _has_schema,
    ),
    _Definition(
        Metric(
            "json_schema", "JSON of the schema", "binary", True, "", 3,
            "share of answers that satisfy the item's JSON schema", source="JSON Schema 2020-12",
        ),
        lambda answer, item: json_schema(answer.answer, item.json_schema),
        _has_schema,
    ),
    _Definition(
        Metric(
            "tool_call", "Right tool calls", "binary", True, "", 3,
            "share of answers with exactly the expected calls and arguments", source=_BFCL,
        ),
        lambda answer, item: tool_call(calls_of(answer), item.expected_calls),
        _has_tools,
    ),
    _Definition(
        Metric(
            "tool_call_name", "Right tools", "binary", True, "", 3,
            "share of answers that call the expected tools, whatever the arguments", source=_BFCL,
        ),
        lambda answer, item: tool_call_name(calls_of(answer), item.expected_calls),
        _has_tools,
    ),
    _Definition(
        Metric(
            "answer_rate", "Answer rate", "binary", True, "", 3,
            "share of items with an answer that is not empty, refused, cut off or \"I do not know\"",
        ),
        lambda answer, _: float(answer.outcome == "answered"),
    ),
    _Definition(
        Metric("refusal_rate", "Refusals", "binary", False, "", 3, "share of items that the model declines to answer"),
        lambda answer, _: float(answer.outcome == "refused"),
    ),
    _Definition(
        Metric(
            "no_answer_rate", "No answer", "binary", False, "", 3,
            "share of items where the model says that it does not know, or that its context does not tell",
        ),
        lambda answer, _: float(answer.outcome == "no_answer"),
    ),
    _Definition(
        Metric(
            "answer_words", "Answer length", "mean", False, "words", 1, "words of the answer; less is better",
            bounds=None,
        ),
        lambda answer, _: float(len(words(answer.answer))),
    ),
)  # fmt: skip

_SEMANTIC = Metric(
    "semantic_similarity", "Semantic similarity", "mean", True, "", 3,
    "likeness of answer and reference as texts: cosine of their embeddings, 0 when below",
    source="Reimers and Gurevych 2019 (arXiv:1908.10084)",
)  # fmt: skip

ANSWER_METRICS: tuple[Metric, ...] = (*(one.metric for one in _DEFINED), _SEMANTIC)
_BY_NAME = {one.metric.name: one for one in _DEFINED}


def score_answers(
    answers: Iterable[Answer],
    items: Sequence[Item],
    metrics: Iterable[str],
    *,
    sequential: bool = False,
    embed: Embedder | None = None,
) -> Scores:
    """Score each item with those of `metrics` that answers have; names of other groups are left to others.

    `embed` is the embedding model that `semantic_similarity` needs.

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
    names = list(metrics)
    columns = [_column(_BY_NAME[name], by_item, known, sequential) for name in names if name in _BY_NAME]
    if _SEMANTIC.name in names:
        if embed is None:
            raise InputError(f"Metric {_SEMANTIC.name} needs an embedding model, and there is none here.")
        columns.append(_column(_semantic(by_item, known, embed), by_item, known, sequential))
    outcomes = {item: str(by_item[item].outcome) if item in by_item else "missing" for item in sorted(known)}
    return scores_of(columns, outcomes)


def _semantic(answers: Mapping[str, Answer], items: Mapping[str, Item], embed: Embedder) -> _Definition:
    """The definition of semantic similarity over these answers: all texts are embedded in one call."""
    texts = sorted({text for name, one in answers.items() for text in (one.answer, items[name].reference)})
    vectors = dict(zip(texts, embed.embed(texts), strict=True))

    def value(answer: Answer, item: Item) -> float:
        if not answer.answer.strip():
            return 0.0
        return _bounded(vectors[answer.answer] @ vectors[item.reference])

    return _Definition(_SEMANTIC, value, _has_reference)


def _column(defined: _Definition, answers: Mapping[str, Answer], items: Mapping[str, Item], sequential: bool) -> Column:
    found: dict[str, float | str] = {}
    for name, item in items.items():
        if not defined.applies(item):
            continue
        answer = answers.get(name)
        if answer is None:
            found[name] = "missing"
        elif answer.error is not None:
            found[name] = answer.error.split(":", 1)[0]
        else:
            found[name] = defined.value(answer, item)
    return column(defined.metric, found, sequential=sequential)
