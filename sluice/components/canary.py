"""Users move to the release step by step, while it is no worse than the champion."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
from typing import NamedTuple

from sluice.components.task import Task, component


@component
def canary(adapter: str, policy: str, allow_override: bool) -> NamedTuple("Outputs", [("outcome", str)]):  # type: ignore[valid-type]
    """Roll out with analysis. Ends with `promote`, `failed` or `inconclusive`; then everybody is back already."""
    from sluice.components.canary import canary_step
    from sluice.components.task import task

    with task("canary") as running:
        outcome = canary_step(running, adapter=adapter, policy=policy, allow_override=allow_override)
    return (outcome,)


def canary_step(running: Task, *, adapter: str, policy: str, allow_override: bool) -> str:
    """`promote`, `failed` or `inconclusive`. Killed at any moment, running again goes on, and never past a failure."""
    from sluice.components.champion import current_champion
    from sluice.components.rollout import find_policy, open_rollout, rollout_store
    from sluice.components.rollout_facts import keep_policy

    workspace = running.workspace
    # While a rollout is under way the gateway alone counts: a ledger that does not answer must not leave users on a
    # canary that nobody watches.
    saved = rollout_store(workspace).load(adapter)
    if not (saved and saved.goes_on) and current_champion(workspace) == adapter:
        running.say("promoted already")
        return "promote"
    keep_policy(workspace.settings, adapter, find_policy(policy))
    with open_rollout(
        workspace, adapter, policy=policy, allow_override=allow_override, report=running.report
    ) as rollout:
        result = rollout.run()
    running.state.values["timeline"] = [event.to_json() for event in result.events]
    running.state.values["verdict"] = result.verdict
    running.say(result.sentence)
    return result.verdict
