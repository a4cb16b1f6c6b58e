"""The metrics that RAGAS computes with a judge (`judged.`): what each reads of a sample, and what it means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from sluice.evaluation.scores import Metric

_RAGAS = "RAGAS 0.4 (Es et al. 2023, arXiv:2309.15217)"

Field = Literal["question", "answer", "contexts", "reference"]

NO_ANSWER = "no answer to judge"


@dataclass(frozen=True)
class JudgedMetric:
    """One metric. `reads` are the fields of a sample that its score depends on, and nothing else; `ragas` the class in
    `ragas.metrics.collections`; `requests` how many it sends for so many contexts at temperature 0.

    `without_answer` is the score of an answer that says nothing (empty, or refused): 0 where saying nothing is as bad
    as it gets; None where there is nothing to measure (no claims: neither faithful nor unfaithful).
    """

    metric: Metric
    ragas: str
    reads: tuple[Field, ...]
    requests: Callable[[int], int]
    without_answer: float | None = 0.0
    embeds: bool = False


_DEFINED = (
    JudgedMetric(
        Metric(
            "judged.faithfulness", "Faithfulness", "mean", True, "", 3,
            "share of the answer's claims that the retrieved passages support", "judged", (0.0, 1.0), _RAGAS,
        ),
        "Faithfulness", ("question", "answer", "contexts"), lambda _: 2, without_answer=None,
    ),
    JudgedMetric(
        Metric(
            "judged.answer_relevancy", "Answer relevancy", "mean", True, "", 3,
            "likeness of the question to questions that the answer would answer", "judged", (0.0, 1.0), _RAGAS,
        ),
        "AnswerRelevancy", ("question", "answer"), lambda _: 1, embeds=True,
    ),
    JudgedMetric(
        Metric(
            "judged.context_precision", "Context precision", "mean", True, "", 3,
            "whether the passages that matter are ranked first", "judged", (0.0, 1.0), _RAGAS,
        ),
        "ContextPrecision", ("question", "contexts", "reference"), lambda contexts: contexts,
    ),
    JudgedMetric(
        Metric(
            "judged.context_recall", "Context recall", "mean", True, "", 3,
            "share of the reference that the passages support", "judged", (0.0, 1.0), _RAGAS,
        ),
        "ContextRecall", ("question", "contexts", "reference"), lambda _: 1,
    ),
    JudgedMetric(
        Metric(
            "judged.factual_correctness", "Factual correctness", "mean", True, "", 3,
            "agreement of the answer's claims with the reference's (F1)", "judged", (0.0, 1.0), _RAGAS,
        ),
        "FactualCorrectness", ("answer", "reference"), lambda _: 4,
    ),
)  # fmt: skip

JUDGED: Mapping[str, JudgedMetric] = {one.metric.name: one for one in _DEFINED}
JUDGED_METRICS: tuple[Metric, ...] = tuple(one.metric for one in _DEFINED)
