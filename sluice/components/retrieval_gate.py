"""Does the new index find what it should, and no worse than the live one?"""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
from pathlib import Path

from kfp import dsl

from sluice.components.task import Task, component
from sluice.provenance.canonical import canonical_json
from sluice.provenance.steps import StepOutput


@component
def retrieval_gate(index: dsl.Input[dsl.Artifact], collection: str, decision: dsl.Output[dsl.Artifact]) -> str:
    """Compare on labelled questions. Returns the verdict, one word."""
    from sluice.components.retrieval_gate import retrieval_gate_step
    from sluice.components.task import digest_of, publish, task

    with task("retrieval-gate") as running:
        digest, verdict = retrieval_gate_step(running, index=digest_of(index), collection=collection)
        publish(decision, digest, kind="decision")
    return verdict


def retrieval_gate_step(running: Task, *, index: str, collection: str) -> tuple[str, str]:
    """Digest of the decision, and its verdict."""
    from sluice.components.index_alias import find_index, vectors_uri

    workspace = running.workspace
    current = find_index(workspace)
    compared = current if current != index else None

    def work(_: Path) -> StepOutput:
        from sluice.rag.gate import judge, measure
        from sluice.rag.index import read_index
        from sluice.rag.milvus import alias_name
        from sluice.rag.queries import faq_queries
        from sluice.rag.retrieve import Retriever

        uri = vectors_uri(workspace)
        queries = faq_queries(read_index(workspace.folder(index)).chunks)
        candidate = measure(Retriever(uri, collection), queries, running.report)
        live = alias_name(workspace.settings.application)
        present = measure(Retriever(uri, live), queries, running.report) if compared else None
        result = judge(candidate, present)
        files = {"decision.json": canonical_json(result.to_json())}
        manifest = workspace.artifacts.put_files(files, "decision", {"candidate": index, "verdict": result.verdict})
        return StepOutput(
            {"decision": manifest.digest},
            {"verdict": result.verdict, "metrics": dict(result.metrics), "queries": result.queries},
        )

    record = running.step(
        "retrieval-gate",
        rooms=("rag", "statistics", "components.retrieval_gate"),
        parameters={},
        inputs={"index": index, **({"current": compared} if compared else {})},
        function=work,
    )
    values = record.output.values
    shown = ", ".join(f"{name} {value:.3f}" for name, value in sorted(values["metrics"].items()))
    running.say(f"{values['verdict']}: {shown} on {values['queries']} questions")
    return record.output.artifacts["decision"], str(values["verdict"])
