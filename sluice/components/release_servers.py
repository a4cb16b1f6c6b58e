"""Servers of single releases, wired to this installation: brought up with a merged model, kept, drained and stopped.

Used where `serving.mode` is `merged`. Every release that users or a rollback may reach has one, the base model too; the
shared server stays for evaluation and judges, which load what has no users yet.
"""

from __future__ import annotations

from collections.abc import Collection

import psutil

from sluice.components.champion import base_digest, current_champion
from sluice.components.merge import merge_release
from sluice.components.served import (
    adapter_shelf,
    local_router,
    release_name,
    server_book,
    server_url,
    target,
)
from sluice.components.workspace import Workspace
from sluice.infra.errors import ConflictError, UnavailableError
from sluice.infra.ports import PortBook
from sluice.infra.processes import ServiceSpec, Supervisor
from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import short
from sluice.serving.routes import Target
from sluice.serving.servers import is_release_server, memory_needed, part_name, release_service, require_memory
from sluice.serving.vllm import VllmClient, VllmSettings

DRAIN_S = 60.0


def bring_up_server(workspace: Workspace, release: str, report: Report = no_report) -> Target:
    """Make a server of its own serve this release, also after a restart of everything; where the gateway reaches it.

    A release that has one is asked nothing: coming back must not depend on keys or stores. For another one the adapter
    is verified and merged (once), and the memory that its server needs must be there. What does not come up is taken
    away again. Raises `UnavailableError`, `IntegrityError` or `GateRefused`.
    """
    settings = workspace.settings
    book = server_book(settings)
    known = release in book.read()
    supervisor = Supervisor(settings.home)
    model = _model(workspace, release, report)
    with supervisor.exclusive(report):
        [spec] = _specs(workspace, supervisor, {release: model})
        try:
            supervisor.up([spec], report, others="keep")
        except UnavailableError:
            if not known:
                _stop(workspace, supervisor, release, report)
            raise
    return target(settings, release)


def retire_server(
    workspace: Workspace, release: str, report: Report = no_report, *, timeout_s: float = DRAIN_S
) -> None:
    """Stop the server of a release after its last request, and give up its memory and port. Safe to repeat.

    A rollback that leads to it is sent to the shared server from then on, which must be given its adapter first.

    Raises `ConflictError` while the gateway routes to it, `UnavailableError` when requests still run after `timeout_s`
    seconds: it serves on then.
    """
    settings = workspace.settings
    book = server_book(settings)
    model = book.read().get(release)
    if model is None:
        return
    routes = local_router(settings)
    if release in {one.release for one in routes.state().targets()}:
        raise ConflictError(f"The release {short(release)} still has a route: its server is not stopped.")
    routes.wait_idle(release, timeout_s=timeout_s)
    with VllmClient(server_url(settings, release)) as client:
        # The gateway drops a cluster without a route, and its count with it; and not everybody comes through it.
        if client.healthy():
            client.wait_idle(timeout_s=timeout_s)
    book.forget(release)
    # A rollback that comes from now on finds its adapter at the shared server.
    state = routes.relocate(lambda one: target(settings, one))
    if release in {one.release for one in state.targets()}:
        book.remember(release, model)
        routes.relocate(lambda one: target(settings, one))
        raise ConflictError(f"The release {short(release)} got a route again just now: its server is not stopped.")
    adapter_shelf(settings).drop(release_name(settings, release))
    _stop(workspace, Supervisor(settings.home), release, report)


def server_parts(workspace: Workspace, held: Collection[str], report: Report = no_report) -> list[ServiceSpec]:
    """The servers that `sluice up` brings up. Call it while the supervisor is held, with the object store up.

    `held`: served names that somebody needs (`retiring.holders`). What has a server, and is needed or has users, gets
    it back; in mode `merged` every release that users reach gets one. In mode `adapters` the last of them go when their
    adapters answer (`give_up_servers`).
    """
    settings = workspace.settings
    known, routed = server_book(settings).read(), _routed(workspace)
    wanted = {one for one in known if one in routed or release_name(settings, one) in held}
    if settings.serving.mode == "merged":
        wanted |= routed
    models = {release: _model(workspace, release, report) for release in sorted(wanted)}
    return _specs(workspace, Supervisor(settings.home), models)


def stop_strangers(workspace: Workspace, report: Report = no_report) -> None:
    """Stop servers that are not in the book: their releases are reached elsewhere, or were being retired when somebody
    was killed."""
    settings = workspace.settings
    supervisor = Supervisor(settings.home)

    def strangers() -> list[str]:
        own = {part_name(release) for release in server_book(settings).read()}
        names = (spec.name for spec in supervisor.roster.read())
        found = [name for name in names if is_release_server(name) and name not in own]
        if found:
            # A damaged book is an empty one: a server that users or a rollback are led to is never a stranger.
            routes = local_router(settings)
            led_to = {
                part_name(one.release) for one in (*routes.state().targets(), *routes.previous()) if one.dedicated
            }
            found = [name for name in found if name not in led_to]
        return found

    if not strangers():
        return
    with supervisor.exclusive(report):
        # Again: one that is being brought up stands in the book before it is a part.
        if strange := strangers():
            supervisor.remove(strange, report)
            PortBook(settings.home, {}).forget(strange)


def give_up_servers(workspace: Workspace) -> None:
    """From now on every release is reached at the shared server: mode `adapters` again. Routes follow `target`."""
    book = server_book(workspace.settings)
    for release in book.read():
        book.forget(release)


def _routed(workspace: Workspace) -> set[str]:
    try:
        routed = {one.release for one in local_router(workspace.settings).state().targets()}
    except UnavailableError:
        routed = set()
    return routed | {current_champion(workspace)}


def _model(workspace: Workspace, release: str, report: Report) -> str:
    """Digest of what the release's server holds."""
    known = server_book(workspace.settings).read().get(release)
    if known is not None:
        return known
    base = base_digest(workspace)
    return base if release == base else merge_release(workspace, release, base, report).output.artifacts["model"]


def _specs(workspace: Workspace, supervisor: Supervisor, models: dict[str, str]) -> list[ServiceSpec]:
    """The servers' descriptions; each has its port and stands in the book. Raises `UnavailableError` without memory."""
    settings, book = workspace.settings, server_book(workspace.settings)
    serving = settings.serving
    running = {status.name for status in supervisor.status() if status.pid}
    available = psutil.virtual_memory().available
    specs = []
    for release, model in models.items():
        folder, part = workspace.folder(model), part_name(release)
        if part not in running:
            needed = memory_needed(folder, serving.kv_cache_gib)
            require_memory(release, needed, available)
            available -= needed
        ports = PortBook(settings.home, settings.ports.model_dump()).allocate((part,))
        vllm = VllmSettings(
            python=settings.serve_python,
            model=folder,
            base_name=release_name(settings, release),
            also_named=(settings.application,),
            shelf=None,
            port=ports[part],
            part=part,
            dtype=serving.dtype,
            max_model_len=serving.max_model_len,
            kv_cache_gib=serving.kv_cache_gib,
        )
        specs.append(release_service(vllm))
        book.remember(release, model)
    return specs


def _stop(workspace: Workspace, supervisor: Supervisor, release: str, report: Report) -> None:
    settings, part = workspace.settings, part_name(release)
    with supervisor.exclusive(report):
        server_book(settings).forget(release)
        supervisor.remove([part], report)
        PortBook(settings.home, {}).forget([part])
