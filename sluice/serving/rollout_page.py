"""A rollout as one self-contained HTML page: what became of it and why, the requests that convicted it, its share and
its metrics over time, and every event with who and why.

No script, nothing from elsewhere, every text escaped, and no word of a user: requests are named by their ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from sluice.infra.page_style import page_style
from sluice.infra.progress import duration_text
from sluice.serving.analysis import Conviction, MetricResult
from sluice.serving.interval_scale import difference_text, interval_text
from sluice.serving.metrics import LIVE_METRICS
from sluice.serving.policy import RolloutPolicy
from sluice.serving.rollout_charts import MARKS, history, metric_chart, title, weight_chart
from sluice.serving.rollout_state import RolloutEvent, RolloutState

_TONES = {"promoted": "pass", "failed": "fail", "failing": "fail", "withdrawn": "inconclusive"}


@dataclass(frozen=True)
class PageFacts:
    """What the page needs beside the rollout. `traces` leads from a request's id to its trace's, `pages` from a trace's
    id to its page; `version` names the release for people, `version_page` is where it is described."""

    application: str
    version: str = ""
    version_page: str = ""
    policy: RolloutPolicy | None = None
    traces: Mapping[str, str] = field(default_factory=dict)
    pages: Mapping[str, str] = field(default_factory=dict)


def rollout_page(state: RolloutState, facts: PageFacts) -> str:
    """The page's HTML."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    folder = files("sluice.serving")
    template = environment.from_string((folder / "rollout.html.j2").read_text(encoding="utf-8"))
    style = page_style() + (folder / "rollout.css").read_text(encoding="utf-8")
    last = state.analysis
    metrics = _by_weight(last.metrics) if last else []
    drawn = [one for one in metrics if any(seen.estimate is not None for _, seen in history(state, one.name))]
    return template.render(
        style=Markup(style),
        state=state,
        facts=facts,
        tone=_TONES.get(state.phase, "shown"),
        mark=MARKS.get(_TONES.get(state.phase, ""), "▸"),
        heading=heading(state),
        summary=summary(state),
        span=_span(state),
        tiles=_tiles(state),
        convictions=_convictions(state, facts),
        weight=Markup(weight_chart(state)) if state.events else "",
        charts=[Markup(metric_chart(state, one.name)) for one in drawn],
        rows=[_row(one) for one in metrics],
        events=_timeline(state),
        policy=_policy(facts.policy),
    )


def heading(state: RolloutState) -> str:
    """How it ended, in a few words."""
    highest = max((event.weight for event in state.events), default=0)
    return {
        "promoted": "Promoted: it answers everybody",
        "failed": f"Rolled back at {highest}%" if highest else "Failed before any user saw it",
        "failing": f"Rolled back at {highest}%" if highest else "Failed before any user saw it",
        "withdrawn": "Withdrawn, without having failed",
    }.get(state.phase, f"Under way: {state.phase}")


def summary(state: RolloutState) -> str:
    """Why, in the words of whoever decided it."""
    if state.reason:
        return state.reason
    if state.analysis is not None:
        return state.analysis.sentence
    return state.events[-1].sentence if state.events else "Nothing happened yet."


def _span(state: RolloutState) -> str:
    if not state.events:
        return ""
    first, last = state.events[0].time, state.events[-1].time
    return f"{_utc(first)} to {_utc(last)[11:] if _utc(first)[:10] == _utc(last)[:10] else _utc(last)} UTC"


def _tiles(state: RolloutState) -> list[tuple[str, str]]:
    """The first screen's figures: figure, what it is."""
    tiles = []
    if state.events:
        tiles.append((duration_text(max(state.events[-1].time - state.events[0].time, 0)), "from start to end"))
        tiles.append((f"{max(event.weight for event in state.events)}%", "highest share of the sessions"))
    if state.analysis is not None:
        known = [one.canary_n for one in state.analysis.metrics]
        tiles.append((f"{max(known, default=0):,}", "of its requests were compared"))
        gating = [one for one in state.analysis.metrics if one.gating]
        tiles.append((f"{sum(one.verdict == 'pass' for one in gating)} of {len(gating)}", "deciding metrics pass"))
    people = {event.actor for event in state.events if event.actor}
    if people:
        tiles.append((f"{sum(bool(event.actor) for event in state.events)}", f"orders by {', '.join(sorted(people))}"))
    return tiles


def _convictions(state: RolloutState, facts: PageFacts) -> list[dict[str, Any]]:
    """By failing metric: its sentence, and the requests behind it, latest first. What ended the rollout at once, before
    any metric had failed, comes by itself."""
    last = state.analysis
    if last is None or last.verdict != "fail" or state.phase not in ("failing", "failed"):
        return []
    failed = [one for one in last.metrics if one.gating and one.verdict == "fail"]
    found = [
        {"title": title(one.name), "sentence": one.sentence, "figures": _figures(one), "metric": one.name}
        for one in failed
    ]
    if not failed:
        found.append({"title": "Ended at once", "sentence": last.sentence, "figures": "", "metric": ""})
    return [
        {**one, "requests": [_request(each, facts) for each in reversed(last.convicting)
                             if one["metric"] in ("", each.metric)]}
        for one in found
    ]  # fmt: skip


def _figures(metric: MetricResult) -> str:
    """The comparison in one sentence, for somebody who sees such a thing for the first time."""
    chance = f"{metric.p_fail:.1e}" if metric.p_fail < 0.001 else f"{metric.p_fail:.3f}"
    return (
        f"{metric.canary_n:,} values of the canary were compared with {metric.stable_n:,} of stable from the same "
        f"moments. The difference is {difference_text(metric, metric.estimate)}, by an interval that holds however "
        f"often one looks {interval_text(metric)}; allowed is {difference_text(metric, metric.bound_fail)}. A release "
        f"that keeps within that would look like this with a chance of at most {chance}."
    )


def _request(request: Conviction, facts: PageFacts) -> dict[str, str]:
    about, trace = LIVE_METRICS[request.metric], facts.traces.get(request.request_id, "")
    value = "" if about.kind == "rate" else f"{request.value:g} {about.unit}".strip()
    return {
        "time": _utc(request.known)[11:],
        "id": request.request_id,
        "session": request.session,
        "what": ", ".join(part for part in (request.detail, value) if part) or about.noun,
        "trace": trace,
        "page": facts.pages.get(trace, ""),
    }


def _by_weight(metrics: Sequence[MetricResult]) -> list[MetricResult]:
    """What failed first, then what decides, then what is only shown."""
    order = {"fail": 0, "inconclusive": 1, "pass": 2}
    return sorted(metrics, key=lambda one: (not one.gating, order[one.verdict]))


def _row(metric: MetricResult) -> dict[str, Any]:
    about = LIVE_METRICS[metric.name]
    return {
        "title": title(metric.name),
        "noun": about.noun,
        "tone": metric.verdict if metric.gating else "shown",
        "word": f"{MARKS[metric.verdict]} {metric.verdict}" if metric.gating else f"({metric.verdict})",
        "canary": f"{_mean(metric, metric.canary_mean)}",
        "stable": f"{_mean(metric, metric.stable_mean)}",
        "n": f"{metric.canary_n:,} / {metric.stable_n:,}",
        "difference": difference_text(metric, metric.estimate),
        "interval": interval_text(metric) if metric.low is not None else "",
        "fail": difference_text(metric, metric.bound_fail),
        "margin": difference_text(metric, metric.bound_margin),
        "sentence": metric.sentence,
    }


def _mean(metric: MetricResult, value: float | None) -> str:
    if value is None:
        return "–"
    if metric.kind == "rate":
        return f"{value:.1%}"
    return f"{value:.4g} {LIVE_METRICS[metric.name].unit}".strip()


def _timeline(state: RolloutState) -> list[dict[str, Any]]:
    """The events in order; looks that follow each other are one row that opens."""
    rows: list[dict[str, Any]] = []
    for event in state.events:
        row = _event(event)
        if event.kind == "look" and rows and rows[-1]["kind"] == "look":
            rows[-1]["earlier"].append({**rows[-1], "earlier": []})
            rows[-1].update(row)
        else:
            rows.append({**row, "earlier": []})
    return rows


def _event(event: RolloutEvent) -> dict[str, Any]:
    return {
        "time": _utc(event.time)[11:],
        "weight": f"{event.weight}%",
        "kind": event.kind,
        "tone": event.verdict or "shown",
        "mark": MARKS[event.verdict] if event.verdict else "·",
        "sentence": event.sentence,
        "actor": event.actor,
    }


def _policy(policy: RolloutPolicy | None) -> str:
    """The policy as it was, every default written out, as YAML."""
    import yaml

    return yaml.safe_dump(policy.model_dump(mode="json"), sort_keys=False, allow_unicode=True) if policy else ""


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
