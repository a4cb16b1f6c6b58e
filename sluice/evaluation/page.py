"""The report as one self-contained HTML page: no font or image from elsewhere, every text escaped.

MLflow shows it in a sandboxed frame, in which links to a part of the page do nothing by themselves: one small script
scrolls there, and the page's policy runs no other. The first screen says what was decided and why; the rest is
evidence, in the order in which a reviewer asks for it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from sluice.evaluation import wording
from sluice.evaluation.calibration import MetricCalibration
from sluice.evaluation.comparison import Comparison, MetricComparison
from sluice.evaluation.decision import CheckResult, Decision
from sluice.evaluation.evidence import Evidence
from sluice.evaluation.examples import Example
from sluice.evaluation.forest import ForestRow, axis_svg, forest_row, reach_of, row_svg
from sluice.evaluation.markdown import FEW
from sluice.evaluation.safety_metrics import SAFETY_METRICS
from sluice.infra.page_style import Drawing, page_style

MARKS = {"pass": "✓", "fail": "✕", "inconclusive": "?", "shown": "·"}
GROUPS = {
    "answers": "Answers",
    "judged": "Judged",
    "benchmark": "Benchmarks",
    "safety": "Safety",
    "speed": "Speed and cost",
}


_SCROLL = """document.addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#"]');
  if (link) {
    event.preventDefault();
    document.getElementById(link.getAttribute("href").slice(1))?.scrollIntoView();
  }
});"""


def script_source(script: str) -> str:
    """What a Content-Security-Policy names an inline script by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def report_page(
    decision: Decision,
    comparison: Comparison,
    examples: Sequence[Example],
    evidence: Evidence,
    drawings: Mapping[str, Drawing],
) -> str:
    """The page's HTML. `drawings` are our own, of numbers, by name."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    folder = files("sluice.evaluation")
    template = environment.from_string((folder / "report.html.j2").read_text(encoding="utf-8"))
    style = page_style() + (folder / "report.css").read_text(encoding="utf-8")
    gating = [result for result in decision.checks if not result.advisory]
    return template.render(
        style=Markup(style),
        script=Markup(_SCROLL),
        allowed=Markup(script_source(_SCROLL)),
        decision=decision,
        comparison=comparison,
        evidence=evidence,
        marks=MARKS,
        facts=_facts(decision, comparison, evidence, gating),
        gating=gating,
        advisory=[result for result in decision.checks if result.advisory],
        groups=_groups(decision, comparison),
        heat=_heat(comparison),
        few=FEW,
        better=[example for example in examples if example.gain > 0],
        worse=[example for example in examples if example.gain < 0],
        titles={one.metric.name: one.metric for one in comparison.metrics},
        value=wording.value,
        missing=[_missing_row(one) for one in comparison.metrics if one.missing and not one.slice],
        outcomes=_outcomes(comparison),
        speed=_speed(comparison),
        sequential=evidence.stopping is not None and bool(evidence.stopping.batch),
        findings=_findings(evidence),
        number=_number,
        judged=_judged(comparison, evidence),
        policy=_policy(decision),
        subjects=list(decision.subjects.digests().items()),
        drawings=defaultdict(str, {name: Markup(drawing.svg) for name, drawing in drawings.items()}),
    )


def _facts(
    decision: Decision, comparison: Comparison, evidence: Evidence, gating: Sequence[CheckResult]
) -> list[tuple[str, str, str, str]]:
    """The first screen's tiles: figure, what it is, a remark, the section it is about."""
    passed = sum(result.verdict == "pass" for result in gating)
    facts = [(f"{passed} of {len(gating)}", "gating checks pass", _open(gating), "differences")]
    early = evidence.stopped_early
    if early is not None:
        facts.append((f"{early.asked}", f"of {early.total} items asked", f"{early.saved:.0%} saved", "sequential"))
    else:
        facts.append((f"{comparison.total}", "items, the same for both", "", "missing"))
    judged = [one.metric.name for one in comparison.metrics if one.metric.group == "judged" and not one.slice]
    if judged:
        may = sum(name not in comparison.demoted for name in judged)
        remark = "agrees with people" if may == len(judged) else "the others: advisory" if may else "advisory"
        facts.append((f"{may} of {len(judged)}", "judged metrics may gate", remark, "judge"))
    if evidence.candidate_findings is not None:
        mine, before = len(evidence.candidate_findings), len(evidence.champion_findings or ())
        facts.append((f"{mine}", f"safety finding{'' if mine == 1 else 's'}", f"champion: {before}", "safety"))
    for name in ("speed.cost_per_1000", "speed.latency_s"):
        found = comparison.metric(name)
        if found is not None and found.candidate is not None:
            new, old = (wording.value(v, found.metric) for v in (found.candidate, found.champion))
            facts.append(
                (f"{new} {found.metric.unit}".strip(), found.metric.title.lower(), f"champion: {old}", "speed")
            )
            break
    return facts


def _open(gating: Sequence[CheckResult]) -> str:
    counts = {verdict: sum(result.verdict == verdict for result in gating) for verdict in ("fail", "inconclusive")}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def _groups(decision: Decision, comparison: Comparison) -> list[dict[str, Any]]:
    """The forest: metrics by group, their slices below them, one scale a group."""
    from markupsafe import Markup

    results = {(result.check.metric, result.slice): result for result in decision.checks}
    groups = []
    for group, title in GROUPS.items():
        rows = [
            forest_row(one, results.get((one.metric.name, one.slice)))
            for one in comparison.metrics
            if one.metric.group == group
        ]
        if rows:
            reach = reach_of(rows)
            shown = [_row(row, reach) for row in rows]
            groups.append({"title": title, "axis": Markup(axis_svg(reach)), "rows": shown})
    return groups


def _row(row: ForestRow, reach: float) -> dict[str, Any]:
    from markupsafe import Markup

    one, result, metric = row.one, row.result, row.one.metric
    smallest = one.minimum_detectable_effect
    limit = result is not None and result.check.rule == "limit"
    return {
        "title": one.slice or metric.title,
        "slice": bool(one.slice),
        "unit": metric.unit,
        "description": "" if one.slice else metric.description,
        "less": not metric.higher_is_better and not one.slice,
        "n": one.n,
        "champion": wording.value(one.champion, metric),
        "candidate": wording.value(one.candidate, metric),
        "difference": wording.difference(one),
        "own": wording.own(one) if limit else "",
        "always_valid": one.always_valid,
        "picture": Markup(row_svg(row, reach)),
        "need": wording.need(result.check, metric) if result else "",
        "advisory": bool(result and result.advisory),
        "demoted": result.demoted if result else "",
        "verdict": row.verdict,
        "detectable": "" if smallest is None else wording.value(smallest, metric),
    }


def _heat(comparison: Comparison) -> dict[str, Any] | None:
    """Rows: metrics; columns: values of the slices; each cell with difference, n, a mark and how it is shaded:
    strongly when its interval excludes no change, lightly when the difference is a quarter of the interval's width
    (about one standard error)."""
    if not comparison.slices:
        return None
    columns = list(dict.fromkeys(one.slice for one in comparison.slices))
    dimensions: dict[str, list[str]] = {}
    for column in columns:
        name, _, given = column.partition("=")
        dimensions.setdefault(name, []).append(given)
    order = list(dict.fromkeys(one.metric.name for one in comparison.metrics))
    rows: dict[str, dict[str, Any]] = {}
    for one in sorted(comparison.slices, key=lambda one: order.index(one.metric.name)):
        row = rows.setdefault(one.metric.name, {"title": one.metric.title, "cells": dict.fromkeys(columns)})
        row["cells"][one.slice] = _cell(one)
    return {"dimensions": list(dimensions.items()), "columns": columns, "rows": list(rows.values())}


def _cell(one: MetricComparison) -> dict[str, Any]:
    level, gain, mean = 0, one.gain, one.mean_gain
    if gain is not None and mean is not None and one.n >= FEW:
        level = 2 if gain.low > 0 or gain.high < 0 else int(abs(mean) > (gain.high - gain.low) / 4)
    way = "up" if (mean or 0.0) > 0 else "down"
    return {
        "text": wording.change(one.difference, one.metric),
        "interval": wording.difference(one),
        "n": one.n,
        "few": one.n < FEW,
        "mark": {"up": "▲", "down": "▼"}[way] if level else "",
        "shade": f"{way}{level}" if level else "",
    }


def _missing_row(one: MetricComparison) -> dict[str, str]:
    metric = one.metric
    low, high = wording.change(one.worst_low, metric), wording.change(one.worst_high, metric)
    return {
        "title": metric.title,
        "count": f"{one.total - one.n} of {one.total}",
        "share": f"{(one.total - one.n) / one.total:.1%}" if one.total else "–",
        "causes": wording.counts(one.missing),
        "difference": wording.difference(one),
        "bounds": "–" if one.worst_low is None or one.worst_high is None else f"{low} to {high}",
    }


def _outcomes(comparison: Comparison) -> list[tuple[str, int, int]]:
    old, new = comparison.champion_outcomes, comparison.candidate_outcomes
    names = sorted({*old, *new}, key=lambda name: (-new.get(name, 0), name))
    return [(name, old.get(name, 0), new.get(name, 0)) for name in names]


def _speed(comparison: Comparison) -> list[dict[str, str]]:
    import numpy as np

    rows = []
    for one in comparison.metrics:
        if one.metric.group != "speed" or one.slice:
            continue
        metric = one.metric
        tail = 95 if not metric.higher_is_better else 5
        sides = {"champion": [old for _, old, _ in one.pairs], "candidate": [new for _, _, new in one.pairs]}
        cells = {}
        for side, found in sides.items():
            middle, far = np.percentile(found, [50, tail]).tolist() if found else (None, None)
            cells[side] = f"{wording.value(middle, metric)} · {wording.value(far, metric)}"
        rows.append(
            {
                "title": metric.title,
                "unit": metric.unit,
                "difference": wording.difference(one),
                "tail": f"p{tail}",
                **cells,
            }
        )
    return rows


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _findings(evidence: Evidence) -> list[dict[str, str]] | None:
    if evidence.candidate_findings is None:
        return None
    titles = {metric.name.removeprefix("safety."): metric.title for metric in SAFETY_METRICS}
    sides = (("candidate", evidence.candidate_findings), ("champion", evidence.champion_findings or ()))
    return [
        {
            "kind": titles.get(one.kind, one.kind),
            "release": side,
            "item": one.item,
            "detail": one.detail,
            "excerpt": one.excerpt,
        }
        for side, found in sides
        for one in found
    ]


def _judged(comparison: Comparison, evidence: Evidence) -> list[dict[str, Any]]:
    """Each judged metric: what its calibration found, and why it may not gate."""
    known = {one.metric: one for one in evidence.calibration.metrics} if evidence.calibration else {}
    rows = []
    for one in comparison.metrics:
        if one.metric.group == "judged" and not one.slice:
            found = known.get(one.metric.name)
            demoted = comparison.demoted.get(one.metric.name, "")
            table = _confusion(found) if found and found.valid else None
            rows.append({"title": one.metric.title, "found": found, "demoted": demoted, "confusion": table})
    return rows


def _confusion(one: MetricCalibration) -> list[tuple[str, list[dict[str, Any]]]]:
    """People's label and, by the judge's, count and shade."""
    counts = Counter((score.label, score.predicted) for score in one.scores if score.predicted is not None)
    most = max(counts.values(), default=1)
    return [
        (
            "yes" if label else "no",
            [
                {
                    "count": counts[label, said],
                    "shade": round(counts[label, said] / most * 0.35, 2),
                    "same": label == said,
                }
                for said in (0, 1)
            ],
        )
        for label in (0, 1)
    ]


def _policy(decision: Decision) -> str:
    """The policy as it was, every default written out, as YAML."""
    import yaml

    content = json.loads(decision.policy.model_dump_json())
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
