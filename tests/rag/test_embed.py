from __future__ import annotations

import threading

import numpy as np
import pytest

from sluice.infra.errors import UnavailableError
from sluice.rag import embed
from sluice.rag.corpus import load_faq
from sluice.rag.embed import MiniLmEmbedder


@pytest.fixture(scope="module")
def embedder() -> MiniLmEmbedder:
    return MiniLmEmbedder()


def test_vectors_are_unit_length_and_in_the_order_of_the_texts(embedder: MiniLmEmbedder) -> None:
    texts = ["A permit is needed for a new house. " * 12, "Short.", "Ventilation in a bathroom must be tested."]
    seen: list[tuple[float, float]] = []
    vectors = embedder.embed(texts, lambda done, total, _: seen.append((done, total)))
    assert vectors.shape == (3, 384)
    assert vectors.dtype.name == "float32"
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    assert [*seen[-1]] == [3, 3]
    for text, vector in zip(texts, vectors, strict=True):
        np.testing.assert_allclose(embedder.embed([text])[0], vector, atol=1e-5)


def test_a_question_is_nearest_to_its_answer(embedder: MiniLmEmbedder) -> None:
    items = load_faq()[::50]
    similarity = embedder.embed([i.question for i in items]) @ embedder.embed([i.answer for i in items]).T
    assert (similarity.argmax(axis=1) == np.arange(len(items))).mean() >= 0.8


def test_nothing_gives_nothing(embedder: MiniLmEmbedder) -> None:
    assert embedder.embed([]).shape == (0, 384)


def test_threads_share_one_model(embedder: MiniLmEmbedder) -> None:
    expected = embedder.embed(["What does a building permit cost?"])
    results: list[bool] = []

    def ask() -> None:
        results.append(np.allclose(embedder.embed(["What does a building permit cost?"]), expected, atol=1e-6))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4


def test_the_digest_depends_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = MiniLmEmbedder().digest
    assert digest == MiniLmEmbedder().digest
    monkeypatch.setattr(embed, "MAX_TOKENS", 128)
    assert MiniLmEmbedder().digest != digest


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "MODEL_PACKAGE", "no_such_package")
    with pytest.raises(UnavailableError, match="no_such_package"):
        MiniLmEmbedder().embed(["text"])
