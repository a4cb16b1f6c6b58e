"""A question to passages: dense and BM25 search fused, every answer from one index and labelled with its digest.

Fusion: each list's scores are scaled to [0, 1] over its own top `DEPTH`, then added with the weights below; a passage
that a list does not hold gets 0 from it. Measured on the FAQ (497 distinct questions, recall@1/@2/@3, MRR):

    dense alone            0.557  0.698  0.746  0.671
    BM25 alone             0.326  0.433  0.499  0.436
    reciprocal rank, k 60  0.469  0.592  0.646  0.588     lets the weaker list speak as loud as the stronger one
    weighted 0.9 : 0.1     0.565  0.706  0.759  0.678     what is used; +0.008 recall@2, interval -0.004 to +0.020

It is done here and not by the server, because milvus-lite and Milvus normalise the scores of their weighted ranker
differently: the same query would be ranked differently on a laptop and on a cluster.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sluice.infra.errors import InputError, UnavailableError
from sluice.rag import milvus
from sluice.rag.embed import Embedder, MiniLmEmbedder
from sluice.rag.milvus import DENSE, SEARCH_TIMEOUT_S, SPARSE, CollectionMissing, CollectionReleased

if TYPE_CHECKING:
    from sluice.rag.embed import Vectors

DEPTH = 20
DENSE_WEIGHT, SPARSE_WEIGHT = 0.9, 0.1
_BATCH = 128
_FIELDS = ["document_id", "heading", "text", "index_digest"]


@dataclass(frozen=True)
class Passage:
    """One retrieved chunk. `score` is in [0, 1] and comparable within one answer only."""

    id: str
    text: str
    heading: str
    score: float
    document_id: str


@dataclass(frozen=True)
class Retrieval:
    """The passages for one question, best first, all from the index with this digest."""

    passages: tuple[Passage, ...]
    index_digest: str
    collection: str


class Retriever:
    """Searches the index that an alias points at; a collection's own name does as well. Safe to share between threads.

    The alias is looked up for every call (about 1 ms), so a switch holds from the next question on and both searches
    of a question see the same index.
    """

    def __init__(self, uri: str, alias: str, embedder: Embedder | None = None) -> None:
        self._uri = uri
        self._alias = alias
        self._embedder = embedder or MiniLmEmbedder()
        self._lock = threading.Lock()
        self._client: Any = None

    @property
    def embedder(self) -> Embedder:
        return self._embedder

    def retrieve(self, question: str, k: int = 2) -> Retrieval:
        """The best `k` passages. Raises `UnavailableError` when Milvus does not answer within some seconds,
        `CollectionMissing` when neither alias nor collection exists, `InputError` for an empty question."""
        return self.retrieve_many([question], k)[0]

    def retrieve_many(self, questions: Sequence[str], k: int = 2, vectors: Vectors | None = None) -> list[Retrieval]:
        """`retrieve` for many questions in few calls. `vectors` [questions, dimension]: embedded already."""
        if not 1 <= k <= DEPTH:
            raise InputError(f"k = {k} is out of range.", hint=f"1 to {DEPTH} passages can be asked for.")
        if not all(question.strip() for question in questions):
            raise InputError("question = '' is empty.", hint="Ask something.")
        if not questions:
            return []
        dense = self._embedder.embed(questions) if vectors is None else vectors
        try:
            return self._search(questions, dense, k)
        except CollectionReleased:
            # A restarted milvus-lite serves a collection only after somebody asked for it to be loaded.
            with milvus.explained(self._uri, self._alias):
                self._connected().load_collection(self._resolve(), timeout=milvus.CALL_TIMEOUT_S)
        except CollectionMissing:
            # The alias moved and its old target was dropped between the two calls; or there is none: look once more.
            pass
        return self._search(questions, dense, k)

    def _search(self, questions: Sequence[str], dense: Vectors, k: int) -> list[Retrieval]:
        collection = self._resolve()
        results = []
        for start in range(0, len(questions), _BATCH):
            near = self._hits(collection, DENSE, dense[start : start + _BATCH].tolist())
            words = self._hits(collection, SPARSE, list(questions[start : start + _BATCH]))
            results += [self._fused(collection, a, b, k) for a, b in zip(near, words, strict=True)]
        return results

    def _hits(self, collection: str, field: str, data: list[Any]) -> list[list[dict[str, Any]]]:
        with milvus.explained(self._uri, collection):
            found = self._connected().search(
                collection,
                data=data,
                anns_field=field,
                limit=DEPTH,
                output_fields=_FIELDS,
                timeout=SEARCH_TIMEOUT_S,
            )
        return [list(hits) for hits in found]

    def _fused(self, collection: str, near: list[dict[str, Any]], words: list[dict[str, Any]], k: int) -> Retrieval:
        if not near:
            raise UnavailableError(
                f"The collection {collection} in Milvus at {self._uri} is empty.",
                hint="`sluice run reembed` rebuilds it.",
            )
        entities = {hit["id"]: hit["entity"] for hit in [*near, *words]}
        scores = fuse(
            {hit["id"]: float(hit["distance"]) for hit in near},
            # milvus-lite answers BM25 scores as negative distances, Milvus as scores; the size means the same.
            {hit["id"]: abs(float(hit["distance"])) for hit in words},
        )
        passages = tuple(
            Passage(
                id=key,
                text=str(entities[key]["text"]),
                heading=str(entities[key]["heading"]),
                score=score,
                document_id=str(entities[key]["document_id"]),
            )
            for key, score in scores[:k]
        )
        return Retrieval(passages, str(near[0]["entity"]["index_digest"]), collection)

    def _resolve(self) -> str:
        with milvus.explained(self._uri, self._alias):
            return milvus.target_of(self._connected(), self._alias) or self._alias

    def _connected(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = milvus.connect(self._uri, SEARCH_TIMEOUT_S)
            return self._client


def fuse(dense: dict[str, float], sparse: dict[str, float]) -> list[tuple[str, float]]:
    """(id, score) best first from two lists of scores by id, larger meaning better; ties in order of id."""
    near, words = _scaled(dense), _scaled(sparse)
    fused = {
        key: DENSE_WEIGHT * near.get(key, 0.0) + SPARSE_WEIGHT * words.get(key, 0.0) for key in near.keys() | words
    }
    return sorted(fused.items(), key=lambda entry: (-entry[1], entry[0]))


def _scaled(scores: dict[str, float]) -> dict[str, float]:
    """Scores moved to [0, 1]; a list whose scores are all equal gives everyone 1."""
    if not scores:
        return {}
    low, high = min(scores.values()), max(scores.values())
    if high <= low:
        return dict.fromkeys(scores, 1.0)
    return {key: (score - low) / (high - low) for key, score in scores.items()}
