"""`sluice train --print`: what is shown is what the launcher would create, and bad input gets its sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from sluice.infra.errors import InputError, StepFailed
from sluice.pipelines.cli import app
from sluice.training import preflight_launch
from sluice.training.preflight_report import Finding, PreflightReport
from sluice.training.train_job_launcher import describe_train_job
from tests.training.cluster import IMAGE

DIGEST = "sha256:" + "ab" * 32
RECIPE = """
name: big
schedule: {max_steps: 500, global_batch_size: 64, micro_batch_size: 2}
parallelism: {nodes: 2, processes: 8, backend: nccl}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLUICE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SLUICE_TRAINING__IMAGE", IMAGE)
    monkeypatch.setenv("SLUICE_TRAINING__CLAIM", "fsx-train")
    path = tmp_path / "big.yaml"
    path.write_text(RECIPE)
    return str(path)


def printed(*arguments: str) -> str:
    ended = CliRunner().invoke(app, ["train", *arguments], catch_exceptions=False)
    assert ended.exit_code == 0
    return ended.stdout


def jobs(*arguments: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(printed(*arguments)))


def test_a_train_job_is_printed_with_the_options_given(recipe: str) -> None:
    given = ["--nodes", "4", "--node-type", "p5en.48xlarge", "--queue", "night", "--dataset", DIGEST]
    runtime, job = jobs(recipe, "--print", "trainjob", *given)
    assert (runtime["kind"], job["kind"]) == ("TrainingRuntime", "TrainJob")
    assert job["spec"]["trainer"]["numNodes"] == 4
    assert job["spec"]["trainer"]["resourcesPerNode"]["limits"]["vpc.amazonaws.com/efa"] == "16"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "night"
    assert job["metadata"]["annotations"]["sluice.dev/dataset"] == DIGEST


def test_what_is_printed_is_what_the_launcher_creates(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sluice.pipelines.cli import train

    assert printed(recipe, "--print", "trainjob") == describe_train_job(train._job(recipe, "", "", {}, {}))


def test_all_forms_are_of_one_job(recipe: str) -> None:
    _, job = jobs(recipe, "--print", "trainjob")
    (older,) = jobs(recipe, "--print", "pytorchjob")
    name, work_dir = job["metadata"]["name"], job["spec"]["trainer"]["command"][-1]
    assert older["metadata"]["name"] == name
    for form in ("torchrun", "slurm"):
        text = printed(recipe, "--print", form)
        assert name in text
        assert f"python -m sluice.training.node {work_dir}" in text


def test_the_name_follows_from_the_inputs_alone(recipe: str) -> None:
    def name(*more: str) -> str:
        return str(jobs(recipe, "--print", "trainjob", *more)[1]["metadata"]["name"])

    first = name("--dataset", DIGEST)
    assert name("--dataset", DIGEST, "--queue", "night") == first
    assert len({first, name(), name("--base", DIGEST), name("--dataset", DIGEST, "--nodes", "4")}) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--dataset is missing"),
        (["--print", "trainjob", "--dataset", "latest"], "--dataset 'latest' is no digest"),
        (["--print", "trainjob", "--image", "train:1"], "not pinned by digest"),
        (["--print", "slurm", "--node-type", "p3.2xlarge"], "'p3.2xlarge' is not known"),
        (["--print", "trainjob", "--nodes", "3"], "must be a multiple"),
    ],
)
def test_bad_input_gets_its_sentence(recipe: str, arguments: list[str], words: str) -> None:
    ended = CliRunner().invoke(app, ["train", recipe, *arguments])
    assert isinstance(ended.exception, InputError), ended.output
    assert words in ended.exception.message


def test_a_preflight_that_does_not_pass_ends_with_its_cause(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = Finding("rank_missing", "all 8 processes of node 1 never came.")
    report = PreflightReport("p5.48xlarge", 2, 16, "nccl", 60.0, findings=(finding,))
    monkeypatch.setattr(preflight_launch, "run_preflight", lambda *_: report)
    ended = CliRunner().invoke(app, ["preflight"])
    assert isinstance(ended.exception, StepFailed)
    assert "rank_missing: all 8 processes of node 1" in ended.exception.message
    ended = CliRunner().invoke(app, ["preflight", "--json"])
    assert ended.exit_code == StepFailed.exit_code
    assert json.loads(ended.stdout)["findings"][0]["cause"] == "rank_missing"


@pytest.mark.parametrize(
    "arguments", [["--node-type", "p3"], ["--nodes", "2"], ["--node-rank", "1"], ["--nodes", "2", "--port", "29400"]]
)
def test_a_preflight_that_cannot_be_meant_is_refused(recipe: str, arguments: list[str]) -> None:
    assert isinstance(CliRunner().invoke(app, ["preflight", *arguments]).exception, InputError)
