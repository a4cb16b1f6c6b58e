from __future__ import annotations

from pathlib import Path

import pytest

from sluice.infra.errors import InputError
from sluice.rag.chunk import ChunkerSettings, chunk_documents
from sluice.rag.corpus import load_faq, read_documents, snapshot_faq
from sluice.rag.queries import faq_queries, read_queries, write_queries


def test_every_question_points_at_the_chunk_with_its_answer(tmp_path: Path) -> None:
    snapshot_faq(tmp_path)
    chunks = chunk_documents(read_documents(tmp_path))
    texts = {chunk.id: chunk.text for chunk in chunks}
    queries = faq_queries(chunks)
    answers: dict[str, set[str]] = {}
    for item in load_faq():
        answers.setdefault(item.question, set()).add(item.answer)
    assert len(queries) == len(answers) == 497
    for query in queries:
        assert {texts[one] for one in query.chunk_ids} == answers[query.question]


def test_an_answer_cut_in_pieces_accepts_any_piece(tmp_path: Path) -> None:
    snapshot_faq(tmp_path)
    chunks = chunk_documents(read_documents(tmp_path), ChunkerSettings(max_words=20))
    texts = {chunk.id: chunk.text for chunk in chunks}
    first, item = faq_queries(chunks)[0], load_faq()[0]
    assert first.question == item.question
    assert len(first.chunk_ids) > 1
    assert all(texts[one] in item.answer for one in first.chunk_ids)


def test_a_holdout_can_be_left_out(tmp_path: Path) -> None:
    snapshot_faq(tmp_path)
    chunks = chunk_documents(read_documents(tmp_path))
    item = load_faq()[0]
    assert item.question in {query.question for query in faq_queries(chunks)}
    assert item.question not in {query.question for query in faq_queries(chunks, exclude={item.id})}


def test_another_corpus_is_noticed(tmp_path: Path) -> None:
    snapshot_faq(tmp_path)
    chunks = [c for c in chunk_documents(read_documents(tmp_path)) if c.document_id != "faq/bygglov"]
    with pytest.raises(InputError, match="bygglov-001"):
        faq_queries(chunks)


def test_queries_in_a_file(tmp_path: Path) -> None:
    snapshot_faq(tmp_path)
    queries = faq_queries(chunk_documents(read_documents(tmp_path)))
    write_queries(queries, tmp_path / "queries.jsonl")
    assert read_queries(tmp_path / "queries.jsonl") == queries
    (tmp_path / "bad.jsonl").write_text('{"question": "Why?", "chunk_ids": []}\n')
    with pytest.raises(InputError, match=r"Line 1 of .*bad\.jsonl"):
        read_queries(tmp_path / "bad.jsonl")
