from __future__ import annotations

from pathlib import Path

import pytest

from sluice.infra.errors import InputError
from sluice.rag.chunk import ChunkerSettings, chunk_documents
from sluice.rag.corpus import Document, load_faq, read_documents, snapshot_faq


def document(text: str, id: str = "doc") -> Document:
    return Document(id, "Title", text, "MIT", "test")


def test_every_faq_answer_is_one_chunk(tmp_path: Path) -> None:
    snapshot_faq(tmp_path)
    chunks = chunk_documents(read_documents(tmp_path))
    assert sorted(chunk.text for chunk in chunks) == sorted(item.answer for item in load_faq())
    assert len({chunk.id for chunk in chunks}) == 503
    assert {chunk.heading for chunk in chunks if chunk.document_id == "faq/rot-avdrag"} == {"Rot avdrag"}


def test_headings_make_a_path_and_end_a_paragraph() -> None:
    text = "before\n# A\none\nstill one\n\ntwo\n## B ##\nthree\n# C\nfour\n"
    assert [(c.heading, c.text) for c in chunk_documents([document(text)])] == [
        ("Title", "before"),
        ("A", "one still one"),
        ("A", "two"),
        ("A > B", "three"),
        ("C", "four"),
    ]


def test_a_code_block_stays_whole_and_its_comment_is_no_heading() -> None:
    code = "```python\n# not a heading\n\nx = 1\n```"
    chunks = chunk_documents([document(f"# A\ntext\n\n{code}\n\nafter\n")])
    assert [(c.heading, c.text) for c in chunks] == [("A", "text"), ("A", code), ("A", "after")]


def test_a_block_that_never_closes_is_kept() -> None:
    assert chunk_documents([document("```\nx = 1\n\ny = 2\n")])[0].text == "```\nx = 1\n\ny = 2"


def test_ids_follow_from_document_and_text_only() -> None:
    first = chunk_documents([document("# A\none\n\ntwo\n")])
    moved = chunk_documents([document("# Other\nnew\n\ntwo\n\none\n")])
    by_text = {chunk.text: chunk.id for chunk in moved}
    assert [by_text[chunk.text] for chunk in first] == [chunk.id for chunk in first]
    assert chunk_documents([document("one", "other")])[0].id != first[0].id


def test_a_repeated_paragraph_is_one_chunk() -> None:
    assert [c.text for c in chunk_documents([document("same\n\nother\n\nsame\n")])] == ["same", "other"]


def test_long_paragraphs_are_cut_at_sentences_and_lose_nothing() -> None:
    sentences = [f"Sentence number {i} has six words." for i in range(10)]
    long_word_run = " ".join(f"w{i}" for i in range(50))
    text = " ".join(sentences) + "\n\n" + long_word_run
    chunks = chunk_documents([document(text)], ChunkerSettings(max_words=20))
    assert max(len(chunk.text.split()) for chunk in chunks) <= 20
    assert " ".join(chunk.text for chunk in chunks).split() == text.split()
    assert chunks[0].text == " ".join(sentences[:3])


def test_the_digest_changes_with_the_settings() -> None:
    assert ChunkerSettings().digest == ChunkerSettings(180).digest
    assert ChunkerSettings(100).digest != ChunkerSettings(180).digest
    with pytest.raises(InputError, match="max_words = 2"):
        ChunkerSettings(2)


def test_a_corpus_without_text_is_refused() -> None:
    with pytest.raises(InputError, match="no paragraph"):
        chunk_documents([document("# Only a heading\n")])
