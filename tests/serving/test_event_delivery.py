"""A webhook is told of every event at least once, in order and signed, and nobody waits for it."""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sluice.infra.webhook_signature import signature_of
from sluice.serving.event_delivery import Webhook, WebhookEvents, read_delivery
from sluice.serving.rollout_events import event_id
from sluice.serving.rollout_state import RolloutState
from tests.serving.rollouts import event, failed, holding

SECRET = "a secret of more than 24 characters"


class Receiver:
    """Answers with `statuses` in turn, then 200; keeps headers and bodies."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.calls: list[tuple[dict[str, str], bytes]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.calls.append(({name.lower(): value for name, value in self.headers.items()}, body))
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.calls]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


def sink(url: str, path: Path, *stored: RolloutState, **more: str) -> WebhookEvents:
    return WebhookEvents("assistant", Webhook(url, **more), path, lambda: stored, pause=lambda _: 0.01)


def tell(events: WebhookEvents, state: RolloutState, since: int = 0) -> None:
    """Each event as a controller does it: the state of that moment holds it last."""
    for number in range(since, len(state.events)):
        so_far = RolloutState(**{**vars(state), "events": state.events[: number + 1]})
        events.emit(state.events[number], so_far)


def all_ids(state: RolloutState) -> list[str]:
    return [event_id(state, one) for one in state.events]


def test_every_event_arrives_in_order_and_signed(receiver: Receiver, tmp_path: Path) -> None:
    events = sink(receiver.url, tmp_path / "delivered.json", secret=SECRET, authorization="Bearer abc")
    tell(events, failed())
    assert events.close()
    assert receiver.ids == all_ids(failed())
    for headers, body in receiver.calls:
        stamp = headers["webhook-timestamp"]
        assert abs(time.time() - int(stamp)) < 60
        assert headers["webhook-signature"] == signature_of(SECRET.encode(), headers["webhook-id"], stamp, body)
        assert headers["authorization"] == "Bearer abc"
        assert headers["content-type"].startswith("application/cloudevents+json")
        assert json.loads(body)["id"] == headers["webhook-id"]


def test_a_secret_of_the_standards_form_is_its_bytes(receiver: Receiver, tmp_path: Path) -> None:
    events = sink(receiver.url, tmp_path / "delivered.json", secret="whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD")
    tell(events, holding())
    assert events.close()
    headers, body = receiver.calls[0]
    key = base64.b64decode("C2FVsBQIhrscChlQIMV+b5sSYspob7oD")
    expected = signature_of(key, headers["webhook-id"], headers["webhook-timestamp"], body)
    assert headers["webhook-signature"] == expected


def test_what_fails_for_now_is_tried_again_and_what_is_refused_is_not(receiver: Receiver, tmp_path: Path) -> None:
    receiver.statuses = [503, 429, 200, 400]
    events = sink(receiver.url, tmp_path / "delivered.json")
    tell(events, holding())
    assert events.close()
    ids = all_ids(holding())
    # The first came through at the third attempt; the second was refused, and the rest follows all the same.
    assert receiver.ids == [ids[0], ids[0], *ids]
    kept = read_delivery(tmp_path / "delivered.json")
    assert kept is not None
    assert not kept.waiting(holding())


def test_a_webhook_that_is_away_holds_up_nobody(tmp_path: Path) -> None:
    events = sink("http://127.0.0.1:1/hook", tmp_path / "delivered.json")
    begun = time.monotonic()
    for _ in range(100):
        tell(events, failed())
    assert (time.monotonic() - begun) / (100 * len(failed().events)) < 0.002
    assert not events.close(timeout_s=0.05)
    kept = read_delivery(tmp_path / "delivered.json")
    assert kept is not None
    assert kept.waiting(failed()) == failed().events
    assert "127.0.0.1" not in kept.trouble


def test_what_a_killed_controller_did_not_tell_the_next_one_does(receiver: Receiver, tmp_path: Path) -> None:
    path = tmp_path / "delivered.json"
    killed = sink(receiver.url, path)
    tell(killed, holding())
    assert killed.close()
    # It saved two events more and died before it told anybody.
    state = failed()
    after = RolloutState(**{**vars(state), "events": (*state.events, event(24, "note", 0, "One more."))})
    following = sink(receiver.url, path, state)
    following.emit(after.events[-1], after)
    assert following.close()
    assert receiver.ids == all_ids(after)


def test_what_was_told_and_not_noted_is_told_again_with_the_same_id(receiver: Receiver, tmp_path: Path) -> None:
    path = tmp_path / "delivered.json"
    first = sink(receiver.url, path)
    before = path.read_bytes()
    tell(first, holding())
    assert first.close()
    path.write_bytes(before)
    second = sink(receiver.url, path)
    tell(second, holding())
    assert second.close()
    assert receiver.ids == 2 * all_ids(holding())


def test_rollouts_of_before_the_first_start_are_no_news(receiver: Receiver, tmp_path: Path) -> None:
    events = sink(receiver.url, tmp_path / "delivered.json", holding())
    tell(events, failed(), since=len(holding().events))
    assert events.close()
    assert receiver.ids == all_ids(failed())[len(holding().events) :]


def test_a_damaged_note_or_a_full_disk_stops_nothing(receiver: Receiver, tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file where a folder belongs")
    events = sink(receiver.url, tmp_path / "folder" / "delivered.json")
    tell(events, holding())
    assert events.close()
    assert receiver.ids == all_ids(holding())


def test_the_address_is_in_no_log_of_a_step(
    receiver: Receiver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # As a pipeline's step logs, into a file that `sluice logs` shows.
    caplog.set_level(logging.INFO)
    events = sink(receiver.url + "/T00/B00/password", tmp_path / "delivered.json")
    tell(events, holding())
    assert events.close()
    assert receiver.calls
    assert "password" not in caplog.text


def test_a_secret_is_in_no_representation() -> None:
    assert SECRET not in repr(Webhook(f"https://hooks.test/{SECRET}", "slack", SECRET, SECRET))
