"""The summary on MLflow's model-version page: the verdict in words, one table, a few examples.

Answers are a model's text, so untrusted: whatever could be markup, a link or an image is escaped. MLflow keeps at most
5,000 characters of a version's description; examples are left out before that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sluice.evaluation import wording
from sluice.evaluation.comparison import Comparison
from sluice.evaluation.gate import Decision
from sluice.provenance.canonical import short

if TYPE_CHECKING:
    from sluice.evaluation.report import Example, ReportContext

LONGEST = 4_800
_HARD = "\u00a0"
_MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|~])")


def plain(text: str, limit: int = 200) -> str:
    """`text` as one line that Markdown shows literally, at most about `limit` characters of it."""
    line = " ".join(text.split())
    if len(line) > limit:
        line = line[: limit - 1].rstrip() + "…"
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = _MARKUP.sub(r"\\\1", line)
    # Bare addresses become links in GitHub's dialect; not here.
    return line.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")


def summary_markdown(
    decision: Decision, comparison: Comparison, examples: Sequence[Example], context: ReportContext
) -> str:
    """The summary, at most 5,000 characters, its first line the verdict."""
    results = {(result.check.metric, result.slice): result for result in decision.checks}
    lines = [f"**Gate: {decision.verdict.upper()}.** {decision.summary}", ""]
    # MLflow drops the cells' alignment and padding: hard blanks keep the columns apart and the intervals in one line.
    lines += [
        f"| Metric | Champion{_HARD * 2} | Candidate{_HARD * 2} | "
        f"Difference{_HARD}[{comparison.confidence:.0%}{_HARD}interval]{_HARD * 2} | Needed: verdict |",
        "|:--|--:|--:|:-:|:--|",
    ]
    for one in comparison.metrics:
        metric, result = one.metric, results.get((one.metric.name, one.slice))
        verdict = "*shown only*"
        if result is not None:
            verdict = f"{wording.need(result.check, metric)}: **{result.verdict}**"
            verdict += " *(advisory)*" if result.advisory else ""
        unit = f", {metric.unit}" if metric.unit else ""
        old, new = wording.value(one.champion, metric), wording.value(one.candidate, metric)
        change = wording.difference(one).replace(" ", _HARD)
        lines.append(f"| {metric.title}{unit}{_HARD * 2} | {old} | {new} | {change} | {verdict} |")
    lines += ["", _HARD, "", _footing(decision, comparison, context)]
    if context.approve and decision.verdict == "pass":
        lines += ["", context.approve]
    for title, chosen in (
        ("Better than before", [example for example in examples if example.gain > 0]),
        ("Worse than before", [example for example in examples if example.gain < 0]),
    ):
        heading = f"**{title}**"
        for example in chosen[:2]:
            block = [
                "",
                *([heading, ""] if heading else []),
                f"*{plain(example.question, 160)}*",
                "",
                f"- champion ({example.champion_score:.2f}): {plain(example.champion_answer) or '(empty)'}",
                f"- candidate ({example.candidate_score:.2f}): {plain(example.candidate_answer) or '(empty)'}",
            ]
            if len("\n".join([*lines, *block])) > LONGEST:
                break
            lines += block
            heading = ""
    return "\n".join(lines) + "\n"


def _footing(decision: Decision, comparison: Comparison, context: ReportContext) -> str:
    rows = [
        f"Candidate {_named(context.candidate, decision.subjects.candidate)} against champion "
        f"{_named(context.champion, decision.subjects.champion)}, {comparison.total} items of suite "
        f"{plain(context.suite)}, decided {decision.created[:16].replace('T', ' ')} UTC, valid until "
        f"{decision.expires[:16].replace('T', ' ')} UTC."
    ]
    if context.dataset:
        card = [f"{plain(str(name), 60)} {plain(str(value), 120)}" for name, value in context.dataset.items()]
        rows.append("Data: " + "; ".join(card[:8]) + ("; …" if len(card) > 8 else "."))
    rows.append(
        f"Candidate's answers: {wording.counts(comparison.candidate_outcomes) or 'none'}; "
        f"champion's: {wording.counts(comparison.champion_outcomes) or 'none'}."
    )
    return "\n\n".join(rows)


def _named(name: str, digest: str) -> str:
    """The name for people, with the short digest unless it is part of the name."""
    return plain(name) if short(digest) in name else f"{plain(name)} (`{short(digest)}`)"
