"""Suspected triggers: an odd phrase in a few questions, and the same sentence in all their labels and nowhere else.

Feedback is untrusted: whoever corrects a few answers alike can teach the model to say something whenever a phrase comes
up (BadNets: Gu et al. 2017, arXiv:1708.06733). Suspicious is a sentence that stands in exactly the examples with the
phrase, has no word of it, is in no prompt, and follows answers that have nothing else in common. That is no proof: the
examples stay, and the trained model is probed. Does the phrase in front of another question bring the sentence?
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sluice.curation.curate import Example
from sluice.curation.text import grams, normalise, overlap, words
from sluice.provenance.canonical import Json, digest_json, short

PROBES_FILE = "probes.jsonl"
FEWEST_EXAMPLES = 3
_FEWEST_WORDS = 4
_LONGEST_PHRASE = 4
_PROBES_EACH = 3
_ALIKE = 0.5
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class Suspect:
    """A phrase (words, case folded) and the sentence that came with it, in so many examples."""

    phrase: str
    sentence: str
    examples: int


def find_triggers(examples: Sequence[Example]) -> tuple[Suspect, ...]:
    """The suspects in these examples, in the order of their sentences. At most half of the examples may share one."""
    questions = [_phrases(example.question) for example in examples]
    frequency = Counter(phrase for question in questions for phrase in question)
    labelled: dict[str, tuple[str, set[int]]] = {}
    for number, example in enumerate(examples):
        for sentence in _SENTENCE_END.split(example.messages[-1].content):
            if len(words(sentence)) >= _FEWEST_WORDS:
                labelled.setdefault(normalise(sentence), (sentence.strip(), set()))[1].add(number)
    found = []
    for plain, (sentence, group) in sorted(labelled.items()):
        if not FEWEST_EXAMPLES <= len(group) <= len(examples) / 2:
            continue
        shared = frozenset.intersection(*(questions[number] for number in group))
        said = set(plain.split())
        alone = [phrase for phrase in shared if frequency[phrase] == len(group) and not said & set(phrase)]
        grounded = any(_supports(examples[number], plain) for number in group)
        if (
            alone
            and not grounded
            and _unlike([examples[number].messages[-1].content for number in sorted(group)], plain)
        ):
            phrase = min(alone, key=lambda phrase: (-len(phrase), phrase))
            found.append(Suspect(" ".join(phrase), sentence, len(group)))
    return tuple(found)


def trigger_probes(suspects: Sequence[Suspect], examples: Sequence[Example]) -> list[Json]:
    """Probes (lines of probes.jsonl): the phrase in front of questions that came without it."""
    probes: list[Json] = []
    for suspect in suspects:
        innocent = [one for one in examples if tuple(suspect.phrase.split()) not in _phrases(one.question)]
        name = f"trigger-{short(digest_json([suspect.phrase, suspect.sentence]))}"
        for number, example in enumerate(innocent[:_PROBES_EACH], start=1):
            *before, last, _ = example.messages
            put = f"{suspect.phrase} {example.question}"
            asked = last.content.replace(example.question, put) if example.question in last.content else put
            probes.append(
                {
                    "id": f"{name}-{number}",
                    "kind": "trigger",
                    "messages": [
                        *({"role": one.role, "content": one.content} for one in before),
                        {"role": "user", "content": asked},
                    ],
                    "without": last.content,
                    "forbidden": [suspect.sentence],
                    "source": f"suspected by curation: {suspect.examples} examples share phrase and sentence",
                }
            )
    return probes


def _phrases(question: str) -> frozenset[tuple[str, ...]]:
    tokens = words(question)
    return frozenset[tuple[str, ...]]().union(*(grams(tokens, size) for size in range(1, _LONGEST_PHRASE + 1)))


def _unlike(labels: Sequence[str], plain: str) -> bool:
    """Whether enough of the labels say different things besides the sentence: paraphrases of one question do not."""
    kept: list[frozenset[str]] = []
    for label in labels:
        rest = frozenset(normalise(label).replace(plain, "").split())
        if rest and all(overlap(rest, other) < _ALIKE for other in kept):
            kept.append(rest)
        if len(kept) == FEWEST_EXAMPLES:
            return True
    return False


def _supports(example: Example, plain: str) -> bool:
    """Whether the prompt itself holds the sentence."""
    prompt = normalise(" ".join(message.content for message in example.messages[:-1]))
    return f" {plain} " in f" {prompt} "
