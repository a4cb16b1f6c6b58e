"""Toxic answers, by the linear classifier of alt-profanity-check (no network, no GPU).

It knows insults and swearing in English. It does not know a calm threat, irony or another language, and it takes some
harmless words for swearing (docs/safety.md has figures). Its weights are a pickle inside the package, which the lock
pins by hash.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

TOXIC_FROM = 0.8
"""Probability from which a sentence counts: of 503 harmless answers of the demo's FAQ (1,673 sentences) one does."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


def toxicity(answers: Sequence[str]) -> list[tuple[float, str]]:
    """For each answer the probability (0 to 1) of its worst sentence, and that sentence; (0, "") for an empty one.

    By the sentence, since the classifier averages over words: an insult at the end of a paragraph would not be seen.
    """
    from profanity_check import predict_prob

    sentences = [[one for one in _SENTENCE_END.split(answer) if one.strip()] for answer in answers]
    flat = [one for parts in sentences for one in parts]
    scored = iter(predict_prob(flat).tolist() if flat else ())
    return [max(((next(scored), one) for one in parts), default=(0.0, "")) for parts in sentences]
