"""A release on every server, and shown to be what was trained, before any user sees it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sluice.components.parity_reference import reference_step
from sluice.components.release_servers import bring_up_server
from sluice.components.retiring import keep_for_release, make_room, retire
from sluice.components.served import (
    adapter_shelf,
    ensure_loaded,
    load_verified,
    release_name,
    router,
    servers,
)
from sluice.components.task import Task
from sluice.components.verification import require_base, verify_release
from sluice.components.workspace import Workspace
from sluice.infra.errors import ConflictError, GateRefused, IntegrityError, UnavailableError
from sluice.provenance.canonical import hex_of, short
from sluice.provenance.releases import record_failure
from sluice.serving.durable import replace_file
from sluice.serving.probes import ProbeCheck, ProbeReport, Served, run_probes
from sluice.serving.vllm import Answer, VllmClient

if TYPE_CHECKING:
    from sluice.serving.policy import ProbePolicy


def bring_up(running: Task, *, adapter: str, champion: str, base: str, policy: ProbePolicy) -> ProbeReport:
    """Verify, make room, load on every server (or start the release's own), probe each, warm up; the report. The
    release stays there.

    Raises `IntegrityError` or `InputError` for an adapter that is not what was signed, or not for this base;
    `ConflictError` or `UnavailableError` where there is no room or a server does not load it (then none keeps it; it
    may be tried again); `GateRefused` when a probe failed: it is marked as failed, and taken away.
    """
    workspace = running.workspace
    settings = workspace.settings
    if adapter == base:
        raise GateRefused(
            "The base model alone is served always, and needs no bringing up.",
            hint="`sluice rollback` goes back to it where it was the champion before.",
        )
    verify_release(workspace, adapter)
    require_base(workspace, adapter, base)
    reference = reference_step(
        running, adapter=adapter, base=base, prompts=policy.prompts, max_tokens=policy.max_tokens
    )
    clients = servers(settings, timeout_s=policy.timeout_s)
    place = _at_its_own_server if settings.serving.mode == "merged" else _beside_the_others
    # Killed in here, nobody needs it any more, and it is retired.
    with adapter_shelf(settings).in_use(release_name(settings, adapter)):
        placed = place(running, adapter, base, clients, policy)
        probed = run_probes(
            placed.replicas,
            stable=_champion(workspace, champion, base, clients),
            bases=placed.bases,
            policy=policy,
            reference=reference,
            parity_within=getattr(policy.parity_within, settings.serving.dtype),
            before=placed.before,
            report=running.report,
        )
        if probed.passed:
            keep_for_release(workspace, adapter)
    report = ProbeReport(release_name(settings, adapter), (*placed.room, *probed.checks))
    _keep(workspace, adapter, report)
    running.state.values["probes"] = report.to_json()
    if not report.passed:
        _end(workspace, adapter, report)
    return report


def ensure_served(workspace: Workspace, release: str, base: str) -> None:
    """A release whose rollout goes on is where the routes have it. Raises what loading it raises."""
    if workspace.settings.serving.mode == "merged":
        bring_up_server(workspace, release)
    else:
        ensure_loaded(workspace, release, base, servers(workspace.settings))


@dataclass(frozen=True)
class _Placed:
    """A release at each of its servers; the checks on the way; the base models beside it, and what they said before."""

    replicas: tuple[Served, ...]
    room: tuple[ProbeCheck, ...]
    bases: tuple[Served, ...]
    before: tuple[tuple[Answer, ...], ...] = ()


def _beside_the_others(
    running: Task, adapter: str, base: str, clients: tuple[VllmClient, ...], policy: ProbePolicy
) -> _Placed:
    """The adapter on every shared server."""
    workspace = running.workspace
    candidate, base_name = (release_name(workspace.settings, one) for one in (adapter, base))
    room = make_room(workspace, adapter, clients)
    bases = tuple(Served(client, base_name) for client in clients)
    fresh = all(candidate not in {model.name for model in client.models()} for client in clients)
    before = tuple(one.answers(policy) for one in bases) if fresh else ()
    load_verified(workspace, adapter, base, clients)
    return _Placed(tuple(Served(client, candidate) for client in clients), room, bases, before)


def _at_its_own_server(
    running: Task, adapter: str, base: str, clients: tuple[VllmClient, ...], policy: ProbePolicy
) -> _Placed:
    """The merged model in a server of its own, which has its memory, or does not come up."""
    settings = running.workspace.settings
    target = bring_up_server(running.workspace, adapter, running.report)
    replicas = (
        Served(VllmClient(f"http://{upstream}", timeout_s=policy.timeout_s), target.served_name)
        for upstream in target.upstreams
    )
    return _Placed(tuple(replicas), (), (Served(clients[0], release_name(settings, base)),))


def kept_probes(workspace: Workspace, release: str) -> ProbeReport | None:
    """The report of the release's bringing up, for its rollout's events; None before it was brought up here."""
    path = _path(workspace, release)
    try:
        return ProbeReport.from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"The report of the probes {str(path)!r} is damaged: {error}.",
            hint="Remove it, and release again.",
        ) from error


def _champion(workspace: Workspace, champion: str, base: str, clients: tuple[VllmClient, ...]) -> Served:
    """The champion where it is served: beside the candidate, or at a server of its own."""
    settings = workspace.settings
    known = next((one for one in router(settings).state().targets() if one.release == champion), None)
    if known is not None and known.dedicated:
        return Served(VllmClient(f"http://{known.upstreams[0]}"), known.served_name)
    # One that is missing (its server was restarted) would be taken for a failure of the candidate.
    return Served(clients[0], ensure_loaded(workspace, champion, base, clients))


def _end(workspace: Workspace, adapter: str, report: ProbeReport) -> None:
    """No user saw it, and none will."""
    settings = workspace.settings
    record_failure(workspace.ledger, release=adapter, reason=f"probe: {report.sentence}", actor="release")
    routes = router(settings)
    canary = routes.state().canary
    if canary is not None and canary.release == adapter:
        routes.rollback(f"probe: {report.sentence}")
    adapter_shelf(settings).drop(release_name(settings, adapter))
    try:
        left: tuple[str, ...] = retire(workspace, adapter)
    except (ConflictError, UnavailableError) as error:
        left = (f"It is still loaded: {error.message} `sluice up` retires it.",)
    raise GateRefused(
        f"Release {short(adapter)} failed its probes before any user saw it: {report.sentence}",
        hint=" ".join(("The champion answers all traffic, as before.", *left)),
    )


def _keep(workspace: Workspace, release: str, report: ProbeReport) -> None:
    replace_file(_path(workspace, release), json.dumps(report.to_json(), indent=1))


def _path(workspace: Workspace, release: str) -> Path:
    return workspace.settings.home / "probes" / f"{hex_of(release)}.json"
