"""Re-embedding as a pipeline: an index is built beside the live one, gated, and switched in like a release."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
from kfp import dsl

from sluice.components.build import build
from sluice.components.chunk import chunk
from sluice.components.embed import embed
from sluice.components.retrieval_gate import retrieval_gate
from sluice.components.snapshot import snapshot
from sluice.components.switch import switch
from sluice.pipelines.tasks import named


@dsl.pipeline(name="reembed", description="corpus snapshot, chunk, embed, build, retrieval gate, alias switch")  # type: ignore[untyped-decorator]
def reembed(source: str = "faq") -> None:
    corpus = named(snapshot(source=source), "snapshot").outputs["corpus"]
    chunks = named(chunk(corpus=corpus), "chunk").outputs["chunks"]
    index = named(embed(corpus=corpus, chunks=chunks), "embed").outputs["index"]
    collection = named(build(index=index), "build").output
    gated = named(retrieval_gate(index=index, collection=collection), "retrieval-gate")
    decided = {"decision": gated.outputs["decision"], "verdict": gated.outputs["Output"]}
    named(switch(index=index, collection=collection, **decided), "switch")
