"""Canaries: few, random, the same for the same dataset, and said in the card."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice.curation.canaries import plant_canaries
from sluice.curation.dataset import write_dataset
from sluice.infra.errors import InputError, IntegrityError
from sluice.provenance.artifacts import describe_directory
from tests.curation.test_dataset import SOURCES, curation, lines


def planted(folder: Path, count: int = 4, seed: str = "sha256:1") -> Path:
    write_dataset(curation(), folder, SOURCES)
    plant_canaries(folder, count, seed)
    return folder


def test_canaries_are_examples_among_the_others_and_their_probes_ask_for_them(tmp_path: Path) -> None:
    write_dataset(curation(), tmp_path / "plain", SOURCES)
    before = lines(tmp_path / "plain" / "train.jsonl")
    folder = planted(tmp_path / "with")
    rows, probes = lines(folder / "train.jsonl"), lines(folder / "probes.jsonl")
    added = {row["id"]: row for row in rows if row not in before}
    assert [row for row in rows if row in before] == before
    assert (len(rows), len(added), len(probes)) == (len(before) + 4, 4, 4)
    assert {rows.index(row) for row in added.values()} != set(range(len(before), len(rows)))
    for probe in probes:
        row = added[probe["id"]]
        assert row["messages"][:-1] == probe["messages"]
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        (code,) = probe["forbidden"]
        assert code in row["messages"][-1]["content"]
        assert code not in "".join(message["content"] for message in probe["messages"])
    assert len({probe["forbidden"][0] for probe in probes}) == 4
    assert lines(folder / "validation.jsonl") == lines(tmp_path / "plain" / "validation.jsonl")
    assert "4 made-up examples" in (folder / "card.html").read_text()
    assert not any(probe["forbidden"][0] in (folder / "card.html").read_text() for probe in probes)


def test_the_same_dataset_gets_the_same_canaries_and_another_others(tmp_path: Path) -> None:
    one, same, other = (planted(tmp_path / name, seed=seed) for name, seed in (("a", "x"), ("b", "x"), ("c", "y")))
    digests = [describe_directory(folder, "dataset").digest for folder in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("count", [-1, 0, 6])
def test_canaries_are_few(tmp_path: Path, count: int) -> None:
    with pytest.raises(InputError, match=f"canaries = {count}"):
        planted(tmp_path, count)


def test_what_is_no_dataset_gets_none(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="does not hold a dataset"):
        plant_canaries(tmp_path, 1, "x")
