"""Servers of single releases, wired to this installation: brought up with a merged model, kept, drained and stopped.

Used where `serving.mode` is `merged`. Every release that users or a rollback may reach has one, the base model too; the
shared server stays for evaluation and judges, which load what has no users yet.
"""

from __future__ import annotations

from datetime import UTC, datetime

import psutil

from sluice.components.champion import base_digest, current_champion
from sluice.components.merge import merge_release
from sluice.components.served import release_name, router, server_book, server_url, target
from sluice.components.workspace import Workspace
from sluice.infra.errors import ConflictError, UnavailableError
from sluice.infra.ports import PortBook
from sluice.infra.processes import ServiceSpec, Supervisor
from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import short
from sluice.provenance.releases import read_state
from sluice.provenance.times import parse_time
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
    if release not in server_book(settings).read():
        return
    routes = router(settings)
    if release in {one.release for one in routes.state().targets()}:
        raise ConflictError(f"The release {short(release)} still has a route: its server is not stopped.")
    routes.wait_idle(release, timeout_s=timeout_s)
    with VllmClient(server_url(settings, release)) as client:
        # The gateway drops a cluster without a route, and its count with it; and not everybody comes through it.
        if client.healthy():
            client.wait_idle(timeout_s=timeout_s)
    server_book(settings).forget(release)
    # A rollback that comes from now on finds its adapter at the shared server.
    routes.relocate(lambda one: target(settings, one))
    _stop(workspace, Supervisor(settings.home), release, report)


def server_parts(workspace: Workspace, report: Report = no_report) -> list[ServiceSpec]:
    """The servers that `sluice up` brings up. Call it while the supervisor is held, with the object store up.

    In mode `merged` those of every release that users or a rollback may reach. In mode `adapters` those that still
    have users, until their adapters answer for them (`give_up_servers`).
    """
    settings = workspace.settings
    known = server_book(settings).read()
    wanted = _reachable(workspace)
    if settings.serving.mode == "adapters":
        wanted &= known.keys()
    else:
        # What was rolled forward from before the servers: its adapter is on the shelf, and a rollback finds it there.
        wanted = {one for one in wanted if one in known or one in _routed(workspace)}
    models = {release: _model(workspace, release, report) for release in sorted(wanted)}
    return _specs(workspace, Supervisor(settings.home), models)


def retire_servers(
    workspace: Workspace, window_s: float, report: Report = no_report, *, strangers: bool = False
) -> list[str]:
    """Stop the servers of releases that failed, and of champions before once `window_s` seconds have passed since: no
    user and no rollback reaches them. A sentence for each that could not be stopped.

    `strangers`: also servers of releases that never got as far. Only when nobody is bringing one up.
    """
    settings = workspace.settings
    supervisor = Supervisor(settings.home)
    with supervisor.exclusive(report):
        known = server_book(settings).read()
        own = {part_name(release) for release in known}
        strange = [
            name for spec in supervisor.roster.read() if is_release_server(name := spec.name) and name not in own
        ]
        if strange:
            supervisor.remove(strange, report)
            PortBook(settings.home, {}).forget(strange)
    state = read_state(workspace.ledger)
    over = {one.release for one in state.reigns()} | {one for one in known if state.failed(one)}
    left = []
    for release in known.keys() - _reachable(workspace, window_s):
        if strangers or release in over:
            try:
                retire_server(workspace, release, report)
            except (UnavailableError, ConflictError) as error:
                left.append(f"The server of {short(release)} still runs: {error.message}")
    return left


def give_up_servers(workspace: Workspace) -> None:
    """From now on every release is reached at the shared server: mode `adapters` again. Routes follow `target`."""
    book = server_book(workspace.settings)
    for release in book.read():
        book.forget(release)


def _routed(workspace: Workspace) -> set[str]:
    try:
        routed = {one.release for one in router(workspace.settings).state().targets()}
    except UnavailableError:
        routed = set()
    return routed | {current_champion(workspace)}


def _reachable(workspace: Workspace, window_s: float | None = None) -> set[str]:
    """Releases that users reach, or that a rollback leads to; with `window_s`, those of them that ended so long ago are
    left out."""
    routes = router(workspace.settings)
    earlier = {one.release for one in routes.previous() if not routes.refusal(one.release)}
    if window_s is not None:
        now = datetime.now(UTC)
        ended = {
            one.release: parse_time(one.until, "until") for one in read_state(workspace.ledger).reigns() if one.until
        }
        earlier = {one for one in earlier if one in ended and (now - ended[one]).total_seconds() <= window_s}
    return _routed(workspace) | earlier


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
