"""recipe list, show, check: what they print, and with what they end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sluice.infra.errors import InputError
from sluice.infra.settings import load_settings
from sluice.pipelines.cli import app
from sluice.pipelines.cli.output import console
from sluice.provenance.artifacts import ArtifactStore
from tests.support.directory_store import DirectoryStore

CLUSTER = ["recipe", "check", "llama-8b-lora-h100", "--base", "llama-3.1-8b"]


@pytest.fixture(autouse=True)
def width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 100)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_a_recipe_that_fits_ends_well_and_its_verdict_stands_last() -> None:
    ended = run(*CLUSTER, "--node-type", "p5.48xlarge")
    assert ended.exit_code == 0
    assert "8,030,261,248 parameters" in ended.stdout
    assert ended.stdout.strip().splitlines()[-1].startswith("✔ Fits: ")
    assert max(len(line) for line in ended.stdout.splitlines()) <= 100


def test_a_recipe_that_does_not_fit_ends_with_two_and_says_what_would() -> None:
    ended = run(*CLUSTER, "--node-type", "g5.48xlarge")
    assert ended.exit_code == 2
    assert "this would fit parallelism.activation_checkpointing: true" in ended.stdout
    assert "✘ Does not fit: " in ended.stdout


def test_json_is_one_document_either_way() -> None:
    for node, fits in (("p5.48xlarge", True), ("g5.48xlarge", False)):
        ended = run(*CLUSTER, "--node-type", node, "--price", "10", "--json")
        found = json.loads(ended.stdout)
        assert found["fits"] is fits
        assert found["node"]["name"] == node
        assert found["dollars"] == pytest.approx(found["seconds"] / 360)
        assert found["needed"] == pytest.approx(sum(part["bytes"] for part in found["memory"]))


def test_without_a_node_or_a_base_the_question_is_asked_where_it_matters() -> None:
    assert "--node-type says on which" in str(run(*CLUSTER).exception)
    named = run("recipe", "check", "llama-8b-lora-h100", "--node-type", "p5.48xlarge")
    assert isinstance(named.exception, InputError)
    assert "--base says which" in str(named.exception)
    assert run("recipe", "check", "demo", "--node-type", "laptop").exit_code == 0


def test_nodes_override_the_recipe_and_are_checked_with_it() -> None:
    ended = run(*CLUSTER, "--node-type", "p5.48xlarge", "--nodes", "2", "--json")
    assert json.loads(ended.stdout)["nodes"] == 2
    refused = run(*CLUSTER, "--node-type", "p5.48xlarge", "--nodes", "3")
    assert "schedule.global_batch_size = 32: must be a multiple" in str(refused.exception)


def test_a_base_and_a_dataset_in_folders(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 100,
        "max_position_embeddings": 1024,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    chat = [{"role": "user", "content": "why?" * 20}, {"role": "assistant", "content": "because"}]
    (tmp_path / "train.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 16)
    ended = run("recipe", "check", "demo", "--base", str(tmp_path), "--dataset", str(tmp_path), "--node-type", "laptop")
    assert ended.exit_code == 0, ended.exception
    assert "16 examples of 29 tokens on average: 12 steps are 3.0 epochs" in ended.stdout
    assert "4 characters are taken as a token" in ended.stdout


def test_show_names_every_field_with_its_meaning() -> None:
    rows = json.loads(run("recipe", "show", "--json").stdout)
    fields = {row["field"]: row for row in rows}
    assert fields["schedule.max_steps"]["required"] is True
    assert fields["guards.validation_loss.patience"]["default"] == 3
    assert not [row["field"] for row in rows if not row["meaning"]]
    shown = run("recipe", "show", "demo").stdout
    assert "max_steps" in shown
    assert "guards.gradient_spike:" in shown


def test_list_names_the_packaged_recipes() -> None:
    rows = json.loads(run("recipe", "list", "--json").stdout)
    assert {"demo", "tiny", "smollm2-full", "llama-8b-lora-h100", "llama-70b-lora-p5"} <= {
        row["recipe"] for row in rows
    }
    assert "llama-70b-lora-p5" in run("recipe", "list").stdout


def test_a_base_and_a_dataset_by_digest_fetch_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sluice.components import workspace as module

    settings = load_settings()
    workspace = module.Workspace(settings)
    artifacts = ArtifactStore(DirectoryStore(tmp_path / "objects"), tmp_path / "cache")
    workspace.__dict__["artifacts"] = artifacts
    monkeypatch.setattr(module, "open_workspace", lambda: workspace)
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 100,
    }
    chat = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]
    base = artifacts.put_files({"config.json": json.dumps(config).encode(), "model.safetensors": b"x" * 1000}, "base")
    lines = (json.dumps({"messages": chat}) + "\n") * 8
    dataset = artifacts.put_files({"train.jsonl": lines.encode()}, "dataset")
    read: list[str] = []
    original = artifacts.read_file

    def reading(digest: str, path: str) -> bytes:
        read.append(path)
        return original(digest, path)

    monkeypatch.setattr(artifacts, "read_file", reading)
    ended = run("recipe", "check", "demo", "--base", base.digest, "--dataset", dataset.digest, "--json")
    assert ended.exit_code == 0, ended.exception
    assert json.loads(ended.stdout)["epochs"] == 6.0
    assert read == ["config.json"]
