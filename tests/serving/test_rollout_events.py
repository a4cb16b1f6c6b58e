"""What others are told of a rollout: a CloudEvent whose id a repeat can be recognised by, or a line for a chat."""

from __future__ import annotations

import json
from datetime import datetime

import pytest

from sluice.serving.rollout_events import cloud_event, event_id, message, slack_message
from sluice.serving.rollout_state import RolloutState
from tests.serving.rollouts import BEGUN, CANARY, STABLE, TRACE, USERS_WORDS, event, failed, holding, promoted


def test_a_cloud_event_has_what_the_specification_asks_for() -> None:
    state = failed()
    told = cloud_event("assistant", state, state.events[-2])
    # https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md#required-attributes
    assert told["specversion"] == "1.0"
    assert told["type"] == "dev.sluice.rollout.rollback"
    assert told["source"] == "/sluice/assistant"
    assert told["id"]
    assert (told["subject"], told["datacontenttype"]) == (CANARY.release, "application/json")
    assert datetime.fromisoformat(told["time"]).timestamp() == pytest.approx(BEGUN + 22, abs=0.001)
    assert told["time"].endswith("Z")
    data = told["data"]
    assert (data["stable"], data["weight"], data["verdict"], data["step"]) == (STABLE.release, 0, "fail", 1)
    assert data["metrics"][0] == {
        "name": "thumbs_down", "gating": True, "verdict": "fail", "estimate": 0.62, "low": 0.26, "high": 0.99,
        "canary_n": 9, "stable_n": 20,
    }  # fmt: skip


def test_the_same_event_is_the_same_after_a_restart_and_later() -> None:
    state = failed()
    again = RolloutState.from_json(json.loads(json.dumps(holding().to_json())))
    for before, after in zip(holding().events, again.events, strict=True):
        # Told late, when the rollout has gone on: byte for byte what was told first.
        assert message("cloudevents", "assistant", again, after) == message("cloudevents", "assistant", state, before)
    assert len({event_id(state, one) for one in state.events}) == len(state.events)


def test_no_word_session_or_request_of_a_user_leaves() -> None:
    state = failed()
    for one in state.events:
        for form in ("cloudevents", "slack"):
            called = message(form, "assistant", state, one)
            text = called[1].decode() if called else ""
            assert TRACE not in text
            assert USERS_WORDS not in text
            assert "s-1" not in text


def test_a_chat_is_told_who_and_not_every_look() -> None:
    state = promoted()
    texts = [called[1].decode() for one in state.events if (called := message("slack", "assistant", state, one))]
    assert len(texts) == len([one for one in state.events if one.kind != "look"])
    assert any("(ann)" in text for text in texts)
    assert "at 100%: The release is stable now." in json.loads(texts[-1])["text"]


def test_a_chat_reads_no_markup_from_us() -> None:
    told = slack_message("assistant", holding(), event(0, "note", 0, "<!channel> & <https://a|b>"))
    assert "&lt;!channel&gt; &amp; &lt;https://a|b&gt;" in told["text"]
