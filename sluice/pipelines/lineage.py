"""One query in both directions: from an answer to the traces behind it, and from a trace to all that saw it."""

from __future__ import annotations

import re

from sluice.components.workspace import Workspace
from sluice.infra.errors import InputError
from sluice.provenance.lineage import LineageGraph, Node

_TRACE = re.compile(r"^(tr-)?[0-9a-f]{32}$")


def find_lineage(workspace: Workspace, subject: str, *, reverse: bool = False) -> Node:
    """The tree of a digest, a version's number or an answer's trace id. Raises `InputError` for anything else."""
    graph = LineageGraph.load(workspace.objects, workspace.artifacts)
    if _TRACE.match(subject):
        trace = subject.removeprefix("tr-")
        return graph.descendants(trace) if reverse else answer_lineage(workspace, graph, trace)
    if subject.isdigit():
        from sluice.pipelines.approvals import registry_of
        from sluice.registry.versions import get_version

        subject = get_version(registry_of(workspace), workspace.settings.application, int(subject)).digest
    if not re.match(r"^sha256:[0-9a-f]{64}$", subject):
        raise InputError(
            f"SUBJECT = {subject!r} is neither a digest, a version's number nor a trace id.",
            hint="A digest is sha256: and 64 hex digits, a trace id 32 hex digits.",
        )
    return graph.descendants(subject) if reverse else graph.ancestors(subject)


def answer_lineage(workspace: Workspace, graph: LineageGraph, trace: str) -> Node:
    """What one answer came from: the release that gave it, and the index its passages are from."""
    from sluice.curation.trace_store import open_trace_store

    records = list(open_trace_store(workspace.settings).traces_by_id([trace]))
    if not records:
        raise InputError(
            f"There is no trace {trace!r} in the trace store.", hint="Was it deleted, or not exported yet?"
        )
    record = records[0]
    children = [graph.ancestors(digest) for digest in (record.release, record.index_digest) if digest]
    return Node("trace", f"answer of {trace}", trace, tuple(children))
