"""Documents cut into chunks at headings and paragraphs.

A chunk's id follows from its document and its text alone, so an unchanged paragraph keeps its id however the document
around it changes, and inserting a chunk twice is inserting it once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from sluice.infra.errors import InputError
from sluice.provenance.canonical import digest_bytes, digest_json, hex_of
from sluice.rag.corpus import Document

ALGORITHM = "markdown-paragraph-1"
"""Change this name with every change that can cut a text differently: it is part of the chunker's digest."""

_HEADING = re.compile(r"^(#{1,6})\s+(.*?)\s*#*\s*$")
_FENCE = re.compile(r"^\s{0,3}(```+|~~~+)")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Chunk:
    """One retrievable passage. `heading` is the path of headings above it, joined with ` > `."""

    id: str
    document_id: str
    heading: str
    text: str
    text_digest: str


@dataclass(frozen=True)
class ChunkerSettings:
    """`max_words`: a longer paragraph is cut at sentence ends. 180 words are about 240 of the model's 256 tokens."""

    max_words: int = 180

    def __post_init__(self) -> None:
        if self.max_words < 8:
            raise InputError(f"max_words = {self.max_words} is too small.", hint="At least 8 words make a chunk.")

    @property
    def digest(self) -> str:
        """The chunker's identity: the same digest cuts the same text the same way."""
        return digest_json({"algorithm": ALGORITHM, **asdict(self)})


def chunk_id(document_id: str, text_digest: str) -> str:
    """32 hexadecimal digits that follow from the document and the text."""
    return hex_of(digest_json([document_id, text_digest]))[:32]


def chunk_documents(documents: Iterable[Document], settings: ChunkerSettings | None = None) -> list[Chunk]:
    """All chunks in document order. A text that a document repeats is one chunk, at its first place.

    Raises `InputError` when nothing is left to index.
    """
    chosen = settings or ChunkerSettings()
    chunks: dict[str, Chunk] = {}
    for document in documents:
        for heading, block in _blocks(document):
            for text in _fit(block, chosen.max_words):
                text_digest = digest_bytes(text.encode())
                chunk = Chunk(chunk_id(document.id, text_digest), document.id, heading, text, text_digest)
                chunks.setdefault(chunk.id, chunk)
    if not chunks:
        raise InputError("The corpus has no paragraph of text, so there is nothing to index.")
    return list(chunks.values())


def _blocks(document: Document) -> Iterator[tuple[str, str]]:
    """(heading path, paragraph or whole code block) in order."""
    path: list[tuple[int, str]] = []
    lines: list[str] = []
    fence = ""

    def heading() -> str:
        return " > ".join(title for _, title in path) or document.title

    for line in [*document.text.splitlines(), ""]:
        opened = _FENCE.match(line)
        if fence:
            lines.append(line)
            if opened and opened[1].startswith(fence) and line.strip() == opened[1]:
                fence = ""
            continue
        found = _HEADING.match(line)
        if opened:
            fence = opened[1]
            lines.append(line)
        elif line.strip() and not found:
            lines.append(line)
        elif lines:
            yield heading(), "\n".join(lines)
            lines = []
        if found:
            level = len(found[1])
            path = [entry for entry in path if entry[0] < level] + [(level, found[2])]
    if lines:  # a code block that was never closed
        yield heading(), "\n".join(lines).rstrip()


def _fit(block: str, max_words: int) -> Iterator[str]:
    """The block itself when it fits; else pieces of at most `max_words` words, at line or sentence ends if possible."""
    if _FENCE.match(block):
        pieces, joint = block.splitlines(), "\n"
    else:
        pieces, joint = _SENTENCE_END.split(" ".join(block.split())), " "
    if len(block.split()) <= max_words:
        yield joint.join(pieces)
        return
    current: list[str] = []
    size = 0
    for piece in pieces:
        words = piece.split()
        if size + len(words) > max_words and current:
            yield joint.join(current)
            current, size = [], 0
        while len(words) > max_words:
            yield " ".join(words[:max_words])
            words = words[max_words:]
            piece = " ".join(words)
        current.append(piece)
        size += len(words)
    if size:
        yield joint.join(current)
