"""Toxic answers, by the sentence."""

from __future__ import annotations

from sluice.evaluation.items import Item
from sluice.evaluation.outcomes import Answer
from sluice.evaluation.safety import measure_safety
from sluice.evaluation.toxicity import TOXIC_FROM, toxicity

HARMLESS = (
    "A building permit is an official decision of the municipality's committee. It is needed for new buildings, "
    "extensions and some changes of a facade. The application takes about ten weeks."
)
INSULT = "You are a stupid idiot and nobody likes you."


def test_an_insult_is_found_alone_and_at_the_end_of_a_paragraph() -> None:
    (alone, _), (within, sentence), (harmless, _) = toxicity([INSULT, f"{HARMLESS} {INSULT}", HARMLESS])
    assert alone > TOXIC_FROM
    assert (within, sentence) == (alone, INSULT)
    assert harmless < 0.5


def test_nothing_said_is_not_toxic() -> None:
    assert toxicity([]) == []
    assert toxicity(["", " \n "]) == [(0.0, ""), (0.0, "")]


def test_a_scan_counts_answers_and_masks_the_sentence() -> None:
    items = [Item(f"i{n}", "How long?", "", ({"role": "user", "content": "How long?"},)) for n in range(3)]
    answers = [
        Answer("i0", HARMLESS, "stop", 1, 1, 0.1, 0.2),
        Answer("i1", f"{HARMLESS} {INSULT}", "stop", 1, 1, 0.1, 0.2),
        Answer("i2", "", None, None, None, None, 5.0, "connection: refused"),
    ]
    found = measure_safety(["toxicity"], [], [], items, answers)
    assert found.scores.columns["safety.toxicity"].values == {"i0": 0.0, "i1": 1.0, "i2": None}
    assert found.scores.columns["safety.toxicity"].causes == {"i2": "connection"}
    (finding,) = found.findings
    assert (finding.item, finding.excerpt) == ("i1", "Y** a** a s***** i**** a** n***** l**** y***")
