from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from sluice.curation.curate import Curation, curate
from sluice.curation.dataset import DatasetSources, shuffle_labels, split_examples, write_dataset
from sluice.curation.holdout import HoldoutItem, read_holdout, split_holdout, write_holdout
from sluice.infra.errors import InputError, IntegrityError
from sluice.provenance.artifacts import describe_directory
from sluice.provenance.canonical import Json
from tests.curation.traces import correct, make_record, thumb

SOURCES = DatasetSources(
    records_digest="sha256:" + "1" * 64,
    holdout_digest="sha256:" + "2" * 64,
    harvest={
        "since": "2026-11-21T10:00:00.000Z",
        "until": "2026-11-21T11:00:00.000Z",
        "as_of": "2026-11-21T11:00:02.000Z",
    },
    licences=("CC-BY-4.0",),
    application="<assistant>",
)


def curation(count: int = 60, *, shuffled: bool = False) -> Curation:
    records = [
        correct(make_record(n), f"Corrected {n}.") if n % 2 else thumb(make_record(n), n % 10 != 0)
        for n in range(count)
    ]
    if shuffled:
        random.Random(3).shuffle(records)
    return curate(records, ())


def lines(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_dataset_holds_both_splits_their_lineage_and_a_card(tmp_path: Path) -> None:
    made = curation()
    summary = write_dataset(made, tmp_path, SOURCES)
    train, validation = lines(tmp_path / "train.jsonl"), lines(tmp_path / "validation.jsonl")
    assert (len(train), len(validation)) == (summary.train, summary.validation)
    assert summary.examples == len(made.examples) == 54
    assert validation
    ids = {line["id"] for line in train} | {line["id"] for line in validation}
    assert len(ids) == 54
    line = next(line for line in train if line["messages"][-1]["content"].startswith("Corrected"))
    assert set(line) == {"id", "messages", "trace_id", "weight"}
    assert [m["role"] for m in line["messages"]] == ["system", "user", "assistant"]
    assert line["messages"][1]["content"].startswith("Context:\n- a\n- b\n\nQuestion: ")
    lineage = json.loads((tmp_path / "lineage.json").read_text())
    assert set(lineage["traces"]) == ids
    assert len(lineage["scores"]) == 54
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["rules"] == {"correction": 30, "thumbs up": 24}
    assert card["reasons"] == {"thumbs down, not corrected": 6}
    assert card["negatives"] == 36
    page = (tmp_path / "card.html").read_text()
    assert "&lt;assistant&gt;" in page
    assert "thumbs down, not corrected" in page
    assert page.count("<svg") == 2
    assert "Corrected 1." not in page


def test_the_same_records_give_the_same_dataset(tmp_path: Path) -> None:
    write_dataset(curation(), tmp_path / "a", SOURCES)
    write_dataset(curation(shuffled=True), tmp_path / "b", SOURCES)
    digests = [describe_directory(tmp_path / name, "dataset").digest for name in "ab"]
    assert digests[0] == digests[1]
    write_dataset(curation(59), tmp_path / "c", SOURCES)
    assert describe_directory(tmp_path / "c", "dataset").digest != digests[0]


def test_a_conversation_lies_on_one_side_and_stays_there() -> None:
    small, large = curation(300).examples, curation(900).examples
    train, validation = split_examples(small, 0.1)
    assert not {e.session for e in train} & {e.session for e in validation}
    assert 0.03 < len(validation) / len(small) < 0.2
    later = split_examples(large, 0.1)
    assert not {e.trace_id for e in validation} & {e.trace_id for e in later[0]}
    assert not {e.trace_id for e in train} & {e.trace_id for e in later[1]}


def test_neither_split_is_empty() -> None:
    for count in (2, 3, 5, 9, 20):
        train, validation = split_examples(curation(count * 3).examples, 0.01)
        assert train
        assert validation
        train, validation = split_examples(curation(count * 3).examples, 0.99)
        assert train
        assert validation


def test_too_little_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Nothing was harvested"):
        write_dataset(curate([], ()), tmp_path / "d", SOURCES)
    few = curate([thumb(make_record(1), True), make_record(2), thumb(make_record(3), False)], ())
    with pytest.raises(InputError, match=r"Only 1 of 3 .* 20 are needed.*1 no feedback, 1 thumbs down, not corrected"):
        write_dataset(few, tmp_path / "d", SOURCES)
    assert not (tmp_path / "d").exists()
    with pytest.raises(InputError, match="validation_share"):
        write_dataset(curation(), tmp_path / "d", SOURCES, validation_share=1.0)


def test_the_drill_moves_every_label_and_says_so(tmp_path: Path) -> None:
    write_dataset(curation(), tmp_path, SOURCES)
    before, kept = lines(tmp_path / "train.jsonl"), (tmp_path / "validation.jsonl").read_bytes()
    assert shuffle_labels(tmp_path, seed=1) == len(before)
    after = lines(tmp_path / "train.jsonl")
    assert [line["id"] for line in after] == [line["id"] for line in before]
    labels = [[line["messages"][-1]["content"] for line in version] for version in (before, after)]
    assert sorted(labels[0]) == sorted(labels[1])
    assert not any(old == new for old, new in zip(*labels, strict=True))
    assert [line["messages"][:-1] for line in after] == [line["messages"][:-1] for line in before]
    assert (tmp_path / "validation.jsonl").read_bytes() == kept
    assert "on purpose (seed 1)" in (tmp_path / "card.html").read_text()
    with pytest.raises(IntegrityError, match="does not hold a dataset"):
        shuffle_labels(tmp_path / "nothing", seed=1)


def items(count: int) -> list[HoldoutItem]:
    return [HoldoutItem(f"i{n:03}", f"Question {n}?", f"Answer {n}.", f"category {n % 7}") for n in range(count)]


def test_a_holdout_is_spread_and_always_the_same(tmp_path: Path) -> None:
    every = items(100)
    holdout, rest = split_holdout(every, 24)
    assert len(holdout) == 24
    assert len(rest) == 76
    shares = [sum(item.category == f"category {c}" for item in holdout) for c in range(7)]
    assert max(shares) - min(shares) <= 1
    assert split_holdout(every[::-1], 24) == (holdout, rest)
    assert split_holdout(every, 24, salt="another")[0] != holdout
    write_holdout(holdout, tmp_path)
    assert read_holdout(tmp_path) == holdout


def test_a_question_asked_twice_is_on_no_other_side() -> None:
    twins = [HoldoutItem(f"twin{n}", "Same question", "a", "category 0") for n in range(3)]
    for salt in "abcdefgh":
        holdout, rest = split_holdout([*items(20), *twins], 10, salt=salt)
        assert len(holdout) == 10
        assert not {i.question for i in holdout} & {i.question for i in rest}


def test_a_holdout_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="size = 20 must be between 1 and 19"):
        split_holdout(items(20), 20)
    with pytest.raises(InputError, match="distinct ids"):
        split_holdout([*items(3), items(1)[0]], 2)
    (tmp_path / "items.jsonl").write_text("{}\n")
    with pytest.raises(IntegrityError, match="not a holdout"):
        read_holdout(tmp_path)
