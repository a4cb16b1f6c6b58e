"""One query in both directions: from an answer to the traces behind it, and from a trace, user or document to all
that saw it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sluice.components.champion import current_champion
from sluice.components.lineage import open_lineage, serving, with_decisions
from sluice.components.workspace import Workspace
from sluice.infra.errors import InputError
from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import is_digest
from sluice.provenance.lineage import SOURCES, LineageIndex, Node

_TRACE = re.compile(r"^(tr-)?[0-9a-f]{32}$")
_HINT = "A digest is sha256: and 64 hex digits, a trace id 32 hex digits; or write user:ID or document:ID."


@dataclass(frozen=True)
class Holder:
    """An artifact that holds content of a source, or was made from one that does. `serves` says how it reaches users
    now, in words; empty when it does not."""

    kind: str
    digest: str
    serves: str


@dataclass(frozen=True)
class Lineage:
    """The tree of a subject; with `reverse`, also each artifact that it went into."""

    tree: Node
    reverse: bool
    holders: tuple[Holder, ...] = ()

    def to_json(self) -> dict[str, Any]:
        tree: dict[str, Any] = asdict(self.tree)
        return tree | ({"holders": [asdict(one) for one in self.holders]} if self.reverse else {})


def find_lineage(
    workspace: Workspace,
    subject: str,
    *,
    reverse: bool = False,
    limit: int = 0,
    rebuild: bool = False,
    report: Report = no_report,
) -> Lineage:
    """The lineage of a digest, a version's number, `champion`, an answer's trace id, or with `reverse` of a user or
    document.

    At most `limit` traces are named under an artifact (0: all). `rebuild` reads the whole object store again first.
    Raises `InputError` for a subject that nobody knows.
    """
    index = open_lineage(workspace, report)
    if rebuild:
        index.rebuild(report)
    if subject == "champion":
        subject = current_champion(workspace)
    kind, identity = identify(workspace, index, subject)
    if reverse:
        tree = index.descendants(identity, kind)
        return Lineage(tree, True, holders(tree, serving(workspace)))
    if kind == "trace":
        tree = answer_lineage(workspace, index, identity, limit)
    elif kind:
        raise InputError(
            f"SUBJECT = {subject!r} is a {kind}: nothing of the chain lies behind it.",
            hint=f"`sluice lineage {subject} --reverse` shows what saw it.",
        )
    else:
        tree = index.ancestors(identity, limit)
    return Lineage(with_decisions(tree, workspace.ledger.entries()), False)


def identify(workspace: Workspace, index: LineageIndex, subject: str) -> tuple[str, str]:
    """(kind, id) of what a person wrote; the kind is empty for an artifact or a step."""
    kind, colon, rest = subject.partition(":")
    if colon and kind in SOURCES and rest:
        return kind, rest.removeprefix("tr-") if kind == "trace" else rest
    if is_digest(subject):
        return "", subject
    if _TRACE.match(subject):
        return "trace", subject.removeprefix("tr-")
    found = index.kinds_of(subject)
    if subject.isdigit() and not found:
        from sluice.pipelines.approvals import registry_of
        from sluice.registry.versions import get_version

        return "", get_version(registry_of(workspace), workspace.settings.application, int(subject)).digest
    if len(found) > 1 or (found and subject.isdigit()):
        raise InputError(
            f"SUBJECT = {subject!r} could be {' or '.join([*found, *(['version'] if subject.isdigit() else [])])}.",
            hint=f"Say which: {' or '.join(f'{one}:{subject}' for one in found)}.",
        )
    if not found:
        raise InputError(f"SUBJECT = {subject!r} is no digest, version, trace, user or document here.", hint=_HINT)
    return found[0], subject


def answer_lineage(workspace: Workspace, index: LineageIndex, trace: str, limit: int) -> Node:
    """What one answer came from: the release that gave it, and the index its passages are from."""
    from sluice.curation.trace_store import open_trace_store

    records = list(open_trace_store(workspace.settings).traces_by_id([trace]))
    if not records:
        raise InputError(
            f"There is no trace {trace!r} in the trace store.", hint="Was it deleted, or not exported yet?"
        )
    record = records[0]
    children = [index.ancestors(digest, limit) for digest in (record.release, record.index_digest) if digest]
    detail = {"user": record.user, "session": record.session, "model": record.model}
    kept = {name: value for name, value in detail.items() if value}
    return Node("trace", f"answer of {trace}", trace, tuple(children), detail=kept)


def holders(tree: Node, serves: Mapping[str, str]) -> tuple[Holder, ...]:
    """Every artifact of a reverse tree once, those that users meet first, then by kind."""
    skipped = {"step", "unknown", *SOURCES}
    found = {n.digest: n.kind for n in tree.walk() if n.kind not in skipped}
    rows = [Holder(kind, digest, serves.get(digest, "")) for digest, kind in found.items()]
    return tuple(sorted(rows, key=lambda one: (not one.serves, one.kind, one.digest)))
