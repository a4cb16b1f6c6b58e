"""An index artifact into a Milvus collection: insert, index, wait, verify. Safe to kill and run again at any point.

Chunk ids are the primary keys and rows go in by upsert, so what an interrupted build left is completed, never doubled.
A collection counts as built only when its rows, its vectors and its answers to searches are what the artifact says.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sluice.infra.errors import ConflictError, InputError, IntegrityError, UnavailableError
from sluice.infra.progress import Report, no_report
from sluice.rag import milvus
from sluice.rag.index import IndexContent, read_index
from sluice.rag.milvus import CALL_TIMEOUT_S, DENSE, SPARSE

INSERT_BATCH = 256
INDEX_TIMEOUT_S = 600.0
SPOT_CHECKS = 32
_ID_PAGE = 5_000


@dataclass(frozen=True)
class BuiltIndex:
    """A verified collection. `inserted` rows were missing: 0 is a hit, fewer than `rows` a mended half-built one."""

    collection: str
    index_digest: str
    rows: int
    inserted: int
    removed: int

    @property
    def hit(self) -> bool:
        return self.inserted == 0 and self.removed == 0


def build_index(uri: str, application: str, folder: Path, index_digest: str, report: Report = no_report) -> BuiltIndex:
    """Build the application's collection for the index artifact in `folder`, whose digest is `index_digest`."""
    return load_index(folder, uri, milvus.collection_name(application, index_digest), index_digest, report)


def load_index(folder: Path, uri: str, collection: str, index_digest: str, report: Report = no_report) -> BuiltIndex:
    """Bring a collection to what the artifact in `folder` holds, from nothing or from any half-done state.

    Raises `UnavailableError` when Milvus does not answer or its index does not get ready, `ConflictError` when the
    collection belongs to another index, `IntegrityError` when the rows do not verify after inserting.
    """
    content = read_index(folder)
    rows = _rows(content, index_digest)
    client = milvus.connect(uri)
    with milvus.explained(uri, collection):
        total = len(rows)
        if not client.has_collection(collection, timeout=CALL_TIMEOUT_S):
            milvus.create_collection(client, collection, content.embeddings.shape[1])
        _ready(client, collection, total)
        _require_same_index(client, collection, index_digest)

        wanted = {row["id"] for row in rows}
        present = _ids(client, collection)
        foreign = sorted(present - wanted)
        missing = [row for row in rows if row["id"] not in present]
        if not missing and not foreign and _problem(client, collection, rows) is None:
            report(total, total, f"{collection} is complete already")
            return BuiltIndex(collection, index_digest, total, 0, 0)
        # Complete by its ids and yet not right: rows were damaged, so put every one again.
        pending = missing if missing or foreign else rows

        for start in range(0, len(pending), INSERT_BATCH):
            client.upsert(collection, pending[start : start + INSERT_BATCH], timeout=CALL_TIMEOUT_S)
            done = min(start + INSERT_BATCH, len(pending))
            report(total - len(pending) + done, total, f"inserted {done} of {len(pending)}")
        for start in range(0, len(foreign), INSERT_BATCH):
            client.delete(collection, ids=foreign[start : start + INSERT_BATCH], timeout=CALL_TIMEOUT_S)
        client.flush(collection, timeout=CALL_TIMEOUT_S)
        _ready(client, collection, total)
        problem = _problem(client, collection, rows)
    if problem is not None:
        raise IntegrityError(f"The collection {collection} does not hold its index: {problem}.")
    return BuiltIndex(collection, index_digest, total, len(pending), len(foreign))


def _rows(content: IndexContent, index_digest: str) -> list[dict[str, Any]]:
    for chunk in content.chunks:
        for name, value, limit in (
            ("document_id", chunk.document_id, milvus.MAX_DOCUMENT_ID),
            ("heading", chunk.heading, milvus.MAX_HEADING),
            ("text", chunk.text, milvus.MAX_TEXT),
        ):
            if len(value.encode()) > limit:
                raise InputError(
                    f"Chunk {chunk.id} of document {chunk.document_id[:80]!r}: {name} has {len(value.encode())} "
                    f"bytes, more than the {limit} that the index takes.",
                    hint="Shorten the path or the headings, or lower max_words.",
                )
    return [
        {
            "id": chunk.id,
            "document_id": chunk.document_id,
            "heading": chunk.heading,
            "text": chunk.text,
            "index_digest": index_digest,
            DENSE: vector.tolist(),
        }
        for chunk, vector in zip(content.chunks, content.embeddings, strict=True)
    ]


def _ready(client: Any, collection: str, rows: int) -> None:
    milvus.create_indexes(client, collection, rows)
    _wait_for_indexes(client, collection)
    client.load_collection(collection, timeout=INDEX_TIMEOUT_S)


def _wait_for_indexes(client: Any, collection: str) -> None:
    """Return when no row waits to be indexed: until then a search is slow, and on Milvus may miss rows."""
    deadline = time.monotonic() + INDEX_TIMEOUT_S
    pause = 0.02
    while True:
        states = [client.describe_index(collection, name, timeout=CALL_TIMEOUT_S) for name in (DENSE, SPARSE)]
        if any(state["state"] == "Failed" for state in states):
            raise UnavailableError(f"Milvus could not index {collection}: {states}.")
        if all(state["state"] == "Finished" and int(state["pending_index_rows"]) == 0 for state in states):
            return
        if time.monotonic() > deadline:
            raise UnavailableError(
                f"The indexes of {collection} are not ready after {INDEX_TIMEOUT_S:.0f} s: {states}."
            )
        time.sleep(pause)
        pause = min(pause * 2, 1.0)


def _require_same_index(client: Any, collection: str, index_digest: str) -> None:
    found = client.query(collection, filter="", output_fields=["index_digest"], limit=1, timeout=CALL_TIMEOUT_S)
    if found and found[0]["index_digest"] != index_digest:
        raise ConflictError(
            f"The collection {collection} holds the index {found[0]['index_digest']}, not {index_digest}."
        )


def _ids(client: Any, collection: str) -> set[str]:
    """All primary keys, page by page: a server answers no query of unbounded size."""
    iterator = client.query_iterator(
        collection, batch_size=_ID_PAGE, filter="", output_fields=["id"], timeout=CALL_TIMEOUT_S
    )
    try:
        found: set[str] = set()
        while page := iterator.next():
            found.update(row["id"] for row in page)
        return found
    finally:
        iterator.close()


def _problem(client: Any, collection: str, rows: Sequence[dict[str, Any]]) -> str | None:
    """What is wrong with the collection in words, or None: counts, stored rows, and searches that must find them."""
    import numpy as np

    counted = client.query(collection, filter="", output_fields=["count(*)"], timeout=CALL_TIMEOUT_S)[0]["count(*)"]
    if counted != len(rows):
        return f"it has {counted} rows instead of {len(rows)}"
    picks = sorted({int(i) for i in np.linspace(0, len(rows) - 1, min(SPOT_CHECKS, len(rows)))})
    chosen = [rows[i] for i in picks]
    fields = ["id", "document_id", "heading", "text", "index_digest", DENSE]
    stored = client.get(collection, ids=[row["id"] for row in chosen], output_fields=fields, timeout=CALL_TIMEOUT_S)
    by_id = {row["id"]: row for row in stored}
    for row in chosen:
        found = by_id.get(row["id"])
        if found is None:
            return f"the row {row['id']} is missing"
        for name in ("document_id", "heading", "text", "index_digest"):
            if found[name] != row[name]:
                return f"{name} of the row {row['id']} differs"
        if not np.allclose(found[DENSE], row[DENSE], atol=1e-5):
            return f"the vector of the row {row['id']} differs"
    dense = client.search(
        collection, data=[row[DENSE] for row in chosen], anns_field=DENSE, limit=1, timeout=CALL_TIMEOUT_S
    )
    sparse = client.search(
        collection, data=[row["text"] for row in chosen], anns_field=SPARSE, limit=1, timeout=CALL_TIMEOUT_S
    )
    for row, near, words in zip(chosen, dense, sparse, strict=True):
        # Two chunks may share a text, so the nearest has to be as near as the row itself, not the row itself.
        if not near or not near[0]["distance"] > 1 - 1e-3:
            return f"a search with the vector of the row {row['id']} does not find it"
        if not words and any(character.isalnum() for character in row["text"]):
            return f"a search with the words of the row {row['id']} finds nothing"
    return None
