"""The corpus as it is now."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
from pathlib import Path

from kfp import dsl

from sluice.components.task import Task, component
from sluice.provenance.steps import StepOutput


@component
def snapshot(source: str, corpus: dsl.Output[dsl.Dataset]) -> None:
    """Snapshot the documents: `faq` is the bundled FAQ, anything else a folder of Markdown or text."""
    from sluice.components.snapshot import snapshot_step
    from sluice.components.task import publish, task

    with task("snapshot") as running:
        publish(corpus, snapshot_step(running, source=source), kind="corpus")


def snapshot_step(running: Task, *, source: str) -> str:
    """Digest of the corpus. The snapshot itself is always taken: only it knows whether anything changed."""
    import tempfile

    from sluice.rag.corpus import snapshot_directory, snapshot_faq

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        taken = snapshot_faq(folder) if source == "faq" else snapshot_directory(Path(source), folder)
        metadata = taken.metadata

        def keep(_: Path) -> StepOutput:
            manifest = running.workspace.artifacts.put_directory(folder, "corpus", metadata)
            return StepOutput({"corpus": manifest.digest}, {"documents": taken.documents})

        record = running.step(
            "snapshot",
            rooms=("rag.corpus", "components.snapshot"),
            parameters={"source": source, "content": taken.digest},
            inputs={},
            function=keep,
        )
    running.say(f"{taken.documents} documents")
    return record.output.artifacts["corpus"]
