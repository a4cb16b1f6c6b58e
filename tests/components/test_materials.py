"""Registering: what is checked before MLflow hears of a candidate, and the bill of materials that comes with it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from mlflow.utils.validation import path_not_unique, validate_param_and_metric_name

from sluice.components import curate
from sluice.components.register import register_step
from sluice.components.task import Task
from sluice.components.verification import sign_release
from sluice.components.workspace import Workspace
from sluice.infra.errors import IntegrityError
from sluice.infra.settings import Settings
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import digest_bytes, digest_json
from sluice.provenance.steps import StepKey, StepOutput
from sluice.registry import mlflow_registry, runs, versions
from sluice.training.adapter import collect_adapter
from sluice.training.recipe import load_recipe
from sluice.training.safetensors_file import write_tensors
from tests.support.directory_store import DirectoryStore

CODE = digest_bytes(b"code")
RECIPE = load_recipe("tiny")


class Chain:
    """A candidate with everything that registering reads, in a directory store; MLflow only remembers."""

    def __init__(self, tmp_path: Path, objects: DirectoryStore, artifacts: ArtifactStore) -> None:
        self.workspace = Workspace(Settings(home=tmp_path / "home", mlflow={"tracking_uri": "http://127.0.0.1:1"}))
        self.workspace.__dict__.update(objects=objects, artifacts=artifacts)
        self.running = Task("register", self.workspace)
        self.told: dict[str, Any] = {}
        names = [f"model.layers.0.self_attn.{module}.weight" for module in ("q_proj", "v_proj")]
        folder = tmp_path / "base"
        folder.mkdir()
        write_tensors(folder / "model.safetensors", {name: np.zeros((6, 8), dtype=np.float32) for name in names})
        about = {"name": "tiny", "license": "Apache-2.0", "source": "here==1"}
        self.base = artifacts.put_directory(folder, "base-model", about).digest
        card = {"examples": {"train": 4, "validation": 1}}
        files = {"card.json": json.dumps(card).encode(), "card.html": b"<p>card</p>"}
        self.dataset = artifacts.put_files(files, "dataset").digest
        self.holdout = artifacts.put_files({"items.jsonl": b"{}"}, "holdout", {"items": 3}).digest
        self.index = artifacts.put_files({"chunks.jsonl": b"{}"}, "index", {"chunks": 9}).digest
        (tmp_path / "checkpoint").mkdir()
        tensors = {}
        for name in names:
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{prefix}.lora_A.weight"] = np.ones((4, 8), dtype=np.float32)
            tensors[f"{prefix}.lora_B.weight"] = np.ones((6, 4), dtype=np.float32)
        write_tensors(tmp_path / "checkpoint" / "adapter_model.safetensors", tensors)
        self.folder = collect_adapter(tmp_path / "checkpoint", folder, RECIPE, tmp_path / "adapter")
        self.train()

    def train(self) -> None:
        """Store the folder as it is now as the outcome of a training, and sign it."""
        store = self.workspace.artifacts

        def work(_: Path) -> StepOutput:
            made = store.put_directory(self.folder, "adapter", {"base": self.base, "dataset": self.dataset, "seed": 7})
            account = {"recipe": RECIPE.to_json(), "curve": [], "key": digest_json("training step")}
            files = {"training.json": json.dumps(account).encode(), "training.html": b"<p>curves</p>"}
            training = store.put_files(files, "training")
            return StepOutput({"adapter": made.digest, "training": training.digest})

        state = {path.name: digest_bytes(path.read_bytes()) for path in sorted(self.folder.iterdir())}
        record, _ = self.workspace.steps.run(StepKey("train", CODE, {"files": state}), work)
        self.adapter, self.training = record.output.artifacts["adapter"], record.output.artifacts["training"]
        self.signature = sign_release(self.workspace, self.adapter, record.statement)
        check = {
            "metric": "token_f1",
            "candidate": 0.6,
            "champion": 0.3,
            "difference": 0.3,
            "n": 3,
            "interval": [0.1, 0.5],
        }
        missing = {**check, "metric": "latency", "candidate": None, "interval": [None, None]}
        decided = {
            "champion": self.base,
            "holdout": self.holdout,
            "index": self.index,
            "verdict": "pass",
            "checks": [check, missing],
            "items": 3,
            "policy": {},
            "created": "2026-03-01T12:00:00+00:00",
            "expires": "2026-03-08T12:00:00+00:00",
            "second_approver_because": ["another training recipe"],
        }
        self.decision = store.put_files({"decision.json": json.dumps(decided).encode()}, "decision").digest
        page = {
            "report.md": b"**Gate: PASS.** Good.",
            "report.html": b"<p/>",
            "items.json": b"{}",
            "forest.png": b"png",
        }
        metric = {"metric": "token_f1", "interval": [0.1, 0.5], "champion": 0.3, "candidate": 0.6, "difference": 0.3}
        metrics = [{**metric, "slice": name, "n": 3} for name in ("", "category=a/b?")]
        checks = [{"verdict": "pass", "advisory": False}, {"verdict": "fail", "advisory": True}]
        page["report.json"] = json.dumps({"metrics": metrics, "decision": {"checks": checks}}).encode()
        self.report = store.put_files(page, "report").digest

    def register(self) -> int:
        return register_step(
            self.running,
            adapter=self.adapter,
            training=self.training,
            dataset=self.dataset,
            decision=self.decision,
            report=self.report,
        )


@pytest.fixture
def chain(
    tmp_path: Path, object_store: DirectoryStore, artifacts: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> Chain:
    made = Chain(tmp_path, object_store, artifacts)

    def remember(name: str) -> Any:
        def told(*values: Any, **options: Any) -> Any:
            made.told[name] = (values, options)
            return SimpleNamespace(number=3, url="http://v", run_id="r")

        return told

    monkeypatch.setattr(mlflow_registry, "MlflowRegistry", lambda _: None)
    monkeypatch.setattr(curate, "corpus_licences", lambda *_: ("CC-BY-4.0: thank the authors",))
    monkeypatch.setattr("sluice.components.materials.corpus_licences", lambda *_: ("CC-BY-4.0: thank the authors",))
    for module, names in ((runs, ("log_training_run", "log_gate_run")), (versions, ("register_version", "set_gate"))):
        for name in names:
            monkeypatch.setattr(module, name, remember(name))
    return made


def test_a_version_comes_with_signature_bill_and_differences(chain: Chain) -> None:
    assert chain.register() == 3
    options = chain.told["register_version"][1]
    assert options["tags"]["signature"] == chain.signature.digest
    assert options["files"]["model.sig"].read_bytes() == chain.signature.data
    values, shown = chain.told["set_gate"]
    assert "adapter_config.json: new against champion" in values[3]
    assert (shown["picture"], shown["second_approver"]) == ("forest.png", "another training recipe")
    assert shown["more"]["Data card"].endswith("/artifacts/data-card.html")
    data = options["files"]["bom.cdx.json"].read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(data) is None
    bom = json.loads(data)
    parts = {part["name"]: part for part in bom["components"]}
    for name, digest in (
        ("tiny", chain.base),
        ("dataset", chain.dataset),
        ("holdout", chain.holdout),
        ("sluice", CODE),
    ):
        assert parts[name]["hashes"][0]["content"] == digest.removeprefix("sha256:")
    assert parts["index"]["licenses"] == [{"license": {"id": "CC-BY-4.0"}}]
    metrics = bom["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert [(one["type"], one["value"]) for one in metrics] == [("token_f1", "0.6")]
    # Registering again makes nothing anew.
    before = chain.running.state.values["bom"]
    chain.running = Task("register", chain.workspace)
    chain.register()
    assert chain.running.state.values["bom"] == before
    assert chain.running.state.hit


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("chat_template.jinja", "{{ evil }}", "holds chat_template.jinja, which no recipe declares"),
        ("adapter_config.json", "{}", "its recipe declares"),
        ("adapter_model.safetensors", "no tensors", "not a safetensors file"),
    ],
)
def test_what_no_recipe_declares_is_not_registered(chain: Chain, name: str, content: str, says: str) -> None:
    (chain.folder / name).write_text(content)
    chain.train()
    with pytest.raises(IntegrityError, match=says):
        chain.register()
    assert chain.told == {}


def test_an_adapter_without_signature_is_not_registered(chain: Chain) -> None:
    for info in list(chain.workspace.objects.list("signatures/")):
        chain.workspace.objects.delete(info.key)
    with pytest.raises(IntegrityError, match="has no signature"):
        chain.register()
    assert chain.told == {}


def test_the_gate_run_has_every_figure_under_a_name_that_mlflow_takes(chain: Chain) -> None:
    chain.register()
    options = chain.told["log_gate_run"][1]
    assert options["tables"] == ["items.json"]
    metrics = options["metrics"]
    assert metrics["token_f1/difference"] == 0.3
    assert metrics["token_f1/category:a_b_/low"] == 0.1
    assert (metrics["checks/pass"], metrics["checks/fail"]) == (1.0, 0.0), "advisory checks are not counted"
    for name in metrics:
        assert validate_param_and_metric_name(name)
        assert not path_not_unique(name)
