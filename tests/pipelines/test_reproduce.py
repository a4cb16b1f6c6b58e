"""What a reproduction says about outputs that are not the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sluice.pipelines.cli import reproduce as command
from sluice.pipelines.reproduce import (
    OutputComparison,
    Reproduction,
    ScoreDifference,
    State,
    StepComparison,
    _compare_output,
)
from sluice.provenance.artifacts import ArtifactStore
from sluice.training.weights import TensorDifference

ONE, OTHER = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"


class Place:
    """The part of a workspace that comparisons read from."""

    def __init__(self, artifacts: ArtifactStore) -> None:
        self.artifacts = artifacts

    def file(self, digest: str, path: str) -> bytes:
        return self.artifacts.read_file(digest, path)

    def folder(self, digest: str) -> Path:
        return self.artifacts.fetch(digest)


def account(artifacts: ArtifactStore, loss: float, seconds: float) -> str:
    point = {"step": 1, "loss": loss, "learning_rate": 0.1, "tokens_per_second": 1 / seconds}
    told = {
        "steps": 1,
        "examples": 2,
        "final_loss": loss,
        "validation_loss": None,
        "seconds": seconds,
        "curve": [point],
    }
    return artifacts.put_files({"training.json": json.dumps(told).encode()}, "training").digest


def test_an_account_is_the_same_when_only_its_times_differ(artifacts: ArtifactStore) -> None:
    place: Any = Place(artifacts)
    recorded = account(artifacts, 0.5, 10.0)
    slower = _compare_output(place, "training", recorded, account(artifacts, 0.5, 99.0))
    assert (slower.same, slower.account) == (True, True)
    other = _compare_output(place, "training", recorded, account(artifacts, 0.4, 10.0))
    assert not other.same
    assert "other losses" in other.note


def test_files_that_differ_are_named(artifacts: ArtifactStore) -> None:
    place: Any = Place(artifacts)
    one = artifacts.put_files({"card.json": b"1", "train.jsonl": b"1"}, "dataset").digest
    two = artifacts.put_files({"card.json": b"1", "train.jsonl": b"2"}, "dataset").digest
    renamed = artifacts.put_files({"card.json": b"1", "train.jsonl": b"1"}, "dataset", {"policy": "x"}).digest
    assert _compare_output(place, "dataset", one, one).same
    assert _compare_output(place, "dataset", one, two).note == "train.jsonl differ"
    assert _compare_output(place, "dataset", one, renamed).note == "the metadata differ"


@pytest.mark.parametrize(
    ("states", "state"),
    [
        (("same", "not rerun"), "same"),
        (("same", "differs"), "differs"),
        (("not rerun",), "not rerun"),
        ((), "not rerun"),
    ],
)
def test_one_step_that_differs_decides(states: tuple[State, ...], state: State) -> None:
    assert Reproduction(ONE, tuple(StepComparison("train", ONE, one) for one in states)).state == state


def test_a_difference_is_shown_with_its_reason_and_measure(capsys: pytest.CaptureFixture[str]) -> None:
    step = StepComparison(
        "train",
        ONE,
        "differs",
        12.0,
        (OutputComparison("adapter", ONE, OTHER, same=False, note="adapter_model.safetensors differ"),),
        reasons=("the hardware (cores) is another: was 2, is 4",),
        weights=(TensorDifference("base_model.model.q_proj.lora_A.weight", 0.25, 0.1, 0.5, 0.875),),
        scores=(ScoreDifference("token_f1", 0.5, 0.75), ScoreDifference("rouge_l", None, 0.5)),
    )
    command._show(Reproduction(ONE, (step,)))
    shown = capsys.readouterr().out
    for word in ("DIFFERS", "was 2, is 4", "q_proj.lora_A", "0.875000000", "+0.2500", "none"):
        assert word in shown
