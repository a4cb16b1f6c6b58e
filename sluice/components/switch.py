"""The application's alias moves to the new index, if the gate passed it."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
import json

from kfp import dsl

from sluice.components.task import Task, component
from sluice.provenance.canonical import short


@component
def switch(index: dsl.Input[dsl.Artifact], collection: str, decision: dsl.Input[dsl.Artifact], verdict: str) -> str:
    """Switch the alias, by compare-and-swap on what the gate compared with. Returns what happened, one word."""
    from sluice.components.switch import switch_step
    from sluice.components.task import digest_of, task

    with task("switch") as running:
        return switch_step(
            running, index=digest_of(index), collection=collection, decision=digest_of(decision), verdict=verdict
        )


def switch_step(running: Task, *, index: str, collection: str, decision: str, verdict: str) -> str:
    """`switched`, `live` (it was already) or `refused` (the gate did not pass it, the live index stays)."""
    from sluice.components.index_alias import find_index, point_at, vectors_uri
    from sluice.components.index_version import show_index
    from sluice.rag.gate import GateResult
    from sluice.rag.milvus import collection_name
    from sluice.rag.switch import switch

    workspace = running.workspace
    application = workspace.settings.application
    running.state.values.update(index=index, collection=collection, verdict=verdict)
    running.state.outputs["index"] = index
    decided = json.loads(workspace.file(decision, "decision.json"))
    live = find_index(workspace)

    def shown(now: str | None) -> None:
        running.state.values["registry"] = show_index(
            workspace, index=index, decision=decision, result=decided, live=now
        )

    if live == index:
        point_at(workspace, index)
        running.state.hit = True
        shown(live)
        running.say(f"{collection} is live")
        return "live"
    if verdict != "pass":
        shown(live)
        running.say(f"refused by the gate ({verdict}); the live index stays")
        return "refused"
    result = GateResult.from_json(decided)
    expected = collection_name(application, result.current) if result.current else None
    switch(vectors_uri(workspace), application, collection, result, expected=expected)
    point_at(workspace, index)
    shown(index)
    running.say(f"queries go to {collection} ({short(index)})")
    return "switched"
