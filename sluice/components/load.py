"""An approved adapter is brought up beside the champion and probed, with no user on it."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
from typing import NamedTuple

from sluice.components.task import Task, component


@component
def load(adapter: str, policy: str, allow_override: bool) -> NamedTuple(  # type: ignore[valid-type]
    "Outputs", [("digest", str), ("previous", str)]
):
    """Ask the ledger for leave, load the verified adapter under its immutable name, probe it."""
    from sluice.components.load import load_step
    from sluice.components.task import task

    with task("load") as running:
        previous = load_step(running, adapter=adapter, policy=policy, allow_override=allow_override)
    return (adapter, previous)


def load_step(running: Task, *, adapter: str, policy: str, allow_override: bool) -> str:
    """Digest of the champion that the adapter is to replace. Raises `GateRefused` without leave or a passed probe."""
    from sluice.components.champion import base_digest, current_champion
    from sluice.components.rollout import find_policy, rollout_store
    from sluice.components.served import adapter_shelf, ensure_loaded, release_name, vllm_url
    from sluice.infra.errors import GateRefused
    from sluice.provenance.canonical import require_digest, short
    from sluice.provenance.releases import authorize, read_state, record_failure
    from sluice.serving.adapters import unload_adapter
    from sluice.serving.probes import record_answers, run_probes
    from sluice.serving.vllm import VllmClient

    workspace = running.workspace
    settings = workspace.settings
    require_digest(adapter, "adapter")
    champion = current_champion(workspace)
    if champion == adapter:
        # The promotion is in the ledger: a run that goes on after a crash has only the end left to do.
        running.say(f"{short(adapter)} is the champion")
        history = read_state(workspace.ledger).previous_champions()
        return history[0] if history else adapter
    begun = rollout_store(workspace).load(adapter)
    if begun is not None and begun.phase not in ("probing", "promoted"):
        # Its users are the rollout's business, and so is everything that may end it: leave that was taken back, or a
        # failure that is not cleared away. Refusing here would leave users on it with nobody watching.
        if not read_state(workspace.ledger).failed(adapter):
            ensure_loaded(workspace, adapter, base_digest(workspace), VllmClient(vllm_url(settings)))
        running.say(f"the rollout of {short(adapter)} goes on ({begun.phase})")
        return champion
    authorize(workspace.ledger, adapter, allow_override=allow_override and settings.release.allow_override)
    chosen = find_policy(policy).probes
    base = base_digest(workspace)
    client = VllmClient(vllm_url(settings))
    names = {model.name for model in client.models()}
    candidate, base_name = release_name(settings, adapter), release_name(settings, base)
    before = record_answers(client, base_name, chosen) if candidate not in names else None
    ensure_loaded(workspace, adapter, base, client)
    report = run_probes(
        client,
        candidate=candidate,
        stable=release_name(settings, champion),
        base=base_name,
        policy=chosen,
        base_before=before,
        report=running.report,
    )
    running.state.values["probes"] = report.to_json()
    if not report.passed:
        record_failure(workspace.ledger, release=adapter, reason=f"probe: {report.sentence}", actor="release")
        unload_adapter(client, adapter_shelf(settings), candidate)
        raise GateRefused(
            f"Release {short(adapter)} failed its probes before any user saw it: {report.sentence}",
            hint="The champion answers all traffic, as before.",
        )
    running.say(f"{candidate}: {len(report.checks)} probes passed")
    return champion
