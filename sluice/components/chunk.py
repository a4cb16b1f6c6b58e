"""Documents cut into passages."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
import json
from dataclasses import asdict
from pathlib import Path

from kfp import dsl

from sluice.components.task import Task, component
from sluice.provenance.steps import StepOutput


@component
def chunk(corpus: dsl.Input[dsl.Dataset], chunks: dsl.Output[dsl.Dataset]) -> None:
    """Cut the documents at headings and paragraphs."""
    from sluice.components.chunk import chunk_step
    from sluice.components.task import digest_of, publish, task

    with task("chunk") as running:
        publish(chunks, chunk_step(running, corpus=digest_of(corpus)), kind="chunks")


def chunk_step(running: Task, *, corpus: str) -> str:
    """Digest of the chunks of a corpus."""
    from sluice.rag.chunk import ChunkerSettings

    settings = ChunkerSettings()

    def cut(folder: Path) -> StepOutput:
        from sluice.rag.chunk import chunk_documents
        from sluice.rag.corpus import read_documents

        found = chunk_documents(read_documents(running.workspace.folder(corpus)), settings)
        with (folder / "chunks.jsonl").open("w", encoding="utf-8") as stream:
            for one in found:
                stream.write(json.dumps(asdict(one), ensure_ascii=False, sort_keys=True) + "\n")
        manifest = running.workspace.artifacts.put_directory(
            folder, "chunks", {"corpus": corpus, "chunker": settings.digest}
        )
        return StepOutput({"chunks": manifest.digest}, {"chunks": len(found)})

    record = running.step(
        "chunk", rooms=("rag.chunk",), parameters={"chunker": settings.digest}, inputs={"corpus": corpus}, function=cut
    )
    running.say(f"{record.output.values['chunks']} chunks")
    return record.output.artifacts["chunks"]
