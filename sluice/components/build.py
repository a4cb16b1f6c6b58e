"""The index in Milvus: a collection of its own beside the live one."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
from kfp import dsl

from sluice.components.task import Task, component


@component
def build(index: dsl.Input[dsl.Artifact]) -> str:
    """Build and verify the index's collection; a complete one is left alone. Returns its name."""
    from sluice.components.build import build_step
    from sluice.components.task import digest_of, task

    with task("build") as running:
        return build_step(running, index=digest_of(index))


def build_step(running: Task, *, index: str) -> str:
    """Name of the verified collection. Milvus is asked every time: its rows may be gone while the record stays."""
    from sluice.components.index_alias import vectors_uri
    from sluice.rag.build import build_index

    workspace = running.workspace
    built = build_index(
        vectors_uri(workspace), workspace.settings.application, workspace.folder(index), index, running.report
    )
    running.state.hit = built.hit
    running.say(f"{built.rows} rows in {built.collection}, {built.inserted} inserted, verified")
    return built.collection
