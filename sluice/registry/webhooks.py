"""MLflow's webhooks: registering one for approvals, and telling MLflow's calls from everybody else's.

A call's body is a hint where to look, nothing more: what was approved is read from MLflow and checked by the ledger.

Source of the signature in X-MLflow-Signature: mlflow/webhooks/delivery.py (3.17). MLflow repeats a call that got no
answer, or 429 or 5xx, with the same id and timestamp.
"""

from __future__ import annotations

import hmac
import json
import math
import re
import secrets as randomness
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sluice.infra.errors import InputError, SluiceError, UnavailableError
from sluice.infra.home import publish_once, write_private, writing
from sluice.infra.settings import Settings
from sluice.infra.webhook_signature import signature_of
from sluice.registry.approvals import APPROVED_ALIAS, TAG
from sluice.registry.mlflow_registry import MlflowRegistry

SIGNATURE, TIMESTAMP, DELIVERY = "X-MLflow-Signature", "X-MLflow-Timestamp", "X-MLflow-Delivery-Id"
HEADERS = (SIGNATURE, TIMESTAMP, DELIVERY)
EVENTS = (("MODEL_VERSION_TAG", "SET"), ("MODEL_VERSION_ALIAS", "CREATED"))
FRESH_S = 300.0
LARGEST_BODY = 64 * 1024
SECRET_FILE = "keys/webhook.secret"
_LEAST_SECRET = 24


class CallRefused(SluiceError):
    """A call that is not MLflow's, or not of now; `status` is the HTTP answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Hint:
    """Where a call says that something happened: a registered model's name and a version's number."""

    model: str
    version: int


class Deliveries:
    """Decides whether a call is MLflow's, fresh, and seen for the first time. Safe to share between threads.

    Calls of before this process started are stale too: which of them were handled, nobody knows any more, and whoever
    starts looks at all versions anyway. So nothing needs to be kept on disk.
    """

    def __init__(self, secret: str, now: Callable[[], float] = time.time) -> None:
        self._secret = secret.encode()
        self._now = now
        self._since = math.floor(now())
        self._lock = threading.Lock()
        self._seen: dict[str, float] = {}

    def admit(self, headers: Mapping[str, str], body: bytes) -> None:
        """Nothing for a call that counts, once; else `CallRefused`. `headers` holds those of `HEADERS` that it has."""
        signature, stamp, delivery = (headers.get(name) or "" for name in HEADERS)
        expected = signature_of(self._secret, delivery, stamp, body)
        # Compared as bytes: a header may hold any character, and text with foreign ones is refused by compare_digest.
        if not hmac.compare_digest(expected.encode(), signature.encode(errors="replace")):
            raise CallRefused(401, "The signature is missing or wrong.")
        now = self._now()
        sent = int(stamp) if re.fullmatch("[0-9]{1,12}", stamp) else 0
        if sent < self._since or abs(now - sent) > FRESH_S:
            raise CallRefused(401, "The call is not of now.")
        if not delivery:
            raise CallRefused(400, "The call has no delivery id.")
        with self._lock:
            self._seen = {known: until for known, until in self._seen.items() if until >= now}
            if delivery in self._seen:
                raise CallRefused(409, "The call was answered before.")
            self._seen[delivery] = sent + FRESH_S


def hint_of(body: bytes) -> Hint | None:
    """Where to look after an admitted call; None for an event that is no word on a version. Raises `CallRefused`."""
    try:
        event = json.loads(body)
        kind, data = (event["entity"], event["action"]), event["data"]
        if kind == ("model_version_tag", "set"):
            matters = data["key"] == TAG
        else:
            matters = kind == ("model_version_alias", "created") and data["alias"] == APPROVED_ALIAS
        return Hint(str(data["name"]), int(data["version"])) if matters else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CallRefused(400, "The body is no event of MLflow's.") from error


def load_or_create_secret(settings: Settings) -> str:
    """What MLflow's calls are signed with: setting mlflow.webhook_secret, or a random one in the home, made once.

    Raises `InputError` for one that can be guessed, `UnavailableError` when it cannot be written.
    """
    if settings.mlflow.webhook_secret is not None:
        source, secret = "Setting mlflow.webhook_secret", settings.mlflow.webhook_secret.get_secret_value()
    else:
        path = settings.home / SECRET_FILE
        source, secret = f"The file {str(path)!r}", _kept(path)
    if len(secret) < _LEAST_SECRET:
        raise InputError(
            f"{source} holds fewer than {_LEAST_SECRET} characters: whoever guesses them can call us as MLflow.",
            hint="`openssl rand -base64 32` makes a good one.",
        )
    return secret


def register_webhook(registry: MlflowRegistry, application: str, url: str, secret: str) -> str:
    """Make MLflow call `url` when somebody sets a tag or an alias of a version; the webhook's id.

    Again updates the one that is there (by its name, `sluice-<application>`). Raises `InputError` when MLflow refuses
    the address, `UnavailableError` when it cannot read its own webhooks.
    """
    name = f"sluice-{application}"
    wanted: dict[str, Any] = {
        "name": name,
        "url": url,
        "secret": secret,
        "status": "ACTIVE",
        "events": [{"entity": entity, "action": action} for entity, action in EVENTS],
        "description": f"Approvals of {application} start its releases.",
    }
    try:
        found = [hook for hook in _webhooks(registry) if hook["name"] == name]
    except UnavailableError as error:
        raise UnavailableError(
            f"{error.message} MLflow cannot read its webhooks when it runs with another "
            "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY than it wrote their secrets with, or without one after a restart.",
            hint="Give the server the key it had, or remove them from its database table `webhooks`.",
        ) from error
    try:
        if found:
            identifier = str(found[0]["webhook_id"])
            registry.patch(f"webhooks/{identifier}", **wanted)
        else:
            identifier = str(registry.post("webhooks", **wanted)["webhook"]["webhook_id"])
    except InputError as error:
        raise InputError(
            f"{error.message}",
            hint="MLflow calls public https addresses only. `sluice approvals --watch` needs no call. For the embedded "
            "MLflow, docs/approvals.md tells what mlflow.loopback_webhooks allows.",
        ) from error
    return identifier


def try_webhook(registry: MlflowRegistry, identifier: str) -> str:
    """Let MLflow call now, with an example; empty when it was answered well, else what happened."""
    result = registry.post(f"webhooks/{identifier}/test")["result"]
    if result.get("success"):
        return ""
    return str(result.get("error_message") or f"{result.get('response_status')} {result.get('response_body', '')}")


def _webhooks(registry: MlflowRegistry) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    token: str | None = None
    while True:
        page = registry.get("webhooks", max_results=100, page_token=token)
        found.extend(page.get("webhooks", []))
        token = page.get("next_page_token") or None
        if token is None:
            return found


def _kept(path: Path) -> str:
    with writing(path.parent):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            staging = path.with_name(f".{path.name}.{randomness.token_hex(4)}")
            write_private(staging, randomness.token_urlsafe(32))
            publish_once(staging, path)
        return path.read_text().strip()
