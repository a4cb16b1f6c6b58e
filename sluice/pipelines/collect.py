"""What this installation must keep: the roots of garbage collection, from every place that names an artifact.

Whoever cannot be asked stops the collection: an unknown answer is no leave to delete.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime

from sluice.components.index_alias import vectors_uri
from sluice.components.served import router, server_book
from sluice.components.workspace import Workspace
from sluice.infra.errors import UnavailableError
from sluice.pipelines.runs import list_runs
from sluice.provenance.canonical import digests_in
from sluice.provenance.collect import Collector
from sluice.provenance.collecting import GRACE_S
from sluice.provenance.ledger import Ledger
from sluice.provenance.roots import Roots, ledger_roots, merge_roots

POINTERS = {"base-models/": "a base model", "holdouts/": "a frozen holdout", "indexes/": "a live index"}
"""Objects that name an artifact: `{"digest": ...}`, of all applications in the object store."""
_INDEX_SUFFIX = re.compile(r"_([0-9a-f]{12})$")


def open_collector(workspace: Workspace, grace_s: float = GRACE_S) -> Collector:
    """The collector of this installation's object store."""
    return Collector(workspace.objects, workspace.artifacts, lambda: find_roots(workspace), grace_s=grace_s)


def find_roots(workspace: Workspace) -> Roots:
    """Everything that is named as live now. Raises `UnavailableError` when a part that names something is silent."""
    return merge_roots(
        _routes(workspace),
        _servers(workspace),
        *_ledgers(workspace),
        _indexes(workspace),
        _pointers(workspace),
        _mirrored(workspace),
        _runs(workspace),
    )


def _routes(workspace: Workspace) -> Roots:
    settings = workspace.settings
    if not settings.serving.gateway_url and not (settings.home / "gateway").is_dir():
        # Nothing was ever served from here. What other installations serve is in their ledgers.
        return Roots()
    state = router(settings).state()
    return Roots({digest: "a route of the gateway" for one in state.targets() for digest in (one.release, one.adapter)})


def _servers(workspace: Workspace) -> Roots:
    """The merged models that servers of single releases hold: a restart reads them again."""
    models = server_book(workspace.settings).read().values()
    return Roots(dict.fromkeys(models, "the model of a release's server"))


def _ledgers(workspace: Workspace) -> list[Roots]:
    """Of every application that has a ledger in this object store, verified."""
    names = {info.key.split("/")[1] for info in workspace.objects.list("ledger/")}
    own = workspace.settings.application
    ledgers = [
        workspace.ledger if name == own else Ledger(workspace.objects, name, workspace.signer, policy=workspace.policy)
        for name in sorted(names)
    ]
    return [ledger_roots(ledger.entries(), datetime.now(UTC)) for ledger in ledgers]


def _indexes(workspace: Workspace) -> Roots:
    """The index behind each collection that the vector store holds: live ones, and those kept for a rollback."""
    from sluice.rag import milvus

    uri = vectors_uri(workspace)
    client = milvus.connect(uri)
    with milvus.explained(uri):
        names = client.list_collections(timeout=milvus.CALL_TIMEOUT_S)
    # A collection's name ends in the first 12 digits of its index's digest.
    wanted = {match[1] for name in names if (match := _INDEX_SUFFIX.search(name))}
    prefix = "manifests/sha256/"
    stored = (info.key.removeprefix(prefix) for info in workspace.objects.list(prefix))
    return Roots({f"sha256:{one}": "an index in the vector store" for one in stored if one[:12] in wanted})


def _pointers(workspace: Workspace) -> Roots:
    live: dict[str, str] = {}
    for prefix, reason in POINTERS.items():
        for info in workspace.objects.list(prefix):
            digest = json.loads(workspace.objects.get(info.key)).get("digest")
            if not digest:
                raise UnavailableError(f"The object {info.key!r} names no digest, so nothing can be collected.")
            live[digest] = reason
    return Roots(live)


def _mirrored(workspace: Workspace) -> Roots:
    """What other sites hand over now: mirrored from outside, it may be named nowhere else."""
    from sluice.registry.transfer.acceptance import accepted_releases

    return Roots({d: f"a release of site {site}" for d, site in accepted_releases(workspace.objects).items()})


def _runs(workspace: Workspace) -> Roots:
    """What the runs under way on this machine were given and made. Elsewhere, their step records are young."""
    live: dict[str, str] = {}
    for run in list_runs(workspace.settings):
        if run.alive:
            tasks = [(state.outputs, state.values, state.steps) for state in run.tasks().values()]
            for digest in digests_in([run.parameters, tasks]):
                live[digest] = "a run under way"
    return Roots(live)
