"""The report as one self-contained HTML page: no script, no font or image from elsewhere, every text escaped."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING

from sluice.evaluation import wording
from sluice.evaluation.comparison import Comparison, MetricComparison
from sluice.evaluation.figures import interval_svg
from sluice.evaluation.gate import CheckResult, Decision
from sluice.infra.page_style import Drawing, page_style

if TYPE_CHECKING:
    from sluice.evaluation.report import Example, ReportContext

_MARKS = {"pass": "✓", "fail": "✕", "inconclusive": "?"}


def report_page(
    decision: Decision,
    comparison: Comparison,
    examples: Sequence[Example],
    context: ReportContext,
    paired: Drawing | None,
    training: Drawing | None,
) -> str:
    """The page's HTML."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((files("sluice.evaluation") / "report.html.j2").read_text(encoding="utf-8"))
    results = {(result.check.metric, result.slice): result for result in decision.checks}
    return template.render(
        style=Markup(page_style()),
        decision=decision,
        subjects=[(name, digest) for name, digest in decision.subjects.digests().items()],
        comparison=comparison,
        context=context,
        mark=_MARKS[decision.verdict],
        marks=_MARKS,
        rows=[_row(one, results.get((one.metric.name, one.slice))) for one in comparison.metrics],
        better=[example for example in examples if example.gain > 0],
        worse=[example for example in examples if example.gain < 0],
        outcomes=_outcomes(comparison),
        # Both are our own drawings of numbers.
        paired=Markup(paired.svg) if paired else None,
        training=Markup(training.svg) if training else None,
    )


def _row(one: MetricComparison, result: CheckResult | None) -> dict[str, object]:
    from markupsafe import Markup

    metric = one.metric
    verdict = result.verdict if result else "shown"
    smallest = one.minimum_detectable_effect
    return {
        "title": metric.title,
        "description": metric.description,
        "champion": wording.value(one.champion, metric),
        "candidate": wording.value(one.candidate, metric),
        "difference": wording.difference(one),
        "picture": Markup(interval_svg(one, result.check if result else None, verdict)),
        "need": wording.need(result.check, metric) if result else "",
        "advisory": bool(result and result.advisory),
        "verdict": verdict,
        "n": one.n,
        "missing": wording.counts(one.missing),
        "detectable": "" if smallest is None else wording.value(smallest, metric),
    }


def _outcomes(comparison: Comparison) -> list[tuple[str, int, int]]:
    old, new = comparison.champion_outcomes, comparison.candidate_outcomes
    names = sorted({*old, *new}, key=lambda name: (-new.get(name, 0), name))
    return [(name, old.get(name, 0), new.get(name, 0)) for name in names]
