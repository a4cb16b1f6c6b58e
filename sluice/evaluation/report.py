"""The report people read: a summary for the model-version page, a page of its own, a table of items, and the numbers.

report.md     summary for MLflow's model-version page
report.html   everything, inline in MLflow's artifact viewer
items.html    one row an item, to filter and sort; items.json the same as a table of MLflow
report.json   the numbers; *.png the figures
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sluice.evaluation.comparison import Comparison, MetricComparison
from sluice.evaluation.decision import Decision
from sluice.evaluation.evidence import Evidence
from sluice.evaluation.examples import Example, pick_examples
from sluice.evaluation.figures import (
    agreement_drawing,
    paired_drawing,
    sequential_drawing,
    spread_drawing,
    training_drawing,
)
from sluice.evaluation.forest import forest_drawing, forest_row
from sluice.evaluation.items_table import items_page, items_table
from sluice.evaluation.markdown import summary_markdown
from sluice.evaluation.page import GROUPS, report_page
from sluice.infra.page_style import Drawing
from sluice.provenance.canonical import Json


def write_report(folder: Path, decision: Decision, comparison: Comparison, evidence: Evidence) -> None:
    """Write the files named above into `folder`. Same inputs, same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    examples = pick_examples(decision, comparison, evidence)
    drawings = _drawings(decision, comparison, evidence)
    for name, drawing in drawings.items():
        (folder / f"{name}.png").write_bytes(drawing.png)
    document = _document(decision, comparison, examples, evidence)
    texts = {
        "report.md": summary_markdown(decision, comparison, evidence),
        "report.html": report_page(decision, comparison, examples, evidence, drawings),
        "report.json": json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }
    if evidence.items:
        texts["items.html"] = items_page(decision, comparison, evidence)
        texts["items.json"] = items_table(comparison, evidence)
    for name, text in texts.items():
        # A model's answer may hold half a character (a lone surrogate), which UTF-8 cannot.
        (folder / name).write_text(text, encoding="utf-8", errors="replace")


def _drawings(decision: Decision, comparison: Comparison, evidence: Evidence) -> dict[str, Drawing]:
    main = comparison.metric(decision.policy.main_metric)
    rows = [forest_row(result.evidence, result) for result in decision.checks if result.evidence is not None]
    others = sorted(
        (one for one in comparison.metrics if one is not main), key=lambda one: [*GROUPS].index(one.metric.group)
    )
    drawings = {
        "forest": forest_drawing(rows, comparison.confidence),
        "paired": paired_drawing(main) if main is not None and main.pairs else None,
        "spread": spread_drawing(others),
        "training": training_drawing(evidence.training) if evidence.training else None,
    }
    if evidence.stopping is not None:
        gating = [result.evidence for result in decision.checks if result.evidence and not result.advisory]
        drawings["sequential"] = sequential_drawing(evidence.stopping, gating)
    if evidence.calibration is not None:
        known = {one.metric.name: one.metric.title for one in comparison.metrics}
        metrics = [
            (known.get(one.metric, one.metric), one, one.metric not in comparison.demoted)
            for one in evidence.calibration.metrics
        ]
        drawings["judge"] = agreement_drawing(metrics, decision.policy.judge.kappa)
    return {name: drawing for name, drawing in drawings.items() if drawing is not None}


def _document(decision: Decision, comparison: Comparison, examples: Sequence[Example], evidence: Evidence) -> Json:
    return {
        "application": evidence.application,
        "suite": evidence.suite,
        "candidate": evidence.candidate,
        "champion": evidence.champion,
        "dataset": dict(evidence.dataset),
        "training": [asdict(point) for point in evidence.training],
        "changes": None if evidence.changes is None else list(evidence.changes),
        "stopping": evidence.stopping.to_json() if evidence.stopping else None,
        "demoted": dict(sorted(comparison.demoted.items())),
        "calibration": evidence.calibration.to_json() if evidence.calibration else None,
        "findings": {
            side: None if found is None else [asdict(finding) for finding in found]
            for side, found in (("candidate", evidence.candidate_findings), ("champion", evidence.champion_findings))
        },
        # The report is part of what the sealed decision rests on, so here the decision names no report yet.
        "decision": {**decision.to_json(), "report": None},
        "metrics": [_metric_json(one) for one in comparison.metrics],
        "slices": [_metric_json(one) for one in comparison.slices],
        "outcomes": {
            "champion": dict(sorted(comparison.champion_outcomes.items())),
            "candidate": dict(sorted(comparison.candidate_outcomes.items())),
        },
        "examples": [asdict(example) for example in examples],
    }


def _metric_json(one: MetricComparison) -> Json:
    metric = one.metric
    return {
        "metric": metric.name,
        "slice": one.slice,
        "title": metric.title,
        "group": metric.group,
        "description": metric.description,
        "higher_is_better": metric.higher_is_better,
        "n": one.n,
        "total": one.total,
        "missing": dict(sorted(one.missing.items())),
        "champion": one.champion,
        "candidate": one.candidate,
        "difference": one.difference,
        "interval": [one.low, one.high],
        "always_valid": one.always_valid,
        "worst_case": [one.worst_low, one.worst_high],
        "p_adjusted": one.adjusted_p,
        "minimum_detectable_effect": one.minimum_detectable_effect,
        "items": [] if one.slice else [{"id": item, "champion": old, "candidate": new} for item, old, new in one.pairs],
    }
