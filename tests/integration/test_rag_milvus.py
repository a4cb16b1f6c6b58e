"""The index against a real milvus-lite server: build, retrieve, gate, switch, and what happens to it when killed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sluice.infra.errors import ConflictError, GateRefused, UnavailableError
from sluice.rag import build, milvus
from sluice.rag.build import build_index, load_index
from sluice.rag.chunk import ChunkerSettings, chunk_documents
from sluice.rag.corpus import read_documents, snapshot_faq
from sluice.rag.gate import GateResult, judge, measure
from sluice.rag.index import read_index, write_index
from sluice.rag.queries import faq_queries
from sluice.rag.retrieve import Retriever
from sluice.rag.switch import alias_state, drop_collection, retire, rollback, switch
from tests.rag.milvus_server import Index, RememberingEmbedder, Server, digest_of

pytestmark = pytest.mark.integration
DOCUMENTS = 14  # of the FAQ's 39: enough labelled queries for the gate, a third of the embedding time


EMBEDDER = RememberingEmbedder()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("milvus") / "data")
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("index")
    snapshot = snapshot_faq(folder / "corpus")
    everything = read_documents(folder / "corpus")
    kept = everything[:DOCUMENTS]
    chunks = chunk_documents(kept)
    content = write_index(folder / "index", chunks, EMBEDDER, corpus=snapshot.digest, chunker=ChunkerSettings().digest)
    known = {chunk.id for chunk in chunks}
    queries = [q for q in faq_queries(chunk_documents(everything)) if q.chunk_ids & known]
    assert len(queries) >= 120
    return Index(folder / "index", content, digest_of(folder / "index", content), queries)


@pytest.fixture(scope="module")
def smaller(index: Index, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Another index: the same chunks without the last ten."""
    folder = tmp_path_factory.mktemp("smaller")
    chunks = index.content.chunks[:-10]
    content = write_index(
        folder, chunks, EMBEDDER, corpus=index.content.corpus, chunker=index.content.chunker, previous=index.folder
    )
    return Index(folder, content, digest_of(folder, content), index.queries)


def passing(uri: str, collection: str, index: Index) -> GateResult:
    result = judge(measure(Retriever(uri, collection, EMBEDDER), index.queries), None)
    assert result.verdict == "pass", result.reasons
    return result


def rows_in(uri: str, collection: str) -> int:
    found = milvus.connect(uri).query(collection, filter="", output_fields=["count(*)"])
    return int(found[0]["count(*)"])


def test_build_then_hit_then_mended(server: Server, index: Index) -> None:
    built = build_index(server.uri, "build", index.folder, index.digest)
    assert built.collection == f"build_{index.digest[7:19]}"
    assert built.rows == built.inserted == rows_in(server.uri, built.collection) == len(index.content.chunks)
    assert build_index(server.uri, "build", index.folder, index.digest).hit

    client = milvus.connect(server.uri)
    row = client.get(built.collection, ids=[index.content.chunks[0].id], output_fields=["*"])[0]
    damaged = {key: row[key] for key in ("document_id", "heading", "text", "index_digest")}
    vector = index.content.embeddings[5].tolist()
    client.delete(built.collection, ids=[chunk.id for chunk in index.content.chunks[3:6]])
    client.upsert(built.collection, [{"id": "stranger", "dense": vector, **damaged}])
    mended = build_index(server.uri, "build", index.folder, index.digest)
    assert (mended.inserted, mended.removed) == (3, 1)

    client.upsert(built.collection, [{"id": index.content.chunks[0].id, "dense": vector, **damaged}])
    assert not build_index(server.uri, "build", index.folder, index.digest).hit
    assert build_index(server.uri, "build", index.folder, index.digest).hit

    with pytest.raises(ConflictError, match="holds the index"):
        load_index(index.folder, server.uri, built.collection, "sha256:" + "0" * 64)


def test_retrieval_gate_and_switch(server: Server, index: Index, smaller: Index, tmp_path: Path) -> None:
    good = build_index(server.uri, "gate", index.folder, index.digest)
    gate = passing(server.uri, good.collection, index)
    assert gate.candidate == index.digest
    assert gate.metrics["recall@2"] > 0.6
    state = switch(server.uri, "gate", good.collection, gate, expected=None)
    assert state.collection == good.collection

    retriever = Retriever(server.uri, milvus.alias_name("gate"), EMBEDDER)
    answer = retriever.retrieve("What is a bygglov (building permit)?")
    assert answer.index_digest == index.digest
    assert len(answer.passages) == 2
    assert "A bygglov is an official decision" in answer.passages[0].text
    assert answer.passages[0].heading == "Bygglov"
    assert 1 >= answer.passages[0].score >= answer.passages[1].score >= 0

    # Shuffled vectors: a build that verifies against its own artifact and answers nonsense.
    damaged = tmp_path / "damaged"
    shutil.copytree(index.folder, damaged)
    order = np.random.default_rng(1).permutation(len(index.content.chunks))
    np.save(damaged / "embeddings.npy", index.content.embeddings[order], allow_pickle=False)
    digest = digest_of(damaged, read_index(damaged))
    bad = build_index(server.uri, "gate", damaged, digest)
    current = measure(Retriever(server.uri, good.collection, EMBEDDER), index.queries)
    refused = judge(measure(Retriever(server.uri, bad.collection, EMBEDDER), index.queries), current)
    assert refused.verdict == "fail"
    assert refused.metrics["recall@2"] < 0.3
    with pytest.raises(GateRefused, match="recall@2"):
        switch(server.uri, "gate", bad.collection, refused, expected=good.collection)
    with pytest.raises(GateRefused):  # a pass for another index is no pass
        switch(server.uri, "gate", bad.collection, gate, expected=good.collection)
    assert alias_state(server.uri, "gate").collection == good.collection

    other = build_index(server.uri, "gate", smaller.folder, smaller.digest)
    other_gate = passing(server.uri, other.collection, smaller)
    with pytest.raises(ConflictError, match="points at"):
        switch(server.uri, "gate", other.collection, other_gate, expected=None)
    switched = switch(server.uri, "gate", other.collection, other_gate, expected=good.collection)
    assert switched.history == (good.collection,)
    assert switch(server.uri, "gate", other.collection, other_gate, expected=good.collection) == switched
    assert retriever.retrieve("What is a bygglov?").index_digest == smaller.digest

    for used in (good.collection, other.collection):  # the current one, and the one to roll back to
        with pytest.raises(GateRefused, match="in use by the alias"):
            drop_collection(server.uri, "gate", used)
    assert retire(server.uri, "gate", protect={bad.collection}) == []
    assert retire(server.uri, "gate") == [bad.collection]

    back = rollback(server.uri, "gate", away_from=other.collection)
    assert (back.collection, back.history) == (good.collection, ())
    assert rollback(server.uri, "gate", away_from=other.collection) == back
    assert retriever.retrieve("What is a bygglov?").index_digest == index.digest
    with pytest.raises(ConflictError, match="no earlier index"):
        rollback(server.uri, "gate", away_from=good.collection)


def test_no_query_is_lost_or_mixed_while_the_alias_moves(server: Server, index: Index, smaller: Index) -> None:
    a = build_index(server.uri, "live", index.folder, index.digest)
    b = build_index(server.uri, "live", smaller.folder, smaller.digest)
    gate_a, gate_b = passing(server.uri, a.collection, index), passing(server.uri, b.collection, smaller)
    # The last chunks are in one index only, so their questions tell the two apart.
    last = {chunk.id for chunk in index.content.chunks[-10:]}
    questions = [q.question for q in index.queries if q.chunk_ids & last] + [q.question for q in index.queries[:10]]
    vectors = EMBEDDER.embed(questions)

    def ask(retriever: Retriever, i: int) -> tuple[str, tuple[str, ...]]:
        found = retriever.retrieve_many([questions[i]], 2, vectors[i : i + 1])[0]
        return found.index_digest, tuple(passage.id for passage in found.passages)

    right = {}
    for built in (a, b):
        retriever = Retriever(server.uri, built.collection, EMBEDDER)
        for i in range(len(questions)):
            digest, ids = ask(retriever, i)
            right[digest, i] = ids
    assert sum(right[index.digest, i] != right[smaller.digest, i] for i in range(len(questions))) >= 5

    switch(server.uri, "live", a.collection, gate_a, expected=None)
    live = Retriever(server.uri, "live", EMBEDDER)
    done = threading.Event()
    answers: list[str] = []
    problems: list[str] = []

    def read(seed: int) -> None:
        i = seed
        while not done.is_set():
            i = (i + 1) % len(questions)
            try:
                digest, ids = ask(live, i)
            except Exception as error:  # noqa: BLE001  (any failure is what this test looks for)
                problems.append(repr(error))
                continue
            answers.append(digest)
            if ids != right[digest, i]:
                problems.append(f"question {i} mixed two indexes")

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for reader in readers:
        reader.start()
    slowest = 0.0
    for _ in range(10):
        time.sleep(0.1)
        started = time.perf_counter()
        switch(server.uri, "live", b.collection, gate_b, expected=a.collection)
        slowest = max(slowest, time.perf_counter() - started)
        time.sleep(0.1)
        rollback(server.uri, "live", away_from=b.collection)
    done.set()
    for reader in readers:
        reader.join()
    assert problems == []
    assert len(answers) >= 200
    assert {index.digest, smaller.digest} == set(answers)
    assert slowest < 1.0


def test_a_killed_build_is_completed_without_doubles(
    server: Server, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import sys, time; from pathlib import Path; from sluice.rag import build; build.INSERT_BATCH = 16\n"
        "def report(done, total, message): print(message, flush=True); time.sleep(0.2)\n"
        "build.build_index(sys.argv[1], 'killed', Path(sys.argv[2]), sys.argv[3], report)"
    )
    arguments = [sys.executable, "-c", program, server.uri, str(index.folder), index.digest]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        for _ in range(3):
            assert client.stdout.readline().startswith("inserted")
        client.kill()
    collection = milvus.collection_name("killed", index.digest)
    total = len(index.content.chunks)
    half_done = rows_in_any_state(server.uri, collection)
    assert 48 <= half_done < total

    # Now the server itself dies in the middle of the resumed insert.
    monkeypatch.setattr(build, "INSERT_BATCH", 16)
    retriever = Retriever(server.uri, collection, EMBEDDER)
    batches = []

    def kill_at_second(done: float, count: float, message: str) -> None:
        batches.append(done)
        if len(batches) == 2:
            server.kill()

    with pytest.raises(UnavailableError, match=str(server.port)):
        build_index(server.uri, "killed", index.folder, index.digest, kill_at_second)
    started = time.monotonic()
    with pytest.raises(UnavailableError, match=str(server.port)):
        retriever.retrieve("What is a bygglov?")
    assert time.monotonic() - started < 8

    server.start()
    built = build_index(server.uri, "killed", index.folder, index.digest)
    assert 0 < built.inserted <= total - half_done
    assert rows_in(server.uri, collection) == total
    assert build_index(server.uri, "killed", index.folder, index.digest).hit
    assert retriever.retrieve("What is a bygglov?").index_digest == index.digest


def rows_in_any_state(uri: str, collection: str) -> int:
    client = milvus.connect(uri)
    client.load_collection(collection)
    return rows_in(uri, collection)


def test_after_a_restart_and_after_the_loss_of_the_store(server: Server, index: Index) -> None:
    built = build_index(server.uri, "lost", index.folder, index.digest)
    gate = passing(server.uri, built.collection, index)
    switch(server.uri, "lost", built.collection, gate, expected=None)
    retriever = Retriever(server.uri, "lost", EMBEDDER)
    questions = [query.question for query in index.queries[:40]]
    before = retriever.retrieve_many(questions, 5)

    server.kill()
    server.start()  # milvus-lite keeps the rows and loads no collection by itself
    assert retriever.retrieve_many(questions, 5) == before

    server.kill()
    shutil.rmtree(server.folder)
    server.start()
    with pytest.raises(milvus.CollectionMissing, match="lost"):
        retriever.retrieve(questions[0])
    rebuilt = load_index(index.folder, server.uri, built.collection, index.digest)
    assert rebuilt.inserted == rebuilt.rows
    switch(server.uri, "lost", built.collection, gate, expected=None)
    assert retriever.retrieve_many(questions, 5) == before
