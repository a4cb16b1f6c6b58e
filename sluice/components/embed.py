"""Chunks and their vectors: the index as an artifact."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
import json
from pathlib import Path

from kfp import dsl

from sluice.components.task import Task, component
from sluice.provenance.steps import StepOutput


@component
def embed(corpus: dsl.Input[dsl.Dataset], chunks: dsl.Input[dsl.Dataset], index: dsl.Output[dsl.Artifact]) -> None:
    """Embed the chunks."""
    from sluice.components.embed import embed_step
    from sluice.components.task import digest_of, publish, task

    with task("embed") as running:
        publish(index, embed_step(running, corpus=digest_of(corpus), chunks=digest_of(chunks)), kind="index")


def embed_step(running: Task, *, corpus: str, chunks: str) -> str:
    """Digest of the index artifact."""
    from sluice.rag.embed import MiniLmEmbedder

    embedder = MiniLmEmbedder()

    def work(folder: Path) -> StepOutput:
        from sluice.rag.chunk import Chunk
        from sluice.rag.index import write_index

        workspace = running.workspace
        lines = workspace.file(chunks, "chunks.jsonl").decode().split("\n")
        cut = [Chunk(**json.loads(line)) for line in lines if line]
        chunker = str(workspace.artifacts.manifest(chunks).metadata["chunker"])
        content = write_index(folder, cut, embedder, corpus=corpus, chunker=chunker, report=running.report)
        manifest = workspace.artifacts.put_directory(folder, "index", content.metadata)
        return StepOutput({"index": manifest.digest}, {"chunks": len(cut)})

    record = running.step(
        "embed",
        rooms=("rag.embed", "rag.index"),
        parameters={"embedder": embedder.digest},
        inputs={"corpus": corpus, "chunks": chunks},
        function=work,
    )
    running.say(f"{record.output.values['chunks']} vectors")
    return record.output.artifacts["index"]
