"""Who needs which adapter on the servers, and how one that nobody needs any more leaves them.

Needed are what the gateway routes to, the ledger's champion, what is kept (the champion before for the rollback
window, a release between its probes and its first users), and what an evaluation asks at the moment. Everything else is
retired: its weight is 0, its last answers are written, it is unloaded on every server, and the shelf forgets it; or its
server, where it has one of its own, is stopped.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from sluice.components.release_servers import retire_server, stop_strangers
from sluice.components.served import adapter_shelf, ensure_loaded, release_name, router, server_book, servers
from sluice.components.workspace import Workspace
from sluice.infra.errors import ConflictError, SluiceError, UnavailableError
from sluice.provenance.canonical import short
from sluice.provenance.releases import read_state
from sluice.serving.adapters import unload_adapter
from sluice.serving.policy import default_policy
from sluice.serving.probes import ProbeCheck
from sluice.serving.slots import Slots, server_memory, server_slots
from sluice.serving.vllm import VllmClient

RELEASING_S = 6 * 3600.0
"""Seconds for which a release that passed its probes waits, loaded, for its rollout to begin."""
_IDLE_S = 60.0


def holders(workspace: Workspace) -> dict[str, str]:
    """Who holds an adapter, in words, by its served name: who needs it, or an evaluation that asks it now."""
    settings = workspace.settings
    shelf, found = adapter_shelf(settings), needed(workspace)
    for name in {*shelf.names(), *(release_name(settings, one) for one in server_book(settings).read())}:
        with shelf.unused(name) as free:
            if not free:
                found[name] = ", ".join(filter(None, (found.get(name), "asked by an evaluation")))
    return found


def needed(workspace: Workspace) -> dict[str, str]:
    """Who needs an adapter, in words, by its served name. Raises `UnavailableError` without routes or ledger."""
    settings = workspace.settings
    shelf, routes = adapter_shelf(settings), router(settings)
    state, now = routes.state(), time.time()
    found: dict[str, list[str]] = {}

    def note(name: str, words: str) -> None:
        found.setdefault(name, []).append(words)

    if not state.stable.dedicated:
        note(state.stable.served_name, f"stable, {state.share(state.stable.release)}% of the users")
    if state.canary is not None and not state.canary.dedicated:
        note(state.canary.served_name, f"canary, {state.weight}% of the users")
    champion = read_state(workspace.ledger).champion()
    if champion is not None and champion != state.stable.release:
        note(release_name(settings, champion), "champion by the ledger")
    gone = {name for name, release in _releases(workspace).items() if routes.refusal(release)}
    for name, (until, why) in shelf.kept().items():
        # What was rolled back has no way back to any user, whatever it was kept for.
        if until > now and name not in gone:
            note(name, f"{why} until {datetime.fromtimestamp(until, UTC):%Y-%m-%d %H:%M} UTC")
    return {name: ", ".join(words) for name, words in found.items()}


def slots(workspace: Workspace) -> tuple[Slots, ...]:
    """Which adapters each server holds, for whom, and how many more it can. Raises `UnavailableError`."""
    found = holders(workspace)
    total = workspace.settings.serving.max_loras
    return tuple(server_slots(client, found, total=total) for client in servers(workspace.settings))


def make_room(workspace: Workspace, release: str, clients: Sequence[VllmClient]) -> tuple[ProbeCheck, ...]:
    """A slot at every server, and memory, for a release; the checks. What nobody needs is retired for it first, then
    earlier champions that are kept for a rollback, oldest first: never the one that a rollback would go to.

    Raises `ConflictError` naming who holds the slots, and `UnavailableError` when a machine has too little memory. Both
    say nothing about the release: it may be tried again.
    """
    settings = workspace.settings
    name = release_name(settings, release)
    size = workspace.artifacts.manifest(release).size

    def crowded() -> list[Slots]:
        found = slots(workspace)
        return [one for one in found if one.free < 1 and name not in {slot.served_name for slot in one.held}]

    if full := crowded():
        retire_due(workspace)
        for earlier in _spare_champions(workspace):
            if not (full := crowded()):
                break
            retire(workspace, earlier)
        full = crowded()
    if full:
        raise ConflictError(
            f"There is no slot for release {short(release)}: {' '.join(one.sentence for one in full)}",
            hint="Wait until one is needed no more, or raise SLUICE_SERVING__MAX_LORAS and run `sluice up`.",
        )
    memory = [server_memory(client.url, size) for client in clients]
    if short_of := [one for one in memory if not one.enough]:
        raise UnavailableError(
            f"Release {short(release)} is not loaded: {' '.join(one.sentence for one in short_of)}",
            hint="Free some memory there: a machine without any kills the server that answers users.",
        )
    checks = [
        ProbeCheck("slot", True, one.sentence, one.server, {"total": one.total, "held": len(one.held)})
        for one in slots(workspace)
    ]
    for one in memory:
        figures = {"needed": float(one.needed)} | ({"free": float(one.free)} if one.free is not None else {})
        checks.append(ProbeCheck("memory", True, one.sentence, one.server, figures))
    return tuple(checks)


def hand_over(workspace: Workspace, *, to: str, previous: str, window_s: float) -> None:
    """The adapter `to` is about to be promoted: routes lead to it by now, and `previous` is kept for a rollback."""
    keep_for_rollback(workspace, previous, window_s)
    adapter_shelf(workspace.settings).drop(release_name(workspace.settings, to))


def keep_for_rollback(workspace: Workspace, release: str, window_s: float) -> None:
    """Keep the champion before loaded for so many seconds, so that going back to it takes one change of the routes.
    To be said before the promotion: killed between the two, nobody takes it away."""
    settings = workspace.settings
    shelf, name = adapter_shelf(settings), release_name(settings, release)
    if name in shelf.names() or release in server_book(settings).read():
        shelf.keep(name, time.time() + window_s, "champion before, for a rollback")


def keep_for_release(workspace: Workspace, release: str) -> None:
    """Keep a release that passed its probes loaded until its rollout begins."""
    settings = workspace.settings
    shelf, name = adapter_shelf(settings), release_name(settings, release)
    if name in shelf.names() or release in server_book(settings).read():
        shelf.keep(name, time.time() + RELEASING_S, "about to be rolled out")


def retire(workspace: Workspace, release: str, *, timeout_s: float = _IDLE_S) -> tuple[str, ...]:
    """Wait for a release's last answers, unload it on every server or stop its own, and forget it. Sentences about
    servers that did not answer: they come back without it.

    Raises `ConflictError` while a route leads to it or an evaluation asks it, `UnavailableError` when its last requests
    are not over after `timeout_s` seconds, or the gateway does not tell.
    """
    settings = workspace.settings
    routes, name = router(settings), release_name(settings, release)
    state = routes.state()
    if release in {one.release for one in state.targets()}:
        raise ConflictError(
            f"Release {short(release)} is not retired: it has {state.share(release)}% of the users.",
            hint="`sluice rollback` takes a canary off the routes; a stable release leaves when another is promoted.",
        )
    if release in server_book(settings).read():
        retire_server(workspace, release, timeout_s=timeout_s)
    routes.wait_idle(release, timeout_s=timeout_s)
    return _unload(workspace, name)


def retire_due(workspace: Workspace) -> tuple[str, ...]:
    """Retire every adapter and every release's server that nobody needs; a sentence for each, also for one that cannot
    go yet.

    Called by `sluice up`, by the end of a release, and when a slot is needed. Raises `UnavailableError` without routes
    or ledger: then nobody knows what is needed.
    """
    settings = workspace.settings
    shelf = adapter_shelf(settings)
    _keep_latest_champion(workspace)
    stop_strangers(workspace)
    held = holders(workspace)
    known = _releases(workspace)
    told = [told for release in server_book(settings).read() if (told := _retire_server(workspace, release, held))]
    for name in _loaded_names(workspace):
        if name in held:
            continue
        why = shelf.kept().get(name, (0.0, "nothing leads to it"))[1]
        try:
            if name in known:
                router(settings).wait_idle(known[name], timeout_s=_IDLE_S)
            told.append(f"{name} was retired ({why}). {' '.join(_unload(workspace, name, unneeded=True))}".strip())
        except (ConflictError, UnavailableError) as error:
            told.append(f"{name} stays loaded for now: {error.message}")
    return tuple(told)


def _retire_server(workspace: Workspace, release: str, held: Mapping[str, str]) -> str:
    """What became of a server that nobody needs, or nothing."""
    settings = workspace.settings
    name = release_name(settings, release)
    with adapter_shelf(settings).unused(name) as free:
        routed = {one.release for one in router(settings).state().targets()}
        if not free or release in routed or name in held or name in needed(workspace):
            return ""
        try:
            retire_server(workspace, release, timeout_s=_IDLE_S)
        except (ConflictError, UnavailableError) as error:
            return f"The server of {name} runs on for now: {error.message}"
        return f"The server of {name} was stopped."


def bring_back(workspace: Workspace) -> None:
    """Load the release that a rollback of the last promotion would go to, where it was retired already.

    A server that holds it is asked nothing more, one that does not answer is passed over: the gateway decides, and
    `sluice up` loads. Raises what loading raises: users are not sent to a release that is not there.
    """
    from sluice.components.champion import base_digest

    settings = workspace.settings
    routes = router(settings)
    earlier = [one for one in routes.previous() if not routes.refusal(one.release)]
    if not earlier or earlier[-1].dedicated:
        return
    without = []
    for client in servers(settings):
        try:
            if earlier[-1].served_name not in {model.name for model in client.models()}:
                without.append(client)
        except UnavailableError:
            continue
    if without:
        try:
            ensure_loaded(workspace, earlier[-1].release, base_digest(workspace), without)
        except SluiceError as error:
            raise UnavailableError(
                f"{earlier[-1].served_name}, the champion before, was retired and cannot be loaded: {error.message}",
                hint=error.hint,
            ) from error


def _unload(workspace: Workspace, name: str, *, unneeded: bool = False) -> tuple[str, ...]:
    """Raises `ConflictError` when a rollback led users to it meanwhile, or, with `unneeded`, when anybody needs it."""
    shelf = adapter_shelf(workspace.settings)
    with shelf.unused(name) as free:
        if not free:
            raise ConflictError(f"{name} is asked by an evaluation.", hint="It leaves when that has ended.")
        if name in {one.served_name for one in router(workspace.settings).state().targets() if not one.dedicated}:
            raise ConflictError(f"{name} got a route again just now: it stays loaded.")
        if unneeded and (needs := needed(workspace).get(name)):
            raise ConflictError(f"{name} is needed again: {needs}.")
        return unload_adapter(servers(workspace.settings), shelf, name)


def _loaded_names(workspace: Workspace) -> list[str]:
    """Served names of this application's adapters, on the shelf or on a server that answers."""
    settings = workspace.settings
    names = set(adapter_shelf(settings).names())
    for client in servers(settings):
        try:
            names |= {model.name for model in client.models() if model.parent is not None}
        except UnavailableError:
            continue
    return sorted(name for name in names if name.startswith(f"{settings.application}-"))


def _releases(workspace: Workspace) -> dict[str, str]:
    """Every release that may ever have had users, by served name."""
    decided = (entry.body["adapter"] for entry in read_state(workspace.ledger).entries if entry.kind == "decision")
    return {release_name(workspace.settings, release): release for release in decided}


def _champions_before(workspace: Workspace) -> list[str]:
    """Releases that users may go back to, latest last."""
    routes = router(workspace.settings)
    return [one.release for one in routes.previous() if not routes.refusal(one.release)]


def _keep_latest_champion(workspace: Workspace) -> None:
    """The champion before has an end of its rollback window, also where the promotion was killed before it said so."""
    shelf = adapter_shelf(workspace.settings)
    for release in _champions_before(workspace)[-1:]:
        if release_name(workspace.settings, release) not in shelf.kept():
            keep_for_rollback(workspace, release, default_policy().rollback_window_s)


def _spare_champions(workspace: Workspace) -> list[str]:
    """Earlier champions that are loaded still and that the next rollback would not go to, oldest first."""
    shelf, state = adapter_shelf(workspace.settings), router(workspace.settings).state()
    routed = {one.release for one in state.targets()}
    own = server_book(workspace.settings).read()
    return [
        release
        for release in _champions_before(workspace)[:-1]
        if release not in {*routed, *own} and release_name(workspace.settings, release) in shelf.names()
    ]
