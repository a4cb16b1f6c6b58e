"""kill -9 anywhere: parts, the supervisor, the runner of a pipeline in each of its steps. Running again converges.

What is checked afterwards are the invariants 1 to 5: no weight without leave, one promotion, nothing done twice,
nothing lost, and a rollback that needs nothing but the gateway.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.support.installation import Installation

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

POLICY = {
    "steps": [
        {"weight": weight, "minimum": {"requests": 2}, "minimum_time_s": 0.5, "maximum_time_s": 90}
        for weight in (25, 100)
    ],
    "bake_s": 1,
    "check_interval_s": 0.3,
    "analysis": {
        "pass_confidence": 0.8,
        "fail_confidence": 0.99,
        "error_rate": {"fail_above": 0.05, "tolerance": 0.6},
        "empty_answers": {"gating": False, "fail_above": 0.9, "tolerance": 0.95},
        "truncated_answers": {"gating": False, "fail_above": 0.9, "tolerance": 0.95},
        "thumbs_down": {"gating": False, "fail_above": 0.9, "tolerance": 0.95},
        "time_to_first_token": {"gating": False, "fail_above": 50, "tolerance": 100},
        "total_time": {"gating": False, "fail_above": 50, "tolerance": 100},
    },
    "probes": {
        "prompts": ["What is a permit?"],
        "max_tokens": 4,
        "answered": 0,
        "effect_above": 0.0001,
        "base_within": 0.5,
    },
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "rollout.yaml"
    path.write_text(yaml.safe_dump(POLICY))
    return path


@pytest.fixture(scope="module")
def second_candidate(installation: Installation, loop: Any) -> dict[str, Any]:
    """A candidate trained with another seed, its run killed once in every step on the way."""
    run = next(run for run in installation.json("runs") if run["id"] == loop["retrain"]["run"])
    parameters = {**run["parameters"], "overrides": '{"seed": 1234}', "champion": loop["retrain"]["adapter"]}
    return _run_through_kills(installation, "retrain", parameters)


def test_parts_come_back_with_their_state(installation: Installation, loop: Any) -> None:
    before = installation.json("release", "status")["routes"]
    ledger = installation.json("ledger", "--limit", "0")
    for part in installation.json("status"):
        os.kill(part["pid"], signal.SIGKILL)
        parts = installation.json("up")
        assert all(one["healthy"] for one in parts), part["name"]
        assert installation.ask(f"after {part['name']}").status_code == 200, part["name"]
    assert installation.json("release", "status")["routes"] == before
    assert installation.json("ledger", "--limit", "0") == ledger


def test_supervisor_is_mended_by_up(installation: Installation, loop: Any) -> None:
    supervisor = int((installation.home / "supervisord.pid").read_text())
    os.kill(supervisor, signal.SIGKILL)
    assert all(part["healthy"] for part in installation.json("up"))
    assert installation.ask("after supervisord").status_code == 200
    assert _marked(installation) == {part["name"] for part in installation.json("status")} | {"supervisord"}


def test_retraining_killed_in_every_step_does_nothing_twice(
    installation: Installation, second_candidate: dict[str, Any], loop: Any
) -> None:
    assert len(second_candidate["killed"]) >= 8
    assert second_candidate["tasks"]["train"]["outputs"]["adapter"] != loop["retrain"]["adapter"]
    adapter = second_candidate["tasks"]["train"]["outputs"]["adapter"]
    decisions = [e for e in installation.json("ledger", "--limit", "0") if e["kind"] == "decision"]
    assert Counter(e["body"]["adapter"] for e in decisions)[adapter] == 1
    # Killed runs left no training behind.
    assert not [p for p in _processes_of(installation) if "torch.distributed.run" in " ".join(p.info["cmdline"] or [])]
    parameters = second_candidate["parameters"]
    again = installation.json("run", "retrain", *_given(parameters))
    assert again["tasks"]["train"]["hit"] is True
    assert again["tasks"]["train"]["outputs"]["adapter"] == adapter
    assert again["tasks"]["register"]["values"]["version"] == second_candidate["tasks"]["register"]["values"]["version"]


def test_release_without_approval_is_refused(installation: Installation, second_candidate: dict[str, Any]) -> None:
    adapter = second_candidate["tasks"]["train"]["outputs"]["adapter"]
    refused = installation.json("run", "release", "-p", f"adapter={adapter}", code=5)
    assert "approv" in refused["error"]
    assert installation.json("release", "status")["routes"]["canary"] is None


def test_release_killed_in_every_step_promotes_once(
    installation: Installation, second_candidate: dict[str, Any], policy: Path
) -> None:
    adapter = second_candidate["tasks"]["train"]["outputs"]["adapter"]
    version = second_candidate["tasks"]["register"]["values"]["version"]
    installation.json("approve", str(version), "--no-release", "--by", "chaos")
    with installation.users() as seen:
        parameters = {"adapter": adapter, "policy": str(policy), "allow_override": "false"}
        run = _run_through_kills(installation, "release", parameters)
    assert run["tasks"]["conclude"]["values"]["outcome"] == "promoted"
    assert set(seen) == {200}, Counter(seen)
    entries = installation.json("ledger", "--limit", "0")
    assert [e["body"]["release"] for e in entries if e["kind"] == "promotion"].count(adapter) == 1
    routes = installation.json("release", "status")["routes"]
    assert routes["stable"]["release"] == adapter
    assert routes["canary"] is None


def test_rollback_needs_only_the_gateway(
    installation: Installation, second_candidate: dict[str, Any], loop: Any
) -> None:
    adapter = second_candidate["tasks"]["train"]["outputs"]["adapter"]
    assert installation.json("release", "status")["routes"]["stable"]["release"] == adapter
    parts = {part["name"]: part["pid"] for part in installation.json("status")}
    os.kill(int((installation.home / "supervisord.pid").read_text()), signal.SIGKILL)
    for name in ("seaweedfs", "mlflow", "milvus"):
        os.kill(parts[name], signal.SIGKILL)
    told = installation.json("rollback", "--reason", "chaos")
    assert any("ledger was not told" in note for note in told["notes"])
    answer = installation.ask("after rollback")
    assert answer.status_code == 200
    assert answer.headers["x-sluice-release"] == loop["retrain"]["adapter"]
    # When everything is back, the rolled-back release does not rise again.
    assert all(part["healthy"] for part in installation.json("up"))
    assert installation.ask("after up").headers["x-sluice-release"] == loop["retrain"]["adapter"]
    entries = installation.json("ledger", "--limit", "0")
    assert [e["kind"] for e in entries if adapter in e["body"].values()][-2:] == ["rollback", "failure"]


def _run_through_kills(installation: Installation, pipeline: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Run a pipeline to its end, killing runner and task once in every task. The last run, with `killed`."""
    killed: list[str] = []
    for _ in range(30):
        run = installation.json("run", pipeline, *_given(parameters), "--detach")

        def state(run_id: str = run["id"]) -> dict[str, Any]:
            found: dict[str, Any] = next(one for one in installation.json("runs") if one["id"] == run_id)
            return found

        fresh = _wait_for_fresh_task(installation, Path(run["log"]).parent, killed)
        if fresh is None:
            ended = installation.wait_for(
                lambda: (s := state())["state"] not in ("running", "pending") and s,
                timeout_s=240,
                what=f"end of {pipeline}",
            )
            assert ended["state"] == "done", ended["error"]
            return {**ended, "killed": killed}
        # Somewhere inside the task, not always at its first instruction.
        time.sleep(0.15 * (len(killed) % 4))
        _kill_tree(run["pid"])
        killed.append(fresh)
    raise AssertionError(f"{pipeline} did not come to its end; killed in {killed}")


def _wait_for_fresh_task(installation: Installation, folder: Path, killed: list[str]) -> str | None:
    """The first running task that was not killed before; None when the run ended without one."""
    import json

    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        for path in (folder / "tasks").glob("*.json"):
            try:
                found = json.loads(path.read_text())
            except ValueError:
                continue
            if found["state"] == "running" and found["task"] not in killed:
                return str(found["task"])
        if json.loads((folder / "run.json").read_text())["state"] not in ("pending", "running"):
            return None
        time.sleep(0.02)
    raise AssertionError(f"no task of {folder.name} came up")


def _kill_tree(pid: int) -> None:
    """SIGKILL the runner first, then its task. What the task started itself has to notice on its own."""
    try:
        runner = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return
    children = runner.children()
    for process in (runner, *children, *(grandchild for child in children for grandchild in child.children())):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _given(parameters: dict[str, Any]) -> list[str]:
    return [part for name, value in parameters.items() for part in ("--param", f"{name}={value}")]


def _processes_of(installation: Installation) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        if (process.info["environ"] or {}).get("SLUICE_HOME") == str(installation.home):
            found.append(process)
    return found


def _marked(installation: Installation) -> set[str]:
    return {(p.info["environ"] or {}).get("SLUICE_PART", "") for p in _processes_of(installation)} - {""}
