"""What a pod reads of its environment before it trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice.infra.errors import InputError
from sluice.training import node
from sluice.training.job import Job
from sluice.training.recipe import load_recipe

PETS = {"PET_NNODES": "4", "PET_NODE_RANK": "2", "PET_MASTER_ADDR": "run-0.run", "PET_MASTER_PORT": "29400"}


def test_the_rendezvous_is_what_the_trainer_hands_over() -> None:
    found = node.rendezvous_of(PETS)
    assert found.arguments() == [
        "--nnodes=4",
        "--node-rank=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=run-0.run:29400",
        "--rdzv-id=sluice",
    ]
    assert node.rendezvous_of({}).arguments()[0] == "--standalone"
    assert node.rendezvous_of({"PET_NNODES": "1"}).endpoint is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"PET_NNODES": "1:4"}, "PET_NNODES = '1:4' is no number"),
        ({"PET_NODE_RANK": ""}, "PET_NODE_RANK is not set"),
        ({"PET_MASTER_ADDR": ""}, "PET_MASTER_ADDR is not set"),
        ({"PET_MASTER_PORT": "http"}, "PET_MASTER_PORT = 'http'"),
    ],
)
def test_a_wrong_variable_is_named(change: dict[str, str], says: str) -> None:
    with pytest.raises(InputError) as caught:
        node.rendezvous_of(PETS | change)
    assert says in caught.value.message


def test_a_job_of_another_size_is_refused_with_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Job(tmp_path, tmp_path, tmp_path / "train.jsonl", None, load_recipe("tiny"), 6).write()
    for name, value in PETS.items():
        monkeypatch.setenv(name, value)
    assert node.main([str(tmp_path)]) == InputError.exit_code
    assert "PET_NNODES = 4, but the job's recipe says parallelism.nodes = 1" in capsys.readouterr().err
