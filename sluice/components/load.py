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
    """Digest of the champion that the adapter is to replace. Raises `GateRefused` without leave or a passed probe, and
    what `bring_up` raises."""
    from contextlib import suppress

    from sluice.components.bring_up import bring_up, ensure_served
    from sluice.components.champion import base_digest, current_champion
    from sluice.components.rollout import find_policy, rollout_store
    from sluice.infra.errors import UnavailableError
    from sluice.provenance.canonical import require_digest, short
    from sluice.provenance.releases import authorize, read_state

    workspace = running.workspace
    settings = workspace.settings
    require_digest(adapter, "adapter")
    begun = rollout_store(workspace).load(adapter)
    if begun is not None and begun.goes_on:
        # Its users are the rollout's business, and so is everything that may end it: leave that was taken back, or a
        # failure that is not cleared away. Refusing here, or waiting for stores that do not answer, would leave users
        # on it with nobody watching.
        with suppress(UnavailableError):
            if begun.phase not in ("withdrawing", "failing", "failed"):
                ensure_served(workspace, adapter, base_digest(workspace))
        running.say(f"the rollout of {short(adapter)} goes on ({begun.phase})")
        return begun.stable.release
    champion = current_champion(workspace)
    if champion == adapter:
        # The promotion is in the ledger: a run that goes on after a crash has only the end left to do.
        running.say(f"{short(adapter)} is the champion")
        history = read_state(workspace.ledger).previous_champions()
        return history[0] if history else adapter
    authorize(workspace.ledger, adapter, allow_override=allow_override and settings.release.allow_override)
    chosen = find_policy(policy).probes
    report = bring_up(running, adapter=adapter, champion=champion, base=base_digest(workspace), policy=chosen)
    running.say(f"{report.served_name}: {len(report.checks)} probes passed")
    return champion
