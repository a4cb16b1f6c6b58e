"""A corpus snapshot: the documents as they were at one moment, in one file whose digest is the corpus.

`documents.jsonl` holds one canonical JSON object a line, in order of document id, so the same documents give the same
bytes. Two sources: a directory of Markdown or plain text, and the construction FAQ that comes as a Python package.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from sluice.infra.errors import InputError, IntegrityError, UnavailableError
from sluice.provenance.canonical import Json, canonical_json, digest_file

DOCUMENTS_FILE = "documents.jsonl"
FAQ_PACKAGE = "zaragoza_construction_faq"
FAQ_LICENSE = "CC-BY-4.0"
_TEXT_SUFFIXES = frozenset({".md", ".markdown", ".txt"})


@dataclass(frozen=True)
class Document:
    """One source document. `text` is Markdown (plain text is a special case of it), normalised to NFC.

    `license` is an SPDX identifier where one exists, `source` says where the text came from, and `attribution` is the
    sentence its licence asks for (empty when it asks for none).
    """

    id: str
    title: str
    text: str
    license: str
    source: str
    attribution: str = ""


@dataclass(frozen=True)
class Snapshot:
    """A written snapshot: its folder (ready to be stored as an artifact of kind `corpus`) and metadata for it."""

    folder: Path
    digest: str
    documents: int

    @property
    def metadata(self) -> dict[str, Json]:
        return {"documents": self.documents}


@dataclass(frozen=True)
class FaqItem:
    """One question of the FAQ with its answer and category (a slug, for example `bygglov`)."""

    id: str
    category: str
    question: str
    answer: str


def snapshot_faq(folder: Path) -> Snapshot:
    """Snapshot the FAQ's English edition: one document a category, one paragraph an answer, without the questions.

    Leaving the questions out keeps retrieval honest: a question has to find its answer by meaning, not by its own text.
    """
    items, meta = load_faq(), _faq_meta()
    source = f"{meta['title']} {meta['version']}, {meta['repository']}"
    attribution = f"{meta['attribution_required']} {meta['repository']} ({meta['license_url']})"
    documents = []
    for category in sorted({item.category for item in items}):
        title = humanise(category)
        answers = [item.answer for item in items if item.category == category]
        text = "\n\n".join([f"# {title}", *answers]) + "\n"
        documents.append(Document(faq_document_id(category), title, text, FAQ_LICENSE, source, attribution))
    return write_snapshot(documents, folder)


def snapshot_directory(source: Path, folder: Path, *, license: str = "", attribution: str = "") -> Snapshot:
    """Snapshot every Markdown and text file under `source`; hidden files, links and empty files are passed over.

    A document's id is its path under `source`, its title the first heading or the file's name. Raises `InputError`
    for a folder that is missing or holds no text, and for a file that is not UTF-8.
    """
    if not source.is_dir():
        raise InputError(f"source = {str(source)!r} is not a folder.", hint="Give a folder of .md or .txt files.")
    documents = []
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or path.is_symlink() or not path.is_file() or path.suffix.lower() not in _TEXT_SUFFIXES:
            continue
        try:
            text = unicodedata.normalize("NFC", path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise InputError(
                f"The file {str(path)!r} is not UTF-8 text: {error.reason} at byte {error.start}.",
                hint="Convert it (`iconv -t UTF-8`) or move it out of the corpus.",
            ) from error
        if text.strip():
            name = relative.as_posix()
            documents.append(Document(name, _title(text, path.stem), text, license, name, attribution))
    if not documents:
        raise InputError(
            f"source = {str(source)!r} holds no text.", hint=f"Looked for {', '.join(sorted(_TEXT_SUFFIXES))}."
        )
    return write_snapshot(documents, folder)


def write_snapshot(documents: Iterable[Document], folder: Path) -> Snapshot:
    """Write `documents.jsonl`, whole or not at all. Raises `InputError` when two documents share an id."""
    ordered = sorted(documents, key=lambda document: document.id)
    for first, second in pairwise(ordered):
        if first.id == second.id:
            raise InputError(f"Two documents have the id {first.id!r}.")
    folder.mkdir(parents=True, exist_ok=True)
    target, staging = folder / DOCUMENTS_FILE, folder / f".{DOCUMENTS_FILE}"
    staging.write_bytes(b"".join(canonical_json(asdict(document)) + b"\n" for document in ordered))
    staging.replace(target)
    return Snapshot(folder, digest_file(target), len(ordered))


def read_documents(folder: Path) -> list[Document]:
    """The documents of a snapshot, in order of id. Raises `IntegrityError` for a file that is not a snapshot."""
    path = folder / DOCUMENTS_FILE
    try:
        return [Document(**json.loads(line)) for line in path.read_text().splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise IntegrityError(f"{path} is not a corpus snapshot: {error}.") from error


@cache
def load_faq() -> tuple[FaqItem, ...]:
    """The FAQ's English edition, in the package's order. Raises `UnavailableError` when it is not installed."""
    raw = _faq_package().load(lang="en")
    return tuple(FaqItem(q["id"], q["category"], _clean(q["q"]), _clean(q["a"])) for q in raw)


def faq_document_id(category: str) -> str:
    """The id of the document that holds a category's answers."""
    return f"faq/{category}"


def humanise(slug: str) -> str:
    """`altan-staket-plank` as a heading: `Altan staket plank`."""
    words = slug.replace("-", " ").replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def _faq_package() -> Json:
    try:
        import zaragoza_construction_faq
    except ImportError as error:
        raise UnavailableError(
            f"The FAQ package {FAQ_PACKAGE} is not installed.", hint="Install requirements/main.lock."
        ) from error
    return zaragoza_construction_faq


@cache
def _faq_meta() -> dict[str, str]:
    meta: dict[str, str] = _faq_package().meta(lang="en")
    return meta


def _clean(text: str) -> str:
    # An answer is one paragraph of the document: a line break inside it would otherwise cut it in two.
    return unicodedata.normalize("NFC", " ".join(text.split()))


def _title(text: str, fallback: str) -> str:
    for line in text.splitlines():
        if line.startswith("#"):
            return line.lstrip("#").strip() or humanise(fallback)
    return humanise(fallback)
