from __future__ import annotations

import pytest

from sluice.infra.errors import InputError
from sluice.rag.milvus import alias_name, collection_name, is_collection_of
from sluice.rag.retrieve import Retriever, fuse
from tests.rag.word_embedder import WordEmbedder

DIGEST = "sha256:" + "0123456789abcdef" * 4


def test_fusion_scales_each_list_and_trusts_the_dense_one_more() -> None:
    fused = dict(fuse({"a": 0.9, "b": 0.8, "c": 0.5}, {"b": 30.0, "d": 10.0}))
    assert fused["a"] == pytest.approx(0.9)
    assert fused["b"] == pytest.approx(0.9 * 0.75 + 0.1)
    assert fused["c"] == fused["d"] == 0.0
    assert next(iter(fused)) == "a"


def test_words_decide_between_near_neighbours() -> None:
    assert fuse({"a": 0.80, "b": 0.79, "c": 0.5}, {"b": 20.0, "a": 1.0})[0][0] == "b"


def test_fusion_of_degenerate_lists() -> None:
    assert [(key, round(score, 9)) for key, score in fuse({"a": 0.5}, {})] == [("a", 0.9)]
    assert [key for key, _ in fuse({"b": 0.5, "a": 0.5}, {})] == ["a", "b"]
    assert fuse({}, {}) == []


def test_names_that_milvus_accepts() -> None:
    assert alias_name("my-assistant") == "my_assistant"
    assert collection_name("my-assistant", DIGEST) == "my_assistant_0123456789ab"
    assert is_collection_of("my-assistant", "my_assistant_0123456789ab")
    assert not is_collection_of("my", "my_assistant_0123456789ab")
    assert not is_collection_of("my-assistant", "my_assistant_back_1")
    with pytest.raises(InputError, match="My App"):
        alias_name("My App")


@pytest.mark.parametrize(("questions", "k"), [(["Why?"], 0), (["Why?"], 21), (["Why?", " "], 2)])
def test_senseless_questions_are_refused_before_any_call(questions: list[str], k: int) -> None:
    with pytest.raises(InputError):
        Retriever("http://127.0.0.1:1", "assistant", WordEmbedder()).retrieve_many(questions, k)
