"""The index artifact: chunks and their vectors, and what made them. Milvus is a view of it that can be rebuilt.

Files: `chunks.jsonl` (one canonical JSON object a line), `embeddings.npy` (float32 [chunks, dimension], row i belongs
to line i) and `index.json` (the digests of corpus, chunker and embedder). The artifact's digest is the index's digest;
it does not hold the gate's verdict or the collection's name, because both follow from it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sluice.infra.errors import InputError, IntegrityError
from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import Json, canonical_json
from sluice.rag.chunk import Chunk
from sluice.rag.embed import Embedder

if TYPE_CHECKING:
    from sluice.rag.embed import Vectors

CHUNKS_FILE, EMBEDDINGS_FILE, INDEX_FILE = "chunks.jsonl", "embeddings.npy", "index.json"


@dataclass(frozen=True)
class IndexContent:
    """What an index holds: `embeddings[i]` is the vector of `chunks[i]`; the rest are digests."""

    chunks: tuple[Chunk, ...]
    embeddings: Vectors
    corpus: str
    chunker: str
    embedder: str

    @property
    def metadata(self) -> dict[str, Json]:
        """For the artifact's manifest."""
        return {
            "corpus": self.corpus,
            "chunker": self.chunker,
            "embedding": self.embedder,
            "dimension": int(self.embeddings.shape[1]),
            "chunks": len(self.chunks),
            "documents": len({chunk.document_id for chunk in self.chunks}),
        }


def write_index(
    folder: Path,
    chunks: Sequence[Chunk],
    embedder: Embedder,
    *,
    corpus: str,
    chunker: str,
    previous: Path | None = None,
    report: Report = no_report,
) -> IndexContent:
    """Embed the chunks and write the artifact's files into `folder`.

    `previous` is the folder of an earlier index: where the same embedder made it, the vectors of unchanged texts are
    taken from it instead of being computed again.
    """
    import numpy as np

    if not chunks:
        raise InputError("An index needs at least one chunk.")
    known = _known_vectors(previous, embedder)
    new = {chunk.text_digest: chunk.text for chunk in chunks if chunk.text_digest not in known}
    if new:
        known |= dict(zip(new, embedder.embed(list(new.values()), report), strict=True))
    vectors = np.ascontiguousarray(np.stack([known[chunk.text_digest] for chunk in chunks]), dtype=np.float32)
    content = IndexContent(tuple(chunks), vectors, corpus, chunker, embedder.digest)
    _check(content, folder)

    folder.mkdir(parents=True, exist_ok=True)
    (folder / CHUNKS_FILE).write_bytes(b"".join(canonical_json(asdict(chunk)) + b"\n" for chunk in chunks))
    np.save(folder / EMBEDDINGS_FILE, vectors, allow_pickle=False)
    # Written last: a folder with this file is whole.
    (folder / INDEX_FILE).write_bytes(canonical_json(content.metadata))
    report(len(chunks), len(chunks), f"{len(chunks)} chunks, {len(new)} embedded anew")
    return content


def read_index(folder: Path) -> IndexContent:
    """The content of an index artifact. Raises `IntegrityError` when its files do not fit together."""
    import numpy as np

    try:
        about = json.loads((folder / INDEX_FILE).read_text())
        chunks = tuple(Chunk(**json.loads(line)) for line in (folder / CHUNKS_FILE).read_text().splitlines())
        vectors = np.load(folder / EMBEDDINGS_FILE, allow_pickle=False)
        content = IndexContent(chunks, vectors, about["corpus"], about["chunker"], about["embedding"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise IntegrityError(f"{folder} does not hold an index: {error}.") from error
    _check(content, folder)
    return content


def _check(content: IndexContent, folder: Path) -> None:
    import numpy as np

    vectors = content.embeddings
    if vectors.dtype != np.float32 or vectors.ndim != 2 or vectors.shape[0] != len(content.chunks):
        raise IntegrityError(
            f"The index in {folder} has {len(content.chunks)} chunks and embeddings {vectors.dtype}{vectors.shape}."
        )
    wrong = np.flatnonzero(~(np.abs(np.linalg.norm(vectors, axis=1) - 1.0) < 1e-3))  # `~(<)` catches NaN too
    if wrong.size:
        raise IntegrityError(
            f"The index in {folder} has {wrong.size} vectors that are not finite and of length 1, "
            f"the first for chunk {content.chunks[int(wrong[0])].id}."
        )
    if len({chunk.id for chunk in content.chunks}) != len(content.chunks):
        raise IntegrityError(f"The index in {folder} has two chunks with one id.")


def _known_vectors(previous: Path | None, embedder: Embedder) -> dict[str, Vectors]:
    if previous is None:
        return {}
    content = read_index(previous)
    if content.embedder != embedder.digest:
        return {}
    return {chunk.text_digest: vector for chunk, vector in zip(content.chunks, content.embeddings, strict=True)}
