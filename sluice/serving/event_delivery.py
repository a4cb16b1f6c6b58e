"""Telling a webhook what happens in a rollout, without the rollout ever waiting for it.

The outbox is the rollout's own record: an event is on disk before anybody is told of it, and this keeps, beside it,
the last one of each rollout that was delivered. So a controller that is killed loses none, the next one goes on where
it was, and telling costs the controller nothing but a note in memory, however long the webhook is away. An event may
come twice; then it has the same id. Rollouts of before the first start are not told.

A call is signed as standardwebhooks.com has it: `webhook-id`, `webhook-timestamp`, `webhook-signature`.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sluice.infra.errors import SluiceError
from sluice.infra.webhook_signature import signature_of
from sluice.serving.durable import replace_file
from sluice.serving.rollout_events import event_id, message
from sluice.serving.rollout_state import RolloutEvent, RolloutState

if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 5.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0
_AGAIN = {408, 425, 429}


@dataclass(frozen=True)
class Webhook:
    """Where events go. `secret` signs each call; `authorization` is a header's value; both may be empty."""

    url: str = field(repr=False)
    form: str = "cloudevents"
    secret: str = field(default="", repr=False)
    authorization: str = field(default="", repr=False)


@dataclass(frozen=True)
class DeliveryState:
    """What was delivered: the last event's id by release. `trouble` says what went wrong last, empty for nothing."""

    last: dict[str, str]
    trouble: str = ""

    def waiting(self, state: RolloutState) -> tuple[RolloutEvent, ...]:
        """The events of a rollout that were not delivered yet, oldest first."""
        events = state.events
        last = self.last.get(state.release)
        found = next((i for i in range(len(events) - 1, -1, -1) if event_id(state, events[i]) == last), None)
        return events if found is None else events[found + 1 :]


def read_delivery(path: Path) -> DeliveryState | None:
    """What the file holds; None without one, or with one that is damaged."""
    try:
        found = json.loads(path.read_text())
        return DeliveryState(dict(found["last"]), str(found["trouble"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


class WebhookEvents:
    """An `EventSink`. One thread calls the webhook, from the first event on; `stored` reads all rollouts' states, for
    what an earlier process could not deliver. `post` and `pause` are for tests."""

    def __init__(
        self,
        application: str,
        webhook: Webhook,
        path: Path,
        stored: Callable[[], Iterable[RolloutState]],
        *,
        post: Callable[[str, bytes, dict[str, str]], int] | None = None,
        pause: Callable[[int], float] | None = None,
    ) -> None:
        self._application = application
        self._webhook = webhook
        self._path = path
        self._stored = stored
        self._post = post or _Client()
        self._pause = pause or _pause
        self._changed = threading.Condition()
        self._latest: dict[str, RolloutState] = {}
        self._thread: threading.Thread | None = None
        self._busy = False
        self._closed = False
        if read_delivery(path) is None:
            # By their last event, not by the clock, which may jump.
            self._keep(
                DeliveryState({one.release: event_id(one, one.events[-1]) for one in self._read() if one.events})
            )

    def emit(self, event: RolloutEvent, state: RolloutState) -> None:
        """Note that there is something to tell. Takes microseconds and never raises."""
        with self._changed:
            if self._closed:
                return
            self._latest[state.release] = state
            self._busy = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="rollout events", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def close(self, timeout_s: float = 5.0) -> bool:
        """Wait for what is left to tell, so many seconds at most; whether all was told. The next process tells the
        rest."""
        with self._changed:
            told = self._changed.wait_for(lambda: not self._busy, timeout_s)
            self._closed = True
            self._changed.notify_all()
        return told

    def _run(self) -> None:
        delivered = read_delivery(self._path) or DeliveryState({})
        left: dict[str, RolloutState] = {state.release: state for state in self._read()}
        while True:
            with self._changed:
                left.update(self._latest)
                self._latest.clear()
            for state in left.values():
                delivered = self._deliver(state, delivered)
            left.clear()
            with self._changed:
                self._busy = bool(self._latest)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._latest or self._closed)
                if self._closed:
                    return

    def _read(self) -> Iterator[RolloutState]:
        try:
            yield from self._stored()
        except SluiceError:
            # A record that cannot be read now is told by a later process.
            return

    def _deliver(self, state: RolloutState, delivered: DeliveryState) -> DeliveryState:
        """Tell all that waits of one rollout, in order, however long it takes."""
        for event in delivered.waiting(state):
            trouble = ""
            called = message(self._webhook.form, self._application, state, event)
            attempt = 0
            while called is not None and not self._closed:
                status, trouble = self._call(event_id(state, event), *called)
                if 200 <= status < 300:
                    break
                if 400 <= status < 500 and status not in _AGAIN:
                    # It was understood and refused; the same again will be too.
                    break
                self._keep(DeliveryState(delivered.last, trouble))
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, self._pause(attempt))
                attempt += 1
            if self._closed:
                return delivered
            delivered = DeliveryState({**delivered.last, state.release: event_id(state, event)}, trouble)
            self._keep(delivered)
        return delivered

    def _call(self, identifier: str, content_type: str, body: bytes) -> tuple[int, str]:
        """HTTP status, 0 for none, and what went wrong in words that name no address: it may be a secret."""
        stamp = str(int(time.time()))
        headers = {"content-type": content_type, "webhook-id": identifier, "webhook-timestamp": stamp}
        if self._webhook.secret:
            headers["webhook-signature"] = signature_of(_key(self._webhook.secret), identifier, stamp, body)
        if self._webhook.authorization:
            headers["authorization"] = self._webhook.authorization
        try:
            status = self._post(self._webhook.url, body, headers)
        except Exception as error:  # noqa: BLE001 - whatever it is, the thread that tells of rollbacks goes on
            return 0, f"no answer ({type(error).__name__})"
        return status, "" if 200 <= status < 300 else f"HTTP {status}"

    def _keep(self, delivered: DeliveryState) -> None:
        try:
            replace_file(self._path, json.dumps(asdict(delivered)))
        except (SluiceError, OSError):
            # A full disk: what was told is told again by a later process, which is allowed.
            return


class _Client:
    """Posts over one kept connection, opened at the first call; redirects are not followed."""

    def __init__(self) -> None:
        self._http: httpx.Client | None = None

    def __call__(self, url: str, body: bytes, headers: dict[str, str]) -> int:
        import httpx

        if self._http is None:
            # A pipeline's step logs from INFO on, where httpx names each address: a chat's is its password.
            logging.getLogger("httpx").setLevel(logging.WARNING)
            self._http = httpx.Client(timeout=TIMEOUT_S, follow_redirects=False)
        return self._http.post(url, content=body, headers=headers).status_code


def _pause(attempt: int) -> float:
    """Seconds before the next attempt: doubling, spread so that many senders do not come at once."""
    return float(min(FIRST_PAUSE_S * 2 ** min(attempt, 20), LONGEST_PAUSE_S) * random.uniform(0.75, 1.25))


def _key(secret: str) -> bytes:
    """The bytes that sign: standardwebhooks.com writes them as `whsec_<base64>`; any other text is its own."""
    if secret.startswith("whsec_"):
        try:
            return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        except binascii.Error:
            pass
    return secret.encode()
