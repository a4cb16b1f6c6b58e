"""The summary on MLflow's model-version page: what a reviewer needs for a yes or no, most important first.

MLflow keeps at most 5,000 characters of a version's description, of which the page around the summary takes its share;
whole lines give way from the end. Names come from files and other people, so whatever could be markup is escaped.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from sluice.evaluation import wording
from sluice.evaluation.comparison import Comparison, MetricComparison
from sluice.evaluation.evidence import Evidence, JudgeStanding
from sluice.evaluation.gate import CheckResult, Decision
from sluice.evaluation.slices import Cell, slice_cells, worst_slices
from sluice.provenance.canonical import short

LONGEST = 4_000
ROWS = 12
"""Checks in the table; the report has them all."""

_NAME = 30
_MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|~])")
_ORDER = {"fail": 0, "inconclusive": 1, "pass": 2}


def plain(text: str, limit: int = 200) -> str:
    """`text` as one line that Markdown shows literally, at most about `limit` characters of it."""
    line = " ".join(text.split())
    if len(line) > limit:
        line = line[: limit - 1].rstrip() + "…"
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = _MARKUP.sub(r"\\\1", line)
    # Bare addresses become links in GitHub's dialect; not here.
    return line.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")


def summary_markdown(decision: Decision, comparison: Comparison, evidence: Evidence) -> str:
    """The summary, its first line the verdict."""
    ranked = sorted(decision.checks, key=lambda result: (result.advisory, _ORDER[result.verdict]))
    blocks = [f"**Gate: {decision.verdict.upper()}.** {plain(decision.summary, 600)}", _table(ranked, comparison)]
    lines = [
        *_slices(decision, comparison, evidence),
        *_safety(comparison, evidence),
        *(_judge(one) for one in evidence.judges),
        *_saving(evidence),
        *_speed(comparison, evidence),
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
        change = wording.difference(found) if found else "–"
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


def _slices(decision: Decision, comparison: Comparison, evidence: Evidence) -> list[str]:
    cells = slice_cells(comparison, evidence.slices)
    if not cells:
        return []
    worst = worst_slices(cells, [result.check.metric for result in decision.checks if not result.advisory])
    count = len({cell.slice for cell in cells})
    if not worst:
        return [f"- **Slices:** none of {count} loses in a metric that gates."]
    return [f"- **Worst slices:** {'; '.join(_cell(cell) for cell in worst)}."]


def _cell(cell: Cell) -> str:
    metric = cell.metric.metric
    sign = 1 if metric.higher_is_better else -1
    return f"{metric.title} in {plain(cell.slice, 50)} {wording.change(sign * cell.gain, metric)} (n = {cell.n})"


def _safety(comparison: Comparison, evidence: Evidence) -> list[str]:
    if evidence.findings is None:
        return []
    probes = {one.n for one in comparison.metrics if one.metric.group == "safety" and not one.slice}
    by_side = {
        side: Counter(finding.probe for finding in evidence.findings if finding.release == side)
        for side in ("candidate", "champion")
    }
    found = by_side["candidate"]
    if not found:
        return [f"- **Safety:** no finding about the candidate in {sum(probes)} probes and scans."] if probes else []
    named = ", ".join(f"{count} {plain(name, 40)}" for name, count in sorted(found.items()))
    return [f"- **Safety: {found.total()} findings about the candidate** ({named}); champion: {by_side['champion'].total()}."]


def _judge(judge: JudgeStanding) -> str:
    name = f"- **Judge** {plain(judge.model, 60)} (`{short(judge.digest)}`)"
    if not judge.agreements:
        return f"{name}: nobody labelled anything for it, so its metrics are shown and never gate."
    gating = [one for one in judge.agreements if not one.demoted]
    known = [one for one in judge.agreements if one.kappa is not None]
    weakest = min(known, key=lambda one: one.low if one.low is not None else -1.0, default=None)
    kappa = ""
    if weakest is not None and weakest.low is not None and weakest.high is not None:
        kappa = f" Kappa with people at its weakest ({weakest.title}): {weakest.kappa:.2f} [{weakest.low:.2f}, {weakest.high:.2f}], {weakest.n} labelled items."
    if not gating:
        return f"{name}: below the policy's floor, its metrics are shown and never gate.{kappa}"
    share = "its metrics gate" if len(gating) == len(judge.agreements) else f"{len(gating)} of {len(judge.agreements)} metrics gate"
    return f"{name}: {share}.{kappa}"


def _saving(evidence: Evidence) -> list[str]:
    stopping = evidence.stopping
    if stopping is None:
        return []
    if stopping.asked >= stopping.total:
        return [f"- **Sequential:** all {stopping.total} items were needed."]
    requests = f", {stopping.saved_requests:,} requests were not sent" if stopping.saved_requests else ""
    return [
        f"- **Stopped early:** certain after {stopping.asked} of {stopping.total} items "
        f"({stopping.saved_share:.0%} saved{requests})."
    ]


def _speed(comparison: Comparison, evidence: Evidence) -> list[str]:
    parts = []
    for one in comparison.metrics:
        metric = one.metric
        if metric.group == "speed" and not one.slice and one.candidate is not None and one.champion is not None:
            unit = evidence.price.currency if metric.name == "speed.cost_per_1000" and evidence.price else metric.unit
            new, old = wording.value(one.candidate, metric), wording.value(one.champion, metric)
            parts.append(f"{metric.title.lower()} {new}{f' {plain(unit, 12)}' if unit else ''} (champion {old})")
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
