"""MLflow's calls are told from everybody else's."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from sluice.infra.errors import InputError, UnavailableError
from sluice.infra.settings import MlflowSettings, Settings
from sluice.infra.webhook_signature import signature_of
from sluice.registry.mlflow_registry import MlflowRegistry
from sluice.registry.webhooks import (
    DELIVERY,
    SIGNATURE,
    TIMESTAMP,
    CallRefused,
    Deliveries,
    Hint,
    hint_of,
    load_or_create_secret,
    register_webhook,
)

SECRET = "a secret of more than 24 characters"
NOW = 1_800_000_000
BODY = b'{"entity": "model_version_tag"}'


class Clock:
    now = float(NOW)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def deliveries(clock: Clock) -> Deliveries:
    found = Deliveries(SECRET, clock)
    clock.now += 600
    return found


def call(
    clock: Clock, body: bytes = BODY, *, late_s: float = 0, delivery: str = "d-1", secret: str = SECRET
) -> dict[str, str]:
    stamp = str(int(clock.now - late_s))
    return {DELIVERY: delivery, TIMESTAMP: stamp, SIGNATURE: signature_of(secret.encode(), delivery, stamp, body)}


def refused(deliveries: Deliveries, headers: dict[str, str], body: bytes = BODY) -> int:
    with pytest.raises(CallRefused) as caught:
        deliveries.admit(headers, body)
    assert SECRET not in str(caught.value)
    return caught.value.status


def test_the_signature_is_mlflows() -> None:
    # Made by mlflow.webhooks.delivery._generate_hmac_signature of 3.17; tests/integration has MLflow itself sign.
    theirs = "v1,3l2uPiTtX3WMZ7Os+JeNCFr+UCRNg1cpfMNcyBo7z4E="
    assert signature_of(SECRET.encode(), "id-1", "1800000000", '{"name": "Größe"}'.encode()) == theirs


def test_a_call_of_mlflow_counts_once(deliveries: Deliveries, clock: Clock) -> None:
    headers = call(clock)
    deliveries.admit(headers, BODY)
    for later in (0, 1, 299):
        clock.now += later
        assert refused(deliveries, headers) == 409
    clock.now += 10
    assert refused(deliveries, headers) == 401, "its memory ends when its time does"
    deliveries.admit(call(clock, delivery="d-2"), BODY)
    assert list(deliveries._seen) == ["d-2"], "what is stale is forgotten"


def test_forged_calls_are_refused(deliveries: Deliveries, clock: Clock) -> None:
    good = call(clock)
    unversioned = good[SIGNATURE].removeprefix("v1,")
    forgeries: list[dict[str, str]] = [
        {},
        {name: value for name, value in good.items() if name != SIGNATURE},
        {**good, SIGNATURE: ""},
        {**good, SIGNATURE: unversioned},
        {**good, SIGNATURE: f"v2,{unversioned}"},
        {**good, SIGNATURE: good[SIGNATURE].lower()},
        {**good, SIGNATURE: good[SIGNATURE][:-1]},
        {**good, SIGNATURE: good[SIGNATURE] + "é"},
        {**good, DELIVERY: "d-2"},
        {**good, TIMESTAMP: str(int(clock.now) + 1)},
        call(clock, secret="another secret of 24 characters"),
        call(clock, secret=""),
        call(clock, body=BODY + b" "),
        # Another key, another hash, another order of what is signed.
        {**good, SIGNATURE: "v1," + base64.b64encode(hashlib.sha256(BODY).digest()).decode()},
        {**good, SIGNATURE: "v1," + base64.b64encode(hmac.digest(SECRET.encode(), BODY, "sha256")).decode()},
    ]
    for forged in forgeries:
        assert refused(deliveries, forged) == 401, forged
    assert refused(deliveries, good, BODY.replace(b"tag", b"gat")) == 401
    # None of them used the good one up.
    deliveries.admit(good, BODY)


@pytest.mark.parametrize("late_s", [301, 601, 100_000, -301, -100_000])
def test_a_stale_call_is_refused_though_it_is_signed(deliveries: Deliveries, clock: Clock, late_s: float) -> None:
    assert refused(deliveries, call(clock, late_s=late_s)) == 401


@pytest.mark.parametrize("stamp", ["", "soon", "-5", "1e9", "1800000000.5", "٣", "9" * 5000])
def test_a_time_that_is_none_is_refused_though_it_is_signed(deliveries: Deliveries, stamp: str) -> None:
    headers = {DELIVERY: "d", TIMESTAMP: stamp, SIGNATURE: signature_of(SECRET.encode(), "d", stamp, BODY)}
    assert refused(deliveries, headers) == 401


def test_a_call_of_before_a_restart_is_not_admitted_again(clock: Clock) -> None:
    headers = call(clock)
    Deliveries(SECRET, clock).admit(headers, BODY)
    clock.now += 1
    assert refused(Deliveries(SECRET, clock), headers) == 401


def test_a_call_without_an_id_is_refused(deliveries: Deliveries, clock: Clock) -> None:
    assert refused(deliveries, call(clock, delivery="")) == 400


def event(entity: str = "model_version_tag", action: str = "set", **data: Any) -> bytes:
    given = {"name": "assistant", "version": "3", "key": "approval", "value": "approved", **data}
    return json.dumps({"entity": entity, "action": action, "data": given}).encode()


def test_a_body_is_a_hint_where_to_look() -> None:
    assert hint_of(event()) == Hint("assistant", 3)
    assert hint_of(event("model_version_alias", "created", alias="approved")) == Hint("assistant", 3)
    assert hint_of(event(key="gate")) is None
    assert hint_of(event("model_version_alias", "created", alias="champion")) is None
    assert hint_of(event("registered_model", "created")) is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 60_000,
        event(version="latest"),
        event(version=None),
        event(version=float("inf")),
    ],
)
def test_a_body_that_is_no_event_is_refused(body: bytes) -> None:
    with pytest.raises(CallRefused) as caught:
        hint_of(body)
    assert caught.value.status == 400


def test_the_secret_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    made = load_or_create_secret(settings)
    assert len(made) >= 40
    assert load_or_create_secret(settings) == made
    path = settings.home / "keys" / "webhook.secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("short\n")
    with pytest.raises(InputError, match="holds fewer than 24 characters") as caught:
        load_or_create_secret(settings)
    assert "short" not in str(caught.value).replace("fewer", "")
    given = Settings(home=tmp_path / "home", mlflow=MlflowSettings(webhook_secret=SecretStr(SECRET)))
    assert load_or_create_secret(given) == SECRET
    assert SECRET not in repr(given)


class Webhooks(MlflowRegistry):
    """MLflow's webhooks in memory; `refuses` is raised instead."""

    def __init__(self, refuses: Exception | None = None) -> None:
        super().__init__("http://mlflow.test")
        self.hooks: dict[str, dict[str, Any]] = {}
        self.refuses = refuses

    def get(self, path: str, **_: Any) -> dict[str, Any]:
        if isinstance(self.refuses, UnavailableError):
            raise self.refuses
        return {"webhooks": [{"webhook_id": key, **hook} for key, hook in self.hooks.items()]}

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        if self.refuses:
            raise self.refuses
        self.hooks[f"w{len(self.hooks)}"] = body
        return {"webhook": {"webhook_id": f"w{len(self.hooks) - 1}"}}

    def patch(self, path: str, **body: Any) -> dict[str, Any]:
        self.hooks[path.removeprefix("webhooks/")].update(body)
        return {}


def test_registering_again_updates_the_one_that_is_there() -> None:
    registry = Webhooks()
    registry.hooks["other"] = {"name": "somebody's"}
    first = register_webhook(registry, "assistant", "https://a.example/webhooks/mlflow", SECRET)
    again = register_webhook(registry, "assistant", "https://b.example/webhooks/mlflow", "another " + SECRET)
    assert first == again
    assert registry.hooks[first]["url"] == "https://b.example/webhooks/mlflow"
    assert registry.hooks[first]["secret"] == "another " + SECRET
    assert len(registry.hooks) == 2


def test_a_refused_registration_tells_the_way_out() -> None:
    with pytest.raises(InputError, match="loopback_webhooks") as caught:
        register_webhook(Webhooks(InputError("Invalid webhook URL scheme")), "assistant", "http://127.0.0.1/", SECRET)
    assert SECRET not in str(caught.value)
    with pytest.raises(UnavailableError, match="MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY"):
        register_webhook(Webhooks(UnavailableError("failed: 500")), "assistant", "https://a.example", SECRET)
