"""The metrics that RAGAS computes with a judge (`judged.`) and the retrieval and text metrics that need none."""

from __future__ import annotations

from sluice.evaluation.scores import Metric

_RAGAS = "RAGAS 0.4 (Es et al. 2023, arXiv:2309.15217)"

JUDGED_METRICS: tuple[Metric, ...] = (
    Metric(
        "judged.faithfulness", "Faithfulness", "mean", True, "", 3,
        "share of the answer's claims that the retrieved passages support", "judged", (0.0, 1.0), _RAGAS,
    ),
    Metric(
        "judged.answer_relevancy", "Answer relevancy", "mean", True, "", 3,
        "likeness of the question to questions that the answer would answer", "judged", (0.0, 1.0), _RAGAS,
    ),
    Metric(
        "judged.context_precision", "Context precision", "mean", True, "", 3,
        "whether the passages that matter are ranked first", "judged", (0.0, 1.0), _RAGAS,
    ),
    Metric(
        "judged.context_recall", "Context recall", "mean", True, "", 3,
        "share of the reference that the passages support", "judged", (0.0, 1.0), _RAGAS,
    ),
    Metric(
        "judged.factual_correctness", "Factual correctness", "mean", True, "", 3,
        "agreement of the answer's claims with the reference's (F1)", "judged", (0.0, 1.0), _RAGAS,
    ),
)  # fmt: skip
