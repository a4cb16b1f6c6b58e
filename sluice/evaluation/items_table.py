"""Every item of an evaluation as a table that filters and sorts: a page of its own, and MLflow's form of a table.

MLflow shows both inline. Its own table pages and sorts, and filters nothing; so the page brings a small script (the
frame it is shown in allows scripts, and nothing else). Questions and answers are untrusted: they travel as data, the
script writes them as text only, and the page's policy runs no script but this one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from sluice.evaluation.comparison import Comparison
from sluice.evaluation.decision import Decision
from sluice.evaluation.evidence import Evidence
from sluice.evaluation.examples import scores_of_item
from sluice.evaluation.items import Item
from sluice.evaluation.page import script_source
from sluice.evaluation.scores import Metric
from sluice.infra.page_style import page_style
from sluice.provenance.canonical import Json

LONGEST = 2_000
"""Characters of a text that the table holds; the evaluation's artifact has it whole."""


def items_page(decision: Decision, comparison: Comparison, evidence: Evidence) -> str:
    """The table as one self-contained page."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    folder = files("sluice.evaluation")
    script = (folder / "items.js").read_text(encoding="utf-8")
    metrics = _metrics(comparison)
    data = {
        "metrics": [[one.name, one.title, one.decimals, one.higher_is_better] for one in metrics],
        "main": decision.policy.main_metric,
        "rows": [_row(item, evidence, metrics) for item in evidence.items],
    }
    # Inside a script element only `<` could end it.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return environment.from_string((folder / "items.html.j2").read_text(encoding="utf-8")).render(
        style=Markup(page_style() + (folder / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        allowed=Markup(script_source(script)),
        data=Markup(text),
        evidence=evidence,
        verdict=decision.verdict,
        longest=LONGEST,
    )


def items_table(comparison: Comparison, evidence: Evidence) -> str:
    """The same as a table of MLflow: columns and rows, one row an item."""
    metrics = _metrics(comparison)
    dimensions = sorted({name for item in evidence.items for name in item.slices})
    columns = ["item", *dimensions, "question", "champion answer", "candidate answer", "champion", "candidate"]
    for metric in metrics:
        columns += [f"{metric.name} champion", f"{metric.name} candidate", f"{metric.name} gain"]
    rows = []
    for item in evidence.items:
        row = _row(item, evidence, metrics)
        cells: list[Json] = [item.id, *(item.slices.get(name, "") for name in dimensions)]
        cells += [row["q"], *row["a"], *row["o"]]
        for (old, new), metric in zip(row["m"], metrics, strict=True):
            sign = 1 if metric.higher_is_better else -1
            cells += [old, new, None if old is None or new is None else round(sign * (new - old), 6)]
        rows.append([*cells, "; ".join(row["c"])])
    return json.dumps({"columns": [*columns, "without a score"], "data": rows}, ensure_ascii=False, allow_nan=False)


def _metrics(comparison: Comparison) -> list[Metric]:
    """Those that were measured on items: benchmarks, probes and load have items of their own."""
    return [one.metric for one in comparison.metrics if not one.slice and one.metric.group in ("answers", "judged")]


def _row(item: Item, evidence: Evidence, metrics: Sequence[Metric]) -> dict[str, Any]:
    """One item: question, reference, slices, answers and outcomes (champion's first), values of each metric, causes."""
    old, new = evidence.champion_by_item.get(item.id), evidence.candidate_by_item.get(item.id)
    scores = scores_of_item(evidence, item.id)
    values = [[None if v is None else round(v, 6) for v in scores.get(one.name, (None, None))] for one in metrics]
    sides = (("champion", evidence.champion_scores), ("candidate", evidence.candidate_scores))
    causes = [
        f"{side} {one.name}: {cause}"
        for one in metrics
        for side, given in sides
        if one.name in given.columns and (cause := given.columns[one.name].causes.get(item.id))
    ]
    return {
        "id": item.id,
        "q": item.question[:LONGEST],
        "r": item.reference[:LONGEST],
        "s": dict(item.slices),
        "a": [(side.answer if side else "")[:LONGEST] for side in (old, new)],
        "o": [side.outcome if side else "not asked" for side in (old, new)],
        "m": values,
        "c": causes,
    }
