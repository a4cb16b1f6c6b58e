from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from sluice.components.rollout_facts import store_of
from sluice.infra.settings import Settings
from sluice.pipelines import runs
from sluice.pipelines.metrics_server import metrics_server
from sluice.pipelines.rollout_guard import AFTER_S, Guard, guard_service
from sluice.pipelines.runs import Run
from tests.serving.rollouts import CANARY, failed, holding

PARAMETERS = {"adapter": CANARY.release, "policy": "ours.yaml", "allow_override": True}


class Machine:
    """The runs of an installation, which a test kills and brings to life."""

    def __init__(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings = settings
        self.alive = True
        self.started: list[dict[str, Any]] = []
        monkeypatch.setattr(runs, "list_runs", lambda _: [self._run()])
        monkeypatch.setattr(runs, "start_run", self._start)

    def _run(self) -> Run:
        class Known(Run):
            alive = self.alive

        return Known("release-1", "release", dict(PARAMETERS), started=0.0, folder=self.settings.runs / "release-1")

    def _start(self, settings: Settings, pipeline: str, parameters: dict[str, Any]) -> Run:
        assert pipeline == "release"
        self.started.append(dict(parameters))
        return self._run()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(Settings(home=tmp_path), monkeypatch)


def test_a_rollout_that_nobody_leads_is_taken_over_after_a_while(machine: Machine) -> None:
    store_of(machine.settings).save(holding())
    guard = Guard(machine.settings)
    assert guard.look(0.0) == ""
    machine.alive = False
    assert [guard.look(at) for at in (10.0, 10.0 + AFTER_S - 1)] == ["", ""]
    assert machine.started == []
    # With the policy and the leave of the run that was killed.
    assert guard.look(10.0 + AFTER_S) == "release-1"
    assert machine.started == [PARAMETERS]
    # One that ends at once is not made in a loop.
    assert guard.look(12.0 + AFTER_S) == ""
    assert guard.look(80.0 + AFTER_S) == "release-1"


def test_whoever_comes_back_in_time_keeps_it(machine: Machine) -> None:
    store_of(machine.settings).save(holding())
    guard = Guard(machine.settings)
    machine.alive = False
    guard.look(0.0)
    machine.alive = True
    guard.look(20.0)
    machine.alive = False
    assert [guard.look(at) for at in (21.0, 45.0)] == ["", ""]
    assert machine.started == []


def test_what_has_ended_or_not_begun_is_nobodys_business(machine: Machine) -> None:
    machine.alive = False
    guard = Guard(machine.settings, after_s=0)
    assert guard.look(0.0) == ""
    for state in (failed(), replace(holding(), phase="probing", weight=0), replace(holding(), phase="promoted")):
        store_of(machine.settings).save(replace(state, token=99))
        assert guard.look(100.0) == "", state.phase


def test_its_part_listens_here_alone_and_tells_that_it_lives(machine: Machine) -> None:
    spec = guard_service(machine.settings, 12345)
    assert spec.health.target == "http://127.0.0.1:12345/healthz"
    import threading

    with metrics_server(0, lambda: "figures 1\n") as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert httpx.get(f"{address}/healthz", trust_env=False).text == "ok\n"
        assert httpx.get(f"{address}/metrics", trust_env=False).text == "figures 1\n"
        server.shutdown()
        thread.join()
