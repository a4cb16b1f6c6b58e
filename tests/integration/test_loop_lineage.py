"""Lineage, its picture and the reproduction of a version, on the finished loop with the real parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.installation import Installation

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1500)]


def test_a_user_and_a_document_are_found_in_what_serves(installation: Installation, loop: Any) -> None:
    adapter = loop["retrain"]["adapter"]
    back = installation.json("lineage", "user:user-01", "--reverse")
    holders = {one["digest"]: one for one in back["holders"]}
    assert {"records", "dataset", "adapter"} <= {one["kind"] for one in holders.values()}
    serving = installation.json("release", "status")["routes"]["stable"]["release"]
    assert bool(holders[adapter]["serves"]) == (serving == adapter)
    document = installation.json("lineage", "document:faq/arbetsmiljo", "--reverse")
    found = {one["kind"]: one["serves"] for one in document["holders"]}
    assert {"corpus", "chunks", "index"} <= set(found)
    assert found["index"] == "the live index"
    nobody = installation.json("lineage", "nobody-by-this-name", "--reverse", code=2)
    assert "nobody-by-this-name" in nobody["error"]


def test_a_release_names_its_decision_and_approver(installation: Installation, loop: Any) -> None:
    tree = installation.json("lineage", str(loop["retrain"]["version"]))
    told = [child["label"] for child in tree["children"] if child["kind"] == "entry"]
    assert any(label.startswith("gate decision: pass") for label in told)
    assert any(label.startswith("approved by policy:demo") for label in told)


def test_the_picture_is_drawn_and_lies_with_the_version(installation: Installation, loop: Any, tmp_path: Path) -> None:
    page = tmp_path / "graph.html"
    done = installation.run("lineage", loop["last"]["trace"], "--html", str(page))
    assert done.returncode == 0, done.stdout + done.stderr
    assert loop["retrain"]["adapter"] in page.read_text()
    uri = installation.endpoints()["mlflow"]["tracking_uri"]
    run = loop["retrain"]["training_run"].rsplit("/", 1)[-1]
    listed = httpx.get(f"{uri}/api/2.0/mlflow/artifacts/list", params={"run_id": run}, timeout=10).json()
    assert "lineage.html" in {one["path"] for one in listed["files"]}


def test_data_steps_reproduce_the_same_bytes(installation: Installation, loop: Any) -> None:
    version = str(loop["retrain"]["version"])
    before = installation.json("runs")
    found = installation.json("reproduce", version, "--steps", "harvest,holdout,snapshot,chunk,curate")
    assert found["state"] == "same"
    assert [step["step"] for step in found["steps"]][-1] == "curate"
    for step in found["steps"]:
        assert step["state"] == "same", step
        assert all(one["recorded"] == one["rerun"] for one in step["outputs"])
    assert installation.json("runs") == before
    assert not list((installation.home / "reproduce").iterdir())
    wrong = installation.json("reproduce", version, "--steps", "trian", code=2)
    assert "trian" in wrong["error"]


def test_training_on_this_machine_reproduces_the_same_weights(installation: Installation, loop: Any) -> None:
    found = installation.json("reproduce", str(loop["retrain"]["version"]), "--steps", "train", timeout_s=400)
    (step,) = found["steps"]
    outputs = {one["name"]: one for one in step["outputs"]}
    assert outputs["adapter"]["rerun"] == loop["retrain"]["adapter"]
    assert outputs["training"]["account"]
    assert "same losses" in outputs["training"]["note"]
    assert step["state"] == "same"
