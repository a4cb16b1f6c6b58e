from __future__ import annotations

from pathlib import Path

import pytest

from sluice.infra.errors import InputError, IntegrityError
from sluice.rag.corpus import (
    Document,
    load_faq,
    read_documents,
    snapshot_directory,
    snapshot_faq,
    write_snapshot,
)


def test_faq_is_one_document_a_category_with_answers_only(tmp_path: Path) -> None:
    snapshot = snapshot_faq(tmp_path / "a")
    documents = {document.id: document for document in read_documents(tmp_path / "a")}
    items = load_faq()

    assert len(items) == 503
    assert snapshot.documents == len(documents) == len({item.category for item in items}) == 39
    permits = documents["faq/bygglov"]
    assert permits.title == "Bygglov"
    assert permits.text.startswith("# Bygglov\n\n")
    assert permits.license == "CC-BY-4.0"
    assert "Zaragoza AB" in permits.attribution
    assert "creativecommons.org/licenses/by/4.0" in permits.attribution
    for item in items:
        text = documents[f"faq/{item.category}"].text
        assert item.answer in text
        assert item.question not in text


def test_the_same_documents_give_the_same_digest(tmp_path: Path) -> None:
    assert snapshot_faq(tmp_path / "a").digest == snapshot_faq(tmp_path / "b").digest

    one, two = Document("1", "One", "text", "MIT", "x"), Document("2", "Two", "text", "MIT", "x")
    forward = write_snapshot([one, two], tmp_path / "c")
    assert write_snapshot([two, one], tmp_path / "d").digest == forward.digest
    changed = Document("2", "Two", "another text", "MIT", "x")
    assert write_snapshot([one, changed], tmp_path / "e").digest != forward.digest


def test_directory_takes_text_and_leaves_the_rest(tmp_path: Path) -> None:
    source = tmp_path / "docs"
    (source / "guide").mkdir(parents=True)
    (source / ".git").mkdir()
    (source / "guide" / "start.md").write_text("intro\n\n# Getting started\n\nHello.\n")
    (source / "release-notes.txt").write_text("Plain text.\n")
    (source / "empty.md").write_text("\n")
    (source / "logo.png").write_bytes(b"\x89PNG")
    (source / ".git" / "hidden.md").write_text("secret")
    (source / "link.md").symlink_to(source / "release-notes.txt")

    snapshot_directory(source, tmp_path / "out", license="MIT")

    documents = read_documents(tmp_path / "out")
    assert [(d.id, d.title, d.license) for d in documents] == [
        ("guide/start.md", "Getting started", "MIT"),
        ("release-notes.txt", "Release notes", "MIT"),
    ]


def test_directory_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        snapshot_directory(tmp_path / "nowhere", tmp_path / "out")
    source = tmp_path / "docs"
    source.mkdir()
    with pytest.raises(InputError, match="holds no text"):
        snapshot_directory(source, tmp_path / "out")
    (source / "latin.txt").write_bytes("grävning".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt.*not UTF-8"):
        snapshot_directory(source, tmp_path / "out")


def test_two_documents_with_one_id_are_refused(tmp_path: Path) -> None:
    twin = Document("1", "One", "text", "MIT", "x")
    with pytest.raises(InputError, match="'1'"):
        write_snapshot([twin, twin], tmp_path)


def test_a_damaged_snapshot_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "documents.jsonl").write_text('{"id": "1"}\n')
    with pytest.raises(IntegrityError, match=r"documents\.jsonl"):
        read_documents(tmp_path)
