"""The whole loop, end to end, with the real parts and a random llama."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

from tests.support.installation import Installation

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1500)]


def test_loop_ends_with_a_promoted_release_and_no_error_for_users(installation: Installation, loop: Any) -> None:
    assert loop["retrain"]["verdict"] == "pass"
    assert loop["release"]["outcome"] == "promoted"
    assert loop["release"]["errors"] == 0
    weights = [event["weight"] for event in loop["release"]["timeline"] if event["kind"] == "raise"]
    assert weights == [20, 50]
    answer = installation.ask("after the loop")
    assert answer.status_code == 200
    assert answer.headers["x-sluice-release"] == loop["retrain"]["adapter"]


def test_learnt_from_every_trace_or_says_why_not(loop: Any) -> None:
    curated = loop["retrain"]["curated"]
    used = curated["train"] + curated["validation"]
    assert used + sum(curated["by_reason"].values()) == loop["traffic"]["traces"]
    assert used > 8


def test_lineage_of_the_last_answer_reaches_the_traces(installation: Installation, loop: Any) -> None:
    tree = installation.json("lineage", loop["last"]["trace"])
    nodes = list(_walk(tree))
    kinds = {node["kind"] for node in nodes}
    assert {"adapter", "dataset", "records", "base-model", "index", "corpus", "trace", "step"} <= kinds
    assert loop["retrain"]["adapter"] in {node["digest"] for node in nodes}
    # And back: a trace that was trained on is found in the adapter that learnt from it.
    trained = next(node for node in nodes if node["kind"] == "trace" and not node["children"])
    back = installation.json("lineage", trained["digest"], "--reverse")
    assert loop["retrain"]["adapter"] in {node["digest"] for node in _walk(back)}


def test_ledger_tells_the_story_in_order(installation: Installation, loop: Any) -> None:
    adapter = loop["retrain"]["adapter"]
    entries = [e for e in installation.json("ledger", "--limit", "0") if e["kind"] != "rollback"]
    # About the adapter itself: a later release names it too, as the champion that it was compared with.
    kinds = [e["kind"] for e in entries if adapter in (e["body"].get("adapter"), e["body"].get("release"))]
    assert kinds[:2] == ["decision", "approval"]
    assert kinds.count("promotion") == 1
    assert kinds.index("approval") < kinds.index("rollout") < kinds.index("promotion")


def test_mlflow_shows_the_champion_and_its_gate(installation: Installation, loop: Any) -> None:
    uri = installation.endpoints()["mlflow"]["tracking_uri"]
    version = httpx.get(
        f"{uri}/api/2.0/mlflow/model-versions/get",
        params={"name": "assistant", "version": loop["retrain"]["version"]},
        timeout=10,
    ).json()["model_version"]
    tags = {tag["key"]: tag["value"] for tag in version["tags"]}
    assert "champion" in version["aliases"]
    assert tags["gate"] == "PASS"
    assert tags["approval.by"] == "policy:demo"
    assert "95%" in version["description"]
    assert "answer_rate" in version["description"].lower() or "answer rate" in version["description"].lower()


def test_second_loop_computes_nothing_and_is_quick(installation: Installation, loop: Any) -> None:
    runs = installation.json("runs")
    started = time.monotonic()
    again = installation.json("demo", "--plan", "tiny", timeout_s=120)
    assert time.monotonic() - started < 90
    assert again["retrain"] == loop["retrain"]
    assert again["release"] == loop["release"]
    assert [run["id"] for run in installation.json("runs")] == [run["id"] for run in runs]


def test_retraining_with_the_same_inputs_hits_every_step(installation: Installation, loop: Any) -> None:
    parameters = installation.run_named(loop["retrain"]["run"])["parameters"]
    given = [part for name, value in parameters.items() for part in ("--param", f"{name}={value}")]
    run = installation.json("run", "retrain", *given)
    hits = {name: task["hit"] for name, task in run["tasks"].items()}
    assert all(hits[name] for name in hits if name not in ("subjects", "dataset", "register"))
    assert run["tasks"]["train"]["outputs"]["adapter"] == loop["retrain"]["adapter"]
    # The decision that a person answered stays answered.
    waiting = {str(one["version"]) for one in installation.json("approvals")["waiting"]}
    assert str(loop["retrain"]["version"]) not in waiting


def test_unapproved_release_gets_no_weight(installation: Installation, loop: Any) -> None:
    unknown = "sha256:" + "0" * 64
    refused = installation.json("run", "release", "-p", f"adapter={unknown}", code=5)
    assert "decision" in refused["error"]
    assert installation.json("release", "status")["routes"]["canary"] is None


def test_bad_input_ends_in_a_sentence(installation: Installation, loop: Any) -> None:
    cases = {
        ("run", "retrian"): (2, "retrian"),
        ("run", "retrain", "-p", "recipe"): (2, "NAME=VALUE"),
        ("run", "retrain", "-p", "colour=red"): (2, "colour"),
        ("run", "retrain", "-p", "recipe=no-such-recipe"): (2, "no-such-recipe"),
        ("run", "retrain", "-p", "suite=no-such-suite"): (2, "no-such-suite"),
        ("run", "retrain", "-p", "overrides=[1]"): (2, "overrides"),
        ("run", "retrain", "-p", "until=yesterday"): (2, "yesterday"),
        ("run", "retrain", "-p", "since=2000-01-01T00:00:00Z", "-p", "until=2000-01-02T00:00:00Z"): (2, "harvested"),
        ("run", "retrain", "-p", "minimum_examples=100000"): (2, "100000"),
        ("run", "reembed", "-p", "source=/no/such/folder"): (2, "/no/such/folder"),
        ("approve", "seven"): (2, "seven"),
        ("lineage", "nonsense"): (2, "nonsense"),
        ("logs", "nothing"): (2, "nothing"),
    }
    for arguments, (code, word) in cases.items():
        done = installation.run(*arguments)
        said = done.stdout + done.stderr
        assert done.returncode == code, f"{arguments}: {done.returncode}\n{said}"
        assert word in " ".join(said.split()), f"{arguments}: {said}"
        assert "Traceback" not in said


def _walk(node: dict[str, Any]) -> Any:
    yield node
    for child in node["children"]:
        yield from _walk(child)
