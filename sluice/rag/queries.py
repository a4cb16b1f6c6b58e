"""Labelled queries: what the retrieval gate asks, and which chunks answer it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sluice.infra.errors import InputError
from sluice.provenance.canonical import canonical_json
from sluice.rag.chunk import Chunk
from sluice.rag.corpus import faq_document_id, load_faq


@dataclass(frozen=True)
class LabelledQuery:
    """A question and the ids of the chunks that answer it; retrieving any one of them is a hit."""

    question: str
    chunk_ids: frozenset[str]


def faq_queries(chunks: Iterable[Chunk], exclude: Collection[str] = frozenset()) -> list[LabelledQuery]:
    """Every FAQ question with the chunks that hold its answer, in the FAQ's order.

    A question that the FAQ asks twice is one query that either answer satisfies. `exclude` names FAQ item ids to leave
    out (a frozen holdout). Raises `InputError` for a question whose answer is in no chunk: the corpus is another one.
    """
    by_document: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        by_document.setdefault(chunk.document_id, []).append(chunk)
    labels: dict[str, set[str]] = {}
    for item in load_faq():
        if item.id in exclude:
            continue
        # The chunker may have cut a long answer into several chunks, each of them a part of the answer.
        found = {c.id for c in by_document.get(faq_document_id(item.category), ()) if c.text in item.answer}
        if not found:
            raise InputError(
                f"No chunk holds the answer to FAQ item {item.id!r}.", hint="Label the chunks of a FAQ snapshot."
            )
        labels.setdefault(item.question, set()).update(found)
    return [LabelledQuery(question, frozenset(ids)) for question, ids in labels.items()]


def write_queries(queries: Sequence[LabelledQuery], path: Path) -> None:
    """One JSON object a line: {"question", "chunk_ids"}."""
    rows = [{"question": query.question, "chunk_ids": sorted(query.chunk_ids)} for query in queries]
    path.write_bytes(b"".join(canonical_json(row) + b"\n" for row in rows))


def read_queries(path: Path) -> list[LabelledQuery]:
    """Labelled queries from a file of `write_queries`, or one made by hand. Raises `InputError` naming the line."""
    queries = []
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise InputError(f"The query file {str(path)!r} cannot be read: {error}.") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            question, ids = row["question"], frozenset(row["chunk_ids"])
            if not question or not ids or not all(isinstance(one, str) for one in ids):
                raise ValueError("a query needs a question and at least one chunk id")
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"Line {number} of {str(path)!r} is not a labelled query: {error}.") from error
        queries.append(LabelledQuery(question, ids))
    return queries
