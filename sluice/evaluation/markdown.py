"""The summary on MLflow's model-version page: what a reviewer needs for a yes or no, most important first.

MLflow keeps at most 5,000 characters of a version's description, and the page around the summary needs a third of them
(how to approve, links, the approval itself): whole lines give way from the end. Names come from files and other people,
so whatever could be markup is escaped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sluice.evaluation import wording
from sluice.evaluation.comparison import Comparison, MetricComparison
from sluice.evaluation.decision import CheckResult, Decision
from sluice.evaluation.evidence import Evidence
from sluice.evaluation.safety_metrics import SAFETY_METRICS
from sluice.infra.markdown import plain
from sluice.provenance.canonical import short

LONGEST = 3_100
ROWS = 12
"""Checks in the table; the report has them all."""

FEW = 5
"""Pairs below which a slice's mean is hardly more than one item's luck."""

_NAME = 30
_ORDER = {"fail": 0, "inconclusive": 1, "pass": 2}


def summary_markdown(decision: Decision, comparison: Comparison, evidence: Evidence) -> str:
    """The summary, its first line the verdict."""
    ranked = sorted(decision.checks, key=lambda one: (one.advisory, _ORDER[one.verdict], bool(one.slice)))
    blocks = [f"**Gate: {decision.verdict.upper()}.** {plain(decision.summary, 500)}", _table(ranked, comparison)]
    lines = [
        *_slices(decision, comparison),
        *_safety(comparison, evidence),
        *_judge(comparison, evidence),
        *_saving(evidence),
        *_speed(comparison),
        *_missing(decision, comparison),
        *_changes(evidence),
        *_data(evidence),
        _subjects(decision, comparison, evidence),
    ]
    kept = list(lines)
    while kept and len("\n\n".join([*blocks, "\n".join(kept)])) > LONGEST:
        kept.pop()
    return "\n\n".join([*blocks, "\n".join(kept)]) + "\n"


def _table(ranked: Sequence[CheckResult], comparison: Comparison) -> str:
    rows = [f"| Metric | candidate | champion | difference [{comparison.confidence:.0%} interval] | verdict |"]
    rows.append("|:--|--:|--:|:--|:--|")
    for result in ranked[:ROWS]:
        found = result.evidence
        name = result.title if len(result.title) <= _NAME else f"{result.title[: _NAME - 1].rstrip()}…"
        new, old = (wording.value(v, found.metric) if found else "–" for v in _sides(found))
        change = "–" if found is None else wording.difference(found)
        if found is not None and result.check.rule == "limit":
            change = f"itself {wording.own(found)}"
        verdict = f"({result.verdict})" if result.advisory else result.verdict
        rows.append(f"| {plain(name)} | {new} | {old} | {change} | {verdict} |")
    notes = []
    if any(result.advisory for result in ranked[:ROWS]):
        notes.append("In brackets: advisory, shown and never gating.")
    if len(ranked) > ROWS:
        notes.append(f"{len(ranked) - ROWS} more checks are in the report.")
    return "\n".join(rows) + (f"\n\n{' '.join(notes)}" if notes else "")


def _sides(found: MetricComparison | None) -> tuple[float | None, float | None]:
    return (found.candidate, found.champion) if found else (None, None)


def _slices(decision: Decision, comparison: Comparison) -> list[str]:
    """Where the candidate loses most, in the metrics that gate."""
    if not comparison.slices:
        return []
    names = dict.fromkeys(result.check.metric for result in decision.checks if not result.advisory)
    losing = [
        one
        for name in names
        for one in comparison.worst_slices(name)
        if one.n >= FEW and one.mean_gain is not None and one.mean_gain < 0
    ]
    if not losing:
        return [f"- **Slices:** none of {len({one.slice for one in comparison.slices})} loses in a metric that gates."]
    # In widths of the metric's own interval over all items, as metrics have units of their own.
    worst = sorted(losing, key=lambda one: ((one.mean_gain or 0.0) / _width(comparison, one.metric.name), one.name))
    said = [f"{one.metric.title} in {plain(one.slice, 50)} {wording.difference(one)}, n = {one.n}" for one in worst[:3]]
    return [f"- **Worst slices:** {'; '.join(said)}."]


def _width(comparison: Comparison, name: str) -> float:
    whole = comparison.metric(name)
    gain = whole.gain if whole else None
    return (gain.high - gain.low if gain else 0.0) or 1.0


def _safety(comparison: Comparison, evidence: Evidence) -> list[str]:
    if evidence.candidate_findings is None:
        return []
    found = Counter(finding.kind for finding in evidence.candidate_findings)
    before = len(evidence.champion_findings or ())
    if not found:
        return [f"- **Safety:** no finding about the candidate; {before} about the champion."]
    titles = {metric.name.removeprefix("safety."): metric.title.lower() for metric in SAFETY_METRICS}
    named = ", ".join(f"{count} {plain(titles.get(kind, kind), 40)}" for kind, count in sorted(found.items()))
    plural = "" if found.total() == 1 else "s"
    return [
        f"- **Safety: {found.total()} finding{plural} about the candidate** ({named}); {before} about the champion."
    ]


def _judge(comparison: Comparison, evidence: Evidence) -> list[str]:
    """Whether the judge's metrics gate, and why not; where it stands against people at its weakest."""
    judged = {one.metric.name: one for one in comparison.metrics if one.metric.group == "judged" and not one.slice}
    if not judged:
        return []
    found = evidence.calibration
    name = f"- **Judge** {plain(found.model, 60)} (`{short(found.judge)}`)" if found else "- **Judge**"
    free = [metric for metric in judged if metric not in comparison.demoted]
    standing = f"{len(free)} of its {len(judged)} metrics may gate, the others are shown only"
    if not free:
        standing = "its metrics are shown and never gate"
    elif len(free) == len(judged):
        standing = "its metrics may gate"
    said = [f"{name}: {standing}."]
    if demoted := [metric for metric in judged if metric in comparison.demoted]:
        said.append(f"{judged[demoted[0]].metric.title}: {plain(comparison.demoted[demoted[0]], 160)}.")
    measured = [one for one in found.metrics if one.metric in judged] if found else []
    if measured:
        weakest = min(measured, key=lambda one: (one.kappa_low, one.metric))
        said.append(
            f"Kappa with people at its weakest ({judged[weakest.metric].metric.title}): {weakest.kappa:.2f} "
            f"[{weakest.kappa_low:.2f}, {weakest.kappa_high:.2f}], {weakest.labelled} labelled items."
        )
    return [" ".join(said)]


def _saving(evidence: Evidence) -> list[str]:
    stopping = evidence.stopping
    if stopping is None or not stopping.batch:
        return []
    return [f"- **Sequential:** {plain(stopping.sentence, 300)}."]


def _speed(comparison: Comparison) -> list[str]:
    parts = []
    for one in comparison.metrics:
        metric = one.metric
        if metric.group == "speed" and not one.slice and one.candidate is not None and one.champion is not None:
            new, old = wording.value(one.candidate, metric), wording.value(one.champion, metric)
            unit = f" {plain(metric.unit, 12)}" if metric.unit else ""
            parts.append(f"{metric.title.lower()} {new}{unit} (champion {old})")
    return [f"- **Speed and cost:** {', '.join(parts)}."] if parts else []


def _missing(decision: Decision, comparison: Comparison) -> list[str]:
    causes: Counter[str] = Counter()
    for name in {result.check.metric for result in decision.checks if not result.advisory}:
        found = comparison.metric(name)
        causes.update(found.missing if found else {})
    return [f"- **Without a score** in the gating metrics: {plain(wording.counts(causes), 160)}."] if causes else []


def _changes(evidence: Evidence) -> list[str]:
    if evidence.changes is None:
        return []
    said = "; ".join(plain(one, 160) for one in evidence.changes) or "nothing but the weights"
    return [f"- **Changed since the champion:** {said}."]


def _data(evidence: Evidence) -> list[str]:
    rows = [f"{plain(str(name), 40)} {plain(str(value), 120)}" for name, value in evidence.dataset.items()]
    return [f"- **Data:** {'; '.join(rows[:6])}."] if rows else []


def _subjects(decision: Decision, comparison: Comparison, evidence: Evidence) -> str:
    return (
        f"- **Subjects:** {_named(evidence.candidate, decision.subjects.candidate)} against "
        f"{_named(evidence.champion, decision.subjects.champion)}, {comparison.total} items, suite "
        f"{plain(evidence.suite)}; decided {_time(decision.created)}, valid until {_time(decision.expires)}."
    )


def _time(text: str) -> str:
    return f"{text[:16].replace('T', ' ')} UTC"


def _named(name: str, digest: str) -> str:
    """The name for people, with the short digest unless it is part of the name."""
    return plain(name) if short(digest) in name else f"{plain(name)} (`{short(digest)}`)"
