"""The report people read: a summary for the model-version page, a page of its own, and the numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sluice.evaluation.comparison import Comparison, MetricComparison
from sluice.evaluation.figures import TrainingPoint, paired_drawing, training_drawing
from sluice.evaluation.gate import Decision
from sluice.evaluation.markdown import summary_markdown
from sluice.evaluation.outcomes import Answer
from sluice.evaluation.page import report_page
from sluice.provenance.canonical import Json

__all__ = ["Example", "ReportContext", "TrainingPoint", "pick_examples", "write_report"]


@dataclass(frozen=True)
class Example:
    """One item, both answers side by side. `gain` is in the main metric, more is better."""

    item_id: str
    question: str
    reference: str
    champion_answer: str
    candidate_answer: str
    champion_score: float
    candidate_score: float
    gain: float


@dataclass(frozen=True)
class ReportContext:
    """What the report says besides scores. `candidate` and `champion` are names for people; `dataset` the data card's
    few lines (name to value); `training` the curve, empty when nobody measured one; `approve` how to approve, in
    Markdown of the caller's own."""

    application: str
    suite: str
    candidate: str
    champion: str
    dataset: Mapping[str, str | int | float] = field(default_factory=dict)
    training: Sequence[TrainingPoint] = ()
    approve: str = ""


def pick_examples(
    decision: Decision,
    comparison: Comparison,
    *,
    questions: Mapping[str, str],
    references: Mapping[str, str],
    champion: Iterable[Answer],
    candidate: Iterable[Answer],
    each: int = 5,
) -> list[Example]:
    """The items that gained most and those that lost most, at most `each` of both; ties by item id."""
    found = comparison.metric(decision.policy.main_metric)
    if found is None:
        return []
    before = {answer.item_id: answer.answer for answer in champion}
    after = {answer.item_id: answer.answer for answer in candidate}
    ranked = sorted(zip(found.gains, found.pairs, strict=True), key=lambda row: (-row[0], row[1][0]))
    better = [row for row in ranked if row[0] > 0][:each]
    worse = [row for row in reversed(ranked) if row[0] < 0][:each]
    return [
        Example(item, questions.get(item, item), references.get(item, ""), before[item], after[item], old, new, gain)
        for gain, (item, old, new) in [*better, *worse]
    ]


def write_report(
    folder: Path, decision: Decision, comparison: Comparison, examples: Sequence[Example], context: ReportContext
) -> None:
    """Write report.md, report.html, report.json and the figures as PNG into `folder`. Same inputs, same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    main = comparison.metric(decision.policy.main_metric)
    paired = paired_drawing(main) if main is not None and main.pairs else None
    training = training_drawing(context.training) if context.training else None
    for name, drawing in (("paired.png", paired), ("training.png", training)):
        if drawing is not None:
            (folder / name).write_bytes(drawing.png)
    (folder / "report.md").write_text(summary_markdown(decision, comparison, examples, context), encoding="utf-8")
    page = report_page(decision, comparison, examples, context, paired, training)
    (folder / "report.html").write_text(page, encoding="utf-8")
    document = {
        "context": {
            **asdict(context),
            "dataset": dict(context.dataset),
            "training": [asdict(p) for p in context.training],
        },
        # The report is part of what the sealed decision rests on, so here the decision names no report yet.
        "decision": {**decision.to_json(), "report": None},
        "metrics": [_metric_json(one) for one in comparison.metrics],
        "outcomes": {
            "champion": dict(sorted(comparison.champion_outcomes.items())),
            "candidate": dict(sorted(comparison.candidate_outcomes.items())),
        },
        "examples": [asdict(example) for example in examples],
    }
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")


def _metric_json(one: MetricComparison) -> Json:
    metric = one.metric
    return {
        "metric": metric.name,
        "slice": one.slice,
        "title": metric.title,
        "description": metric.description,
        "higher_is_better": metric.higher_is_better,
        "n": one.n,
        "total": one.total,
        "missing": dict(sorted(one.missing.items())),
        "champion": one.champion,
        "candidate": one.candidate,
        "difference": one.difference,
        "interval": [one.low, one.high],
        "p_adjusted": one.adjusted_p,
        "minimum_detectable_effect": one.minimum_detectable_effect,
        "items": [{"id": item, "champion": old, "candidate": new} for item, old, new in one.pairs],
    }
