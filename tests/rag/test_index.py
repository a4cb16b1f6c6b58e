from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sluice.infra.errors import InputError, IntegrityError
from sluice.provenance.artifacts import ArtifactStore, describe_directory
from sluice.rag.chunk import Chunk, chunk_documents
from sluice.rag.corpus import Document
from sluice.rag.index import IndexContent, read_index, write_index
from tests.rag.word_embedder import WordEmbedder


def chunks_of(*paragraphs: str) -> list[Chunk]:
    return chunk_documents([Document("doc", "Title", "\n\n".join(paragraphs), "MIT", "test")])


def write(folder: Path, chunks: list[Chunk], embedder: WordEmbedder, previous: Path | None = None) -> IndexContent:
    return write_index(folder, chunks, embedder, corpus="sha256:c", chunker="sha256:k", previous=previous)


def test_what_is_written_is_read_and_survives_the_artifact_store(tmp_path: Path, artifacts: ArtifactStore) -> None:
    content = write(tmp_path / "index", chunks_of("one", "two"), WordEmbedder())
    stored = artifacts.put_directory(tmp_path / "index", "index", content.metadata)
    assert stored.metadata["chunks"] == 2
    assert stored.metadata["embedding"] == WordEmbedder().digest
    read = read_index(artifacts.fetch(stored.digest))
    assert read.chunks == content.chunks
    np.testing.assert_array_equal(read.embeddings, content.embeddings)
    assert read.metadata == content.metadata


def test_only_new_texts_are_embedded_and_the_result_is_the_same(tmp_path: Path) -> None:
    write(tmp_path / "old", chunks_of("one", "two", "three"), WordEmbedder())
    incremental, full = WordEmbedder(), WordEmbedder()
    changed = chunks_of("three", "four", "one")
    a = write(tmp_path / "a", changed, incremental, previous=tmp_path / "old")
    b = write(tmp_path / "b", changed, full)
    assert incremental.embedded == ["four"]
    assert full.embedded == ["three", "four", "one"]
    assert (
        describe_directory(tmp_path / "a", "index", a.metadata).digest
        == describe_directory(tmp_path / "b", "index", b.metadata).digest
    )


def test_another_embedder_starts_anew(tmp_path: Path) -> None:
    write(tmp_path / "old", chunks_of("one", "two"), WordEmbedder())
    other = WordEmbedder("other")
    write(tmp_path / "new", chunks_of("one", "two"), other, previous=tmp_path / "old")
    assert other.embedded == ["one", "two"]


def test_vectors_that_are_no_unit_vectors_are_refused(tmp_path: Path) -> None:
    class Broken(WordEmbedder):
        def embed(self, texts: object, report: object = None) -> np.typing.NDArray[np.float32]:
            return np.full((2, 64), np.nan, np.float32)

    with pytest.raises(IntegrityError, match="2 vectors that are not finite"):
        write(tmp_path / "index", chunks_of("one", "two"), Broken())
    assert not (tmp_path / "index" / "index.json").exists()


def test_an_index_whose_files_do_not_fit_is_refused(tmp_path: Path) -> None:
    write(tmp_path, chunks_of("one", "two"), WordEmbedder())
    np.save(tmp_path / "embeddings.npy", np.ones((3, 64), np.float32) / 8)
    with pytest.raises(IntegrityError, match=r"2 chunks and embeddings float32\(3, 64\)"):
        read_index(tmp_path)
    (tmp_path / "embeddings.npy").unlink()
    with pytest.raises(IntegrityError, match="does not hold an index"):
        read_index(tmp_path)


def test_no_chunks_no_index(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        write(tmp_path, [], WordEmbedder())
