"""An event of a rollout as others are told of it: CloudEvents 1.0 (JSON, structured mode), or a line for a chat.

Both depend on nothing but the event and its rollout's fixed facts, so that one told again after a crash is the same,
byte for byte, and its id says so. No word of a user, no session and no request id is in them.

Source: https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from sluice.provenance.canonical import digest_json, hex_of
from sluice.serving.rollout_state import EventKind, RolloutEvent, RolloutState

CLOUDEVENTS_JSON = "application/cloudevents+json; charset=utf-8"
TYPE = "dev.sluice.rollout"

QUIET: frozenset[EventKind] = frozenset({"look"})
"""Kinds that a chat is not told: they come with every change of a figure."""

_MARKS = {"pass": "✅", "fail": "❌", "inconclusive": "…", None: "▸"}


def event_id(state: RolloutState, event: RolloutEvent) -> str:
    """The same for the same event, whoever tells it and when: 32 hexadecimal digits."""
    told = [state.release, event.time, event.kind, event.weight, event.sentence]
    return hex_of(digest_json(told))[:32]


def cloud_event(application: str, state: RolloutState, event: RolloutEvent) -> dict[str, Any]:
    """The event's envelope and data. `type` is `dev.sluice.rollout.<kind>`, `subject` the release's digest."""
    return {
        "specversion": "1.0",
        "id": event_id(state, event),
        "source": f"/sluice/{application}",
        "type": f"{TYPE}.{event.kind}",
        "subject": state.release,
        "time": datetime.fromtimestamp(event.time, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "datacontenttype": "application/json",
        "data": {
            "application": application,
            "release": state.release,
            "served_name": state.target.served_name,
            "stable": state.stable.release,
            "step": event.step,
            "weight": event.weight,
            "verdict": event.verdict,
            "sentence": event.sentence,
            "actor": event.actor,
            "metrics": _figures(event),
        },
    }


def _figures(event: RolloutEvent) -> list[dict[str, Any]]:
    """Each metric that the event was decided on; not the requests behind it."""
    metrics = event.analysis.metrics if event.analysis else ()
    names = ("name", "gating", "verdict", "estimate", "low", "high", "canary_n", "stable_n")
    return [{name: getattr(one, name) for name in names} for one in metrics]


def slack_message(application: str, state: RolloutState, event: RolloutEvent) -> dict[str, str]:
    """`{"text": ...}`, as incoming webhooks of Slack and of what imitates it take it."""
    by = f" ({event.actor})" if event.actor else ""
    text = f"{_MARKS[event.verdict]} {application} {state.target.served_name} at {event.weight}%: {event.sentence}{by}"
    # Slack reads these three characters as markup: https://docs.slack.dev/messaging/formatting-message-text
    return {"text": text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")}


def message(form: str, application: str, state: RolloutState, event: RolloutEvent) -> tuple[str, bytes] | None:
    """Content type and body of a call; None for what this form does not tell. `form` as the setting events.format."""
    if form == "slack":
        if event.kind in QUIET:
            return None
        return "application/json", json.dumps(slack_message(application, state, event), ensure_ascii=False).encode()
    return CLOUDEVENTS_JSON, json.dumps(cloud_event(application, state, event), ensure_ascii=False).encode()
