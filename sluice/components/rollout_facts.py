"""Gathers what people are shown of the rollouts: from the store, the lease and the gateway alone, so that it also
answers when registry, object store and trace store do not."""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.components.retiring import slots
from sluice.components.served import router
from sluice.components.workspace import Workspace
from sluice.infra.errors import InputError, SluiceError, UnavailableError
from sluice.provenance.canonical import hex_of
from sluice.serving.durable import replace_file
from sluice.serving.errand import Errand
from sluice.serving.event_delivery import Webhook, WebhookEvents, read_delivery
from sluice.serving.policy import RolloutPolicy, parse_policy
from sluice.serving.rollout_facts import LeaseFacts, RolloutFacts
from sluice.serving.rollout_state import RolloutState
from sluice.serving.rollout_store import FileRolloutStore
from sluice.serving.routes import RouteState

if TYPE_CHECKING:
    from sluice.infra.settings import Settings


_SLOTS_S = 3.0


def store_of(settings: Settings) -> FileRolloutStore:
    """Where this installation keeps its rollouts."""
    return FileRolloutStore(settings.home / "rollouts")


def gather(settings: Settings, release: str = "", *, servers: bool = False) -> RolloutFacts:
    """All facts about the rollout of `release`, or of the one under way, or the latest. With `servers`, those
    and the ledger are asked which adapters they hold, for a few seconds at most.

    A gateway that does not answer is a fact too. Raises `IntegrityError` for a damaged store.
    """
    folder = settings.home / "rollouts"
    store = store_of(settings)
    states = store.states()
    chosen = _chosen(states, release)
    routes, drift, active, trouble = _gateway(settings)
    events = read_delivery(_delivery(settings))
    undelivered = sum(len(events.waiting(one)) for one in states) if events and settings.events.url else 0
    return RolloutFacts(
        settings.application,
        time.time(),
        routes,
        states=states,
        rollout=chosen,
        policy=read_policy(settings, chosen.release) if chosen else None,
        gateway=trouble,
        drift=drift,
        active=active,
        slots=_slots(settings) if servers else (),
        lease=_lease(folder),
        cool_down=store.cool_down(),
        analysed=_written(folder, chosen) if chosen and chosen.analysis else None,
        undelivered=undelivered,
        webhook=events.trouble if events and settings.events.url else "",
    )


def keep_policy(settings: Settings, release: str, policy: RolloutPolicy) -> None:
    """Note by which policy a rollout runs, for those who watch it: the file it came from may change meanwhile. Where
    nothing can be written, nobody's users wait for it."""
    with suppress(UnavailableError):
        replace_file(_policy(settings, release), policy.model_dump_json(indent=1))


def read_policy(settings: Settings, release: str) -> RolloutPolicy | None:
    """The policy of a rollout as it was noted; None when it was not, or not by this version."""
    path = _policy(settings, release)
    try:
        return parse_policy(path.read_text(encoding="utf-8"), str(path))
    except (OSError, InputError):
        return None


def open_events(settings: Settings) -> WebhookEvents | None:
    """The sink that tells the webhook of the settings; None without one."""
    events = settings.events
    if events.url is None:
        return None
    webhook = Webhook(
        events.url.get_secret_value(),
        events.format,
        events.secret.get_secret_value() if events.secret else "",
        events.authorization.get_secret_value() if events.authorization else "",
    )
    return WebhookEvents(settings.application, webhook, _delivery(settings), store_of(settings).states)


def _chosen(states: tuple[RolloutState, ...], release: str) -> RolloutState | None:
    if release:
        return next((one for one in states if one.release == release), None)
    return next((one for one in reversed(states) if not one.ended), states[-1] if states else None)


def _written(folder: Path, state: RolloutState) -> float | None:
    """When the controller last wrote the state: with every analysis."""
    try:
        return (folder / f"{hex_of(state.release)}.json").stat().st_mtime
    except OSError:
        return None


def _gateway(settings: Settings) -> tuple[RouteState | None, tuple[str, ...], dict[str, int], str]:
    """Routes, drift, active requests by release, and why something of it is not known."""
    routes: RouteState | None = None
    drift: tuple[str, ...] = ()
    active: dict[str, int] = {}
    try:
        gateway = router(settings)
        routes = gateway.state()
        drift = gateway.drift()
        active = {one.release: gateway.active_requests(one.release) for one in routes.targets()}
    except SluiceError as error:
        return routes, drift, active, error.message
    return routes, drift, active, ""


def _slots(settings: Settings) -> tuple[str, ...]:
    """Who holds which adapter on each server. A server that hangs is left to hang."""
    asked = Errand(lambda: slots(Workspace(settings)))
    if not asked.done(within_s=_SLOTS_S):
        return (f"The servers do not say within {_SLOTS_S:g} s which adapters they hold.",)
    try:
        return tuple(one.sentence for one in asked.result())
    except SluiceError as error:
        return (f"Which adapters the servers hold is not known: {error.message}",)


def _lease(folder: Path) -> LeaseFacts:
    """Read without waiting; whoever holds a lock is alive."""
    content = _object(folder / "controller.json")
    queue = sorted((folder / "queue").glob("*.json")) if (folder / "queue").is_dir() else []
    return LeaseFacts(
        str(content.get("holder", "")),
        token if isinstance(token := content.get("token"), int) else 0,
        _locked(folder / "controller.lock"),
        tuple(str(_object(path).get("holder", "")) for path in queue if _locked(path)),
    )


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text() or "{}")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _locked(path: Path) -> bool:
    """Whether a process holds the lock on the file. A shared lock is asked for and given back: who looks holds up
    nobody for longer than a moment."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def _delivery(settings: Settings) -> Path:
    return settings.home / "events" / "delivered.json"


def _policy(settings: Settings, release: str) -> Path:
    return settings.home / "rollouts" / "policies" / f"{hex_of(release)}.json"
