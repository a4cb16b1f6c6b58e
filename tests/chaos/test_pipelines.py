"""kill -9 anywhere: the runner and the task of a pipeline in each of its steps, and the guided loop in its stages.

Running again converges. What is checked afterwards are the invariants 1 to 5: no weight without leave, one promotion,
nothing done twice, nothing lost, and a rollback that needs nothing but the gateway.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from sluice.demo.plan import load_plan
from sluice.training.recipe import RECIPES
from tests.chaos.kills import GuidedLoop, processes_of, run_through_kills
from tests.support.installation import Installation

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]

POLICY = {
    "steps": [
        {"weight": weight, "minimum": {"requests": 2}, "minimum_time_s": 0.5, "maximum_time_s": 90}
        for weight in (25, 60)
    ],
    "shadow": {"requests": 1, "maximum_time_s": 90},
    "bake_s": 1,
    "check_interval_s": 0.3,
    "trip": {"silent_s": 120},
    "analysis": {"false_pass": 0.2, "metrics": {"error_rate": {"fail_above": 0.05, "margin": 0.6}}},
    "probes": {
        "prompts": ["What is a permit?"],
        "max_tokens": 4,
        "answered": 0,
        "effect_above": 0.0001,
        "base_within": 0.5,
    },
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny plan with another seed, which makes it another loop, and a short rollout."""
    folder = tmp_path_factory.mktemp("plan")
    recipe = yaml.safe_load((RECIPES / "tiny.yaml").read_text()) | {"name": "second", "seed": 1234}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "rollout.yaml").write_text(yaml.safe_dump(POLICY))
    chosen = {**load_plan("tiny").model_dump(), "recipe": str(folder / "recipe.yaml"), "policy": "rollout.yaml"}
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({**chosen, "traffic_questions": 36}))
    return path


# Of the session, as the loop is: fixtures of a wider scope are made first, and this one comes before the loop.
@pytest.fixture(scope="session")
def reembedded(installation: Installation) -> dict[str, Any]:
    """The first index, its run killed in every task. Comes before the first loop, which finds it."""
    installation.json("up")
    return run_through_kills(installation, "reembed", {"source": "faq"})


@pytest.fixture(scope="module")
def second(installation: Installation, reembedded: Any, loop: Any, plan: Path) -> dict[str, Any]:
    """A second loop, killed while it brought parts up, in its traffic, and in every task of its retraining."""
    guided = GuidedLoop(installation, plan)
    guided.kill_in_stage("1/5", 0.5)
    guided.kill_in_stage("3/5", 3)
    run = guided.kill_in_new_run("retrain")
    retrained = run_through_kills(installation, "retrain", run["parameters"])
    guided.killed.extend(retrained["killed"])
    return {"guided": guided, "retrain": retrained, "adapter": retrained["tasks"]["train"]["outputs"]["adapter"]}


def test_reembedding_killed_in_every_step_releases_one_index(
    installation: Installation, reembedded: dict[str, Any], loop: Any
) -> None:
    assert set(reembedded["killed"]) == {"snapshot", "chunk", "embed", "build", "retrieval-gate", "switch"}
    assert reembedded["tasks"]["retrieval-gate"]["values"]["verdict"] == "pass"
    # The loop after it embedded nothing again, and asks the very index that the killed run made.
    assert loop["reembed"]["index"] == reembedded["tasks"]["embed"]["outputs"]["index"]
    run = installation.run_named(loop["reembed"]["run"])
    assert all(run["tasks"][name]["hit"] for name in ("snapshot", "chunk", "embed"))


def test_retraining_killed_in_every_step_does_nothing_twice(
    installation: Installation, second: dict[str, Any], loop: Any
) -> None:
    assert len(second["retrain"]["killed"]) >= 8
    adapter = second["adapter"]
    assert adapter != loop["retrain"]["adapter"]
    decisions = [e for e in installation.json("ledger", "--limit", "0") if e["kind"] == "decision"]
    assert Counter(e["body"]["adapter"] for e in decisions)[adapter] == 1
    # Killed runs left no training behind.
    assert not [p for p in processes_of(installation) if "torch.distributed.run" in " ".join(p.info["cmdline"] or [])]


def test_release_without_approval_is_refused(installation: Installation, second: dict[str, Any]) -> None:
    refused = installation.json("run", "release", "-p", f"adapter={second['adapter']}", code=5)
    assert "approv" in refused["error"]
    assert installation.json("release", "status")["routes"]["canary"] is None


def test_loop_killed_in_every_step_of_its_release_promotes_once(
    installation: Installation, second: dict[str, Any]
) -> None:
    adapter = second["adapter"]
    with installation.users() as seen:
        result = second["guided"].end_through_kills()
    assert {"load", "canary", "conclude"} <= set(second["guided"].killed)
    assert result["release"]["outcome"] == "promoted"
    # What was finished before the kills was found, not made again.
    assert result["retrain"]["adapter"] == adapter
    assert result["retrain"]["version"] == second["retrain"]["tasks"]["register"]["values"]["version"]
    assert result["traffic"]["traces"] == 36
    assert set(seen) == {200}, Counter(seen)
    entries = installation.json("ledger", "--limit", "0")
    assert [e["body"]["release"] for e in entries if e["kind"] == "promotion"].count(adapter) == 1
    routes = installation.json("release", "status")["routes"]
    assert routes["stable"]["release"] == adapter
    assert routes["canary"] is None


def test_rollback_needs_only_the_gateway(installation: Installation, second: dict[str, Any], loop: Any) -> None:
    adapter = second["adapter"]
    assert installation.json("release", "status")["routes"]["stable"]["release"] == adapter
    parts = {part["name"]: part["pid"] for part in installation.json("status")}
    os.kill(int((installation.home / "supervisord.pid").read_text()), signal.SIGKILL)
    for name in ("seaweedfs", "mlflow", "milvus"):
        os.kill(parts[name], signal.SIGKILL)
    told = installation.json("rollback", "--reason", "chaos")
    assert any(note.startswith("The ledger ") for note in told["notes"])
    answer = installation.ask("after rollback")
    assert answer.status_code == 200
    assert answer.headers["x-sluice-release"] == loop["retrain"]["adapter"]
    # When everything is back, the rolled-back release does not rise again.
    assert all(part["healthy"] for part in installation.json("up"))
    assert installation.ask("after up").headers["x-sluice-release"] == loop["retrain"]["adapter"]
    entries = installation.json("ledger", "--limit", "0")
    assert [e["kind"] for e in entries if adapter in e["body"].values()][-2:] == ["rollback", "failure"]
