"""The lineage index of an installation, and what its ledger and gateway add: who decided, and who is served now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sluice.infra.errors import SluiceError, UnavailableError
from sluice.infra.progress import Report, no_report
from sluice.provenance.ledger import LedgerEntry
from sluice.provenance.releases import read_state

if TYPE_CHECKING:
    from sluice.components.workspace import Workspace
    from sluice.provenance.lineage import LineageIndex, Node

TOLD = ("decision", "approval", "rejection", "failure", "promotion", "rollback")


def open_lineage(workspace: Workspace, report: Report = no_report) -> LineageIndex:
    """The index, caught up with the object store."""
    from sluice.provenance.lineage import LineageIndex

    return LineageIndex(workspace.objects, workspace.settings.home / "lineage", report)


def with_decisions(node: Node, entries: Iterable[LedgerEntry]) -> Node:
    """The tree in which every release carries, as nodes of kind `entry`, what the ledger holds about it: decisions,
    approvals, promotions and the like."""
    from sluice.provenance.lineage import Node as TreeNode

    told: dict[str, list[TreeNode]] = {}
    for entry in entries:
        release = entry.body.get("release") or entry.body.get("adapter")
        if entry.kind in TOLD and release:
            detail = {"entry": entry.kind, "by": entry.actor, "time": entry.time, "signed with": entry.key_id[:12]}
            detail |= {name: str(entry.body[name]) for name in ("verdict", "reason") if entry.body.get(name)}
            told.setdefault(release, []).append(TreeNode("entry", _sentence(entry), entry.digest, detail=detail))

    def grown(one: Node) -> Node:
        # Trees of artifacts are a few dozen steps deep; only those with children need a walk.
        children = tuple(grown(child) if child.children or child.digest in told else child for child in one.children)
        if not one.repeated:
            children = (*told.get(one.digest, ()), *children)
        return replace(one, children=children)

    return grown(node)


def serving(workspace: Workspace) -> Mapping[str, str]:
    """What answers users now: in words, by digest of release and index. The gateway's word counts; without one, the
    ledger's. An index whose vector store does not answer is left out."""
    from sluice.components.index_alias import find_index
    from sluice.components.served import router

    found: dict[str, str] = {}
    try:
        routes = router(workspace.settings).state()
        found = {one.release: f"{routes.share(one.release)}% of users" for one in routes.targets()}
    except UnavailableError:
        champion = read_state(workspace.ledger).champion()
        if champion is not None:
            found[champion] = "champion by the ledger"
    try:
        index = find_index(workspace)
        if index is not None:
            found[index] = "the live index"
    except UnavailableError:
        pass
    return found


def draw_lineage(workspace: Workspace, digest: str, path: Path) -> Mapping[str, Path]:
    """The picture of an artifact's lineage, as files for MLflow by name; none, when the chain cannot be read now."""
    from sluice.provenance.lineage_page import write_page

    try:
        tree = open_lineage(workspace).ancestors(digest, limit=50)
        write_page(with_decisions(tree, workspace.ledger.entries()), path)
    except SluiceError as error:
        # A picture is for people: an unrelated damaged record must not hold up a candidate.
        print(f"No picture of the lineage: {error}", flush=True)
        return {}
    return {"lineage.html": path}


def _sentence(entry: LedgerEntry) -> str:
    when = f"{entry.time[:16].replace('T', ' ')} UTC"
    body = entry.body
    words = {
        "decision": f"gate decision: {body.get('verdict')}",
        "approval": f"approved by {entry.actor}",
        "rejection": f"rejected by {entry.actor}",
        "failure": f"failed: {body.get('reason')}",
        "promotion": f"promoted by {entry.actor}",
        "rollback": f"rolled back by {entry.actor}: {body.get('reason')}",
    }[entry.kind]
    why = f" ({body['reason']})" if entry.kind in ("approval", "rejection") and body["reason"] else ""
    return f"{words}{why}, {when}"
