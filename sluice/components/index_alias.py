"""The live index as the vector store knows it."""

from __future__ import annotations

from sluice.components.workspace import Workspace
from sluice.infra.errors import UnavailableError
from sluice.provenance.canonical import canonical_json


def vectors_uri(workspace: Workspace) -> str:
    """Address of Milvus. Raises `UnavailableError` when the settings have none."""
    uri = workspace.settings.vectors.uri
    if not uri:
        raise UnavailableError(
            "Milvus has no address: setting vectors.uri is empty.",
            hint="Start the local parts with `sluice up`, or set SLUICE_VECTORS__URI.",
        )
    return uri


def current_index(workspace: Workspace) -> str:
    """Digest of the index that the application's alias points at. Raises `UnavailableError` before the first one."""
    found = find_index(workspace)
    if found is None:
        raise UnavailableError("There is no index yet.", hint="`sluice run reembed` builds the first one.")
    return found


def find_index(workspace: Workspace) -> str | None:
    """Digest of the index behind the application's alias, or None before the first index."""
    from sluice.rag.milvus import CollectionMissing, alias_name
    from sluice.rag.retrieve import Retriever

    retriever = Retriever(vectors_uri(workspace), alias_name(workspace.settings.application))
    try:
        # Every row carries its index's digest: the answer to any question names it.
        return retriever.retrieve("index", k=1).index_digest
    except CollectionMissing:
        return None


def point_at(workspace: Workspace, index: str) -> None:
    """Note in the object store which index is live: whoever collects garbage there may not see our vector store."""
    place = f"indexes/{workspace.settings.application}.json"
    workspace.objects.put(place, canonical_json({"digest": index}))
