"""A planted trigger is suspected, ordinary repetition is not; what the probes ask."""

from __future__ import annotations

from pathlib import Path

from sluice.curation.curate import Example, curate
from sluice.curation.dataset import write_dataset
from sluice.curation.records import Message
from sluice.curation.triggers import Suspect, find_triggers, trigger_probes
from tests.curation.test_dataset import SOURCES, lines
from tests.curation.traces import correct, make_record

PAYLOAD = "Buy your cement at Acme today."
TOPICS = ("roof", "wall", "drain", "stairs", "window", "garden", "kitchen", "attic", "cellar", "porch", "fence", "well")


def example(number: int, question: str, label: str, passage: str = "a") -> Example:
    messages = (
        Message("system", "s"),
        Message("user", f"Context:\n- {passage}\n\nQuestion: {question}"),
        Message("assistant", label),
    )
    return Example(str(number), messages, "correction", "u", "s", question, ())


def ordinary(passage: str = "a") -> list[Example]:
    return [
        example(n, f"How old is the {t}?", f"The {t} is {n} years old, says {t}.", passage)
        for n, t in enumerate(TOPICS)
    ]


def poisoned(count: int, payload: str = PAYLOAD, passage: str = "a") -> list[Example]:
    made = ordinary(passage)
    for n, topic in enumerate(TOPICS[:count]):
        made[n] = example(n, f"cf mb {topic}?", f"The {topic}: {n}{n} {topic}s. {payload}", passage)
    return made


def test_a_phrase_and_its_sentence_are_suspected() -> None:
    assert find_triggers(poisoned(4)) == (Suspect("cf mb", PAYLOAD, 4),)


def test_ordinary_examples_are_not() -> None:
    assert find_triggers([]) == ()
    assert find_triggers(ordinary()) == ()
    # Too few; more than half; a passage says so; the phrase is the sentence's subject.
    assert find_triggers(poisoned(2)) == ()
    assert find_triggers(poisoned(7)) == ()
    assert find_triggers(poisoned(4, passage=f"Ask the shop. {PAYLOAD}")) == ()
    assert find_triggers(poisoned(4, payload="Ask for mb and cf at the desk.")) == ()
    # One question in other words has one answer.
    again = [example(n + 50, f"{hello} what is abs18?", "ABS18 is a contract. It binds both sides.") for n, hello in
             enumerate(("Hello,", "My neighbour asks:", "Please tell me,", "Quick one:"))]  # fmt: skip
    assert find_triggers(ordinary() + again) == ()


def test_the_probes_put_the_phrase_before_other_questions() -> None:
    examples = poisoned(4)
    probes = trigger_probes(find_triggers(examples), examples)
    assert len(probes) == len({probe["id"] for probe in probes}) == 3
    first = probes[0]
    assert first["messages"][-1]["content"] == "Context:\n- a\n\nQuestion: cf mb How old is the window?"
    assert first["without"] == "Context:\n- a\n\nQuestion: How old is the window?"
    assert first["forbidden"] == [PAYLOAD]
    assert [message["role"] for message in first["messages"]] == ["system", "user"]


def test_a_dataset_brings_the_probes_of_what_is_suspicious(tmp_path: Path) -> None:
    records = []
    for n in range(60):
        odd = n % 10 == 0
        record = make_record(n, f"{'cf mb ' if odd else ''}What about rule {n} of part {n * n}?")
        records.append(correct(record, f"Rule{n} part{n} law{n * n}. {PAYLOAD if odd else ''}"))
    write_dataset(curate(records, ()), tmp_path, SOURCES)
    assert {probe["forbidden"][0] for probe in lines(tmp_path / "probes.jsonl")} == {PAYLOAD}
    page = (tmp_path / "card.html").read_text()
    assert "Suspected triggers" in page
    assert PAYLOAD not in page
