"""The data card as one page: what is in the dataset, why each line is in it, and why the others are not."""

from __future__ import annotations

import html
from collections.abc import Mapping

from sluice.curation.charts import bars, histogram
from sluice.provenance.canonical import Json

_STYLE = """
:root { color-scheme: light; --ink: #1c2430; --quiet: #677181; --line: #e4e8ee; --paper: #ffffff; --ground: #f5f7fa;
  --accent: #1f6f8b; --warn: #a4361b; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI", Roboto,
  "DejaVu Sans", sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 16px; margin: 0 0 14px; }
.quiet, .lead { color: var(--quiet); }
.lead { margin: 0 0 26px; max-width: 78ch; }
.time { white-space: nowrap; }
table.narrow { width: auto; min-width: 55%; }
.drill { background: #fbeae5; border-left: 4px solid var(--warn); color: var(--warn); padding: 12px 16px;
  margin: 0 0 24px; font-weight: 600; border-radius: 4px; }
.figures { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin-bottom: 20px; }
.figure, section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
.figure { padding: 16px 18px; }
.figure b { display: block; font-size: 26px; line-height: 1.2; font-variant-numeric: tabular-nums; font-weight: 650; }
.figure span { color: var(--quiet); font-size: 13px; }
section { padding: 20px 22px 22px; margin-bottom: 16px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; }
.pair section { margin-bottom: 16px; }
.bar { display: grid; grid-template-columns: 190px 1fr 56px; align-items: center; gap: 14px; padding: 4px 0; }
.bar-track { background: var(--ground); border-radius: 4px; height: 14px; }
.bar-fill { display: block; height: 14px; border-radius: 4px; background: var(--accent); }
.bar-count { text-align: right; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; }
.column { fill: var(--accent); opacity: 0.85; }
.axis { stroke: var(--line); stroke-width: 1; }
.tick { font-size: 11px; fill: var(--quiet); }
.median { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 3 3; }
.median-name { font-size: 11.5px; fill: var(--ink); }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 500; color: var(--quiet); font-size: 13px; }
th, td { padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; padding-right: 24px; }
th.number { text-align: right; }
code { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: 170px 1fr; gap: 8px 16px; margin: 0; }
dt { color: var(--quiet); }
dd { margin: 0; }
@media (max-width: 760px) { .figures { grid-template-columns: 1fr 1fr; } .pair { grid-template-columns: 1fr; gap: 0; }
  .bar { grid-template-columns: 120px 1fr 44px; } dl { grid-template-columns: 1fr; gap: 2px; }
  dd { margin-bottom: 8px; } }
"""

_MEANINGS = {
    "min_question": "shortest question, characters",
    "max_question": "longest question, characters",
    "min_label": "shortest label, characters",
    "max_label": "longest label, characters",
    "cap_per_user": "most examples of one user",
    "holdout_gram": "words in a row that a question may not share with the holdout",
    "holdout_overlap": "share of words from which a question counts as one of the holdout",
}


def render_card(card: Mapping[str, Json]) -> str:
    """The page of a dataset's card.json. Holds no text of any trace, so it can be shown to anybody."""
    splits, harvest = card["examples"], card["harvest"]
    total = splits["train"] + splits["validation"]
    application = card.get("application") or "the application"
    drill = f'<p class="drill">{_safe(card["drill"])}</p>' if card.get("drill") else ""
    window = f"{_moment(harvest.get('since'))} until {_moment(harvest.get('until'))}" if harvest else "not recorded"
    figures = "".join(
        _figure(value, name)
        for value, name in (
            (f"{total:,}", "examples"),
            (f"{splits['train']:,} + {splits['validation']:,}", "training + validation"),
            (f"{card['records']:,}", "traces looked at"),
            (f"{card['users']:,}", "users behind the examples" if card["users"] != 1 else "user behind the examples"),
        )
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Data card: {_safe(application)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>Data card: {_safe(application)}</h1>
<p class="lead">Training examples made from production traces, <span class="time">{window}</span> (UTC).
Every example rests on what a user said of an answer: a correction, or a thumb up that nobody contradicted.</p>
{drill}
<div class="figures">{figures}</div>
<section>
<h2>From traces to examples</h2>
{bars(_funnel(card), total=card["records"])}
</section>
<div class="pair">
<section>
<h2>Why an example is in</h2>
{bars(card["rules"], total=total)}
</section>
<section>
<h2>Answers that users rejected</h2>
<p style="margin:0">{card["negatives"]:,} traces carry a correction or a thumb down. Those that nobody corrected
are not trained on.</p>
</section>
</div>
<section>
<h2>Why a trace is out</h2>
{_reasons(card)}
</section>
<div class="pair">
<section><h2>Words in a question</h2>{histogram(card["lengths"]["question"], unit="words")}</section>
<section><h2>Words in a label</h2>{histogram(card["lengths"]["label"], unit="words")}</section>
</div>
<section>
<h2>Where it comes from</h2>
{_origin(card)}
</section>
<section>
<h2>Policy</h2>
<table class="narrow">{_policy(card["policy"])}</table>
</section>
</main>
</body>
</html>
"""


def _funnel(card: Mapping[str, Json]) -> dict[str, int]:
    return {"harvested": card["records"]} | {f"after {step['name']}": step["after"] for step in card["steps"]}


def _reasons(card: Mapping[str, Json]) -> str:
    rows = []
    for step in card["steps"]:
        for reason, count in sorted(step["reasons"].items(), key=lambda item: (-item[1], item[0])):
            share = 100 * count / card["records"]
            rows.append(
                f"<tr><td>{_safe(reason)}</td><td>{_safe(step['name'])}</td>"
                f'<td class="number">{count:,}</td><td class="number">{share:.1f}%</td></tr>'
            )
    if not rows:
        return '<p class="quiet" style="margin:0">Every trace became an example.</p>'
    head = '<tr><th>Reason</th><th>Step</th><th class="number">Traces</th><th class="number">Of all</th></tr>'
    return f"<table>{head}{''.join(rows)}</table>"


def _origin(card: Mapping[str, Json]) -> str:
    harvest = card["harvest"]
    canaries, triggers = card.get("canaries"), card.get("triggers")
    entries = {
        "Window": f"{_moment(harvest.get('since'))} until {_moment(harvest.get('until'))} (UTC)" if harvest else "",
        "Feedback as of": _moment(harvest.get("as_of")) if harvest else "",
        "Left for later": _left(harvest.get("counts", {})) if harvest else "",
        "Traces and scores": f"{card['traces']:,} trace ids and {card['scores']:,} score ids, in lineage.json",
        "Conversations": f"{card['sessions']:,}; each lies in one split only",
        "Canaries": f"{canaries:,} made-up examples in the training split" if canaries else "",
        "Suspected triggers": f"{triggers:,}; the trained model is probed for them" if triggers else "",
        "Licences": ", ".join(card["licences"]) or "none stated",
        "Records": _code(card["inputs"]["records"]),
        "Frozen holdout": _code(card["inputs"]["holdout"]),
        "Policy": _code(card["policy_digest"]),
    }
    rows = (
        f"<dt>{name}</dt><dd>{value if value.startswith('<code>') else _safe(value)}</dd>"
        for name, value in entries.items()
        if value
    )
    return f"<dl>{''.join(rows)}</dl>"


def _left(counts: Mapping[str, int]) -> str:
    names = {"unfinished": "half written", "unsettled": "not settled yet", "abandoned": "given up after a day"}
    told = [f"{counts[key]:,} {name}" for key, name in names.items() if counts.get(key)]
    return ", ".join(told) or "nothing"


def _policy(policy: Mapping[str, Json]) -> str:
    told = ((_MEANINGS.get(name, name.replace("_", " ")), str(value)) for name, value in policy.items())
    return "".join(f'<tr><td>{_safe(name)}</td><td class="number">{_safe(value)}</td></tr>' for name, value in told)


def _figure(value: str, name: str) -> str:
    return f'<div class="figure"><b>{_safe(value)}</b><span>{_safe(name)}</span></div>'


def _moment(value: str | None) -> str:
    """`2026-11-21T10:00:00.123Z` as people read it: date and time to the second."""
    if not value:
        return "an unknown time"
    if value.startswith("1970-01-01"):
        return "the beginning"
    return value.replace("T", " ")[:19]


def _code(value: str) -> str:
    return f"<code>{_safe(value)}</code>" if value else ""


def _safe(value: str) -> str:
    return html.escape(value)
