"""Users move to the release step by step, while it is no worse than the champion."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
from typing import NamedTuple

from sluice.components.task import Task, component


@component
def canary(adapter: str, policy: str, allow_override: bool) -> NamedTuple("Outputs", [("outcome", str)]):  # type: ignore[valid-type]
    """Roll out with analysis. Ends with `promote` or `failed`; on failure everybody is back already."""
    from sluice.components.canary import canary_step
    from sluice.components.task import task

    with task("canary") as running:
        outcome = canary_step(running, adapter=adapter, policy=policy, allow_override=allow_override)
    return (outcome,)


def canary_step(running: Task, *, adapter: str, policy: str, allow_override: bool) -> str:
    """`promote` or `failed`. Killed at any moment, running again goes on, and never past a failure."""
    from sluice.components.champion import current_champion
    from sluice.components.rollout import open_rollout, rollout_store

    if current_champion(running.workspace) == adapter:
        running.say("promoted already")
        return "promote"
    rollout = open_rollout(
        running.workspace, adapter, policy=policy, allow_override=allow_override, report=running.report
    )
    with rollout_store(running.workspace).exclusive(running.report):
        result = rollout.run()
    running.state.values["timeline"] = [vars(event) for event in result.events]
    running.state.values["verdict"] = result.verdict
    running.say(result.sentence)
    return result.verdict
