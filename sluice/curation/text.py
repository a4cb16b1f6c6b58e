"""How texts are compared: one normal form and one way to cut words, for de-duplication and decontamination alike."""

from __future__ import annotations

import re
import unicodedata

_WORD = re.compile(r"\w+")


def words(text: str) -> tuple[str, ...]:
    """The words of a text: compatibility forms folded (NFKC), case folded, punctuation dropped."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def normalise(text: str) -> str:
    """The words with single blanks between. Two texts of the same normal form are the same question."""
    return " ".join(words(text))


def grams(tokens: tuple[str, ...], size: int) -> frozenset[tuple[str, ...]]:
    """All runs of `size` words; none for a shorter text."""
    return frozenset(tokens[i : i + size] for i in range(len(tokens) - size + 1))


def overlap(left: frozenset[str], right: frozenset[str]) -> float:
    """Jaccard similarity of two sets of words: shared over all; 0 when both are empty."""
    union = len(left | right)
    return len(left & right) / union if union else 0.0
