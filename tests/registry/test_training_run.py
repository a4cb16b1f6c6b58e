"""A training in MLflow while it runs: one page for a chain of attempts, nothing lost, nothing slowed, nothing twice."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sluice.infra.system_metrics import SystemMetrics
from sluice.provenance.canonical import digest_json
from sluice.registry.mlflow_registry import MlflowRegistry
from sluice.registry.run_page import KEY_TAG, DatasetReference, MetricPoint, Table
from sluice.registry.runs import log_training_run
from sluice.registry.training_run import Curve, LiveTrainingRun, TrainingSubject
from tests.registry.fake_mlflow import FakeMlflow, fake_mlflow

KEY = digest_json("training step")
ADAPTER = digest_json("adapter")
DATASET = DatasetReference("dataset", digest_json("dataset"), {"train": 10})
SUBJECT = TrainingSubject(KEY, "assistant demo", {"lora": {"rank": 8}, "seed": 7}, [DATASET], {"recipe": "demo"})


@pytest.fixture
def server() -> Iterator[FakeMlflow]:
    with fake_mlflow() as state:
        yield state


CPU = "system/cpu_utilization_percentage"


def live(server: FakeMlflow, said: list[str] | None = None) -> LiveTrainingRun:
    registry = MlflowRegistry(server.uri, timeout_s=2)
    say = [] if said is None else said
    return LiveTrainingRun(registry, SUBJECT, say=say.append, send_every_s=0.02, files_every_s=0.02)


def points(*values: tuple[int, float], name: str = "loss", at: float = 1000.0) -> list[MetricPoint]:
    return [MetricPoint(name, value, step, at + step) for step, value in values]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_is_there_while_it_trains_and_finished_after(server: FakeMlflow) -> None:
    pages: list[str] = []
    run = LiveTrainingRun(MlflowRegistry(server.uri), SUBJECT, send_every_s=0.02, on_page=pages.append)
    with run:
        run.add(points((1, 2.0), (2, 1.5)))
        wait_for(lambda: server.runs and server.curve("loss"))
        found = server.run()
        assert found["info"]["status"] == "RUNNING"
        assert found["tags"][KEY_TAG] == KEY
        assert found["params"] == {"lora.rank": "8", "seed": "7"}
        assert list(found["inputs"]) == ["dataset"]
        run.show_table("events.json", Table(["step"], [[1]]))
        run.tag(guard="skipped")
        run.end("FINISHED")
    assert server.run()["info"]["status"] == "FINISHED"
    assert json.loads(server.files["events.json"]) == {"columns": ["step"], "data": [[1]]}
    assert json.loads(server.run()["tags"]["mlflow.loggedArtifacts"]) == [{"path": "events.json", "type": "table"}]
    assert server.run()["tags"]["guard"] == "skipped"
    assert pages[0].endswith(f"/runs/{found['info']['run_id']}")


def test_points_go_in_batches_never_one_by_one(server: FakeMlflow) -> None:
    with live(server) as run:
        for step in range(2500):
            run.add(points((step, 1.0)))
        run.end("FINISHED")
    assert len(server.curve("loss")) == 2500
    assert len(server.requests) < 100


def test_a_resumed_attempt_continues_the_curves_without_doubles(server: FakeMlflow) -> None:
    with live(server) as run:
        run.add(points((1, 2.0), (2, 1.5), (3, 1.25), (4, math.nan)))
        run.add(points((1, 900.0), (2, 901.0), (3, 902.0), name="speed"), Curve.FIRST)
        run.end("KILLED")
    assert server.run()["info"]["status"] == "KILLED"
    with live(server) as run:
        wait_for(lambda: server.run()["info"]["status"] == "RUNNING")
        # Steps 2 to 4 again: 2 the same, 3 another value (a roll-back), 4 not a number again.
        run.add(points((2, 1.5), (3, 1.0), (4, math.nan), (5, 0.75), at=2000))
        run.add(points((3, 800.0), (5, 801.0), name="speed", at=2000), Curve.FIRST)
        run.end("FINISHED")
    assert server.curve("loss") == [(1, 2.0), (2, 1.5), (3, 1.25), (4, "NaN"), (3, 1.0), (5, 0.75)]
    assert server.curve("speed") == [(1, 900.0), (2, 901.0), (3, 902.0), (5, 801.0)]
    assert server.run()["info"]["status"] == "FINISHED"


def test_of_a_step_done_twice_between_two_batches_one_point_is_sent(server: FakeMlflow) -> None:
    server.down = True
    with live(server) as run:
        run.add(points((1, 2.0), (2, 9.0)))
        run.add(points((2, 1.5), at=2000))
        wait_for(lambda: server.requests)
        server.down = False
        wait_for(lambda: server.runs and server.curve("loss"))
    assert server.curve("loss") == [(1, 2.0), (2, 1.5)]


def test_a_server_that_is_away_costs_nothing_and_is_said_once(server: FakeMlflow) -> None:
    said: list[str] = []
    with live(server, said) as run:
        run.add(points((1, 2.0)))
        wait_for(lambda: server.runs and server.curve("loss"))
        server.down = True
        run.show_table("events.json", Table(["step"], [[1]]))
        for step in range(2, 30):
            started = time.monotonic()
            run.add(points((step, 1.0)))
            assert time.monotonic() - started < 0.05
            time.sleep(0.005)
        wait_for(lambda: said)
        server.down = False
        wait_for(lambda: len(server.curve("loss")) == 29)
        wait_for(lambda: "events.json" in server.files)
    assert [sentence.split(":")[0] for sentence in said] == [
        "MLflow does not show this training now, and gets it when it answers",
        "MLflow answers again and has all that was missed.",
    ]


def test_a_server_that_never_answers_holds_nobody_up() -> None:
    said: list[str] = []
    run = LiveTrainingRun(MlflowRegistry("http://127.0.0.1:9", timeout_s=1), SUBJECT, say=said.append)
    started = time.monotonic()
    with run:
        run.add(points((1, 2.0)))
        run.end("FINISHED")
    assert time.monotonic() - started < 3
    assert len(said) == 1


def test_what_mlflow_answers_in_nonsense_does_not_end_the_thread(server: FakeMlflow) -> None:
    said: list[str] = []
    answer, broken = server.answer, threading.Event()
    broken.set()

    def nonsense(method: str, path: str, query: dict[str, str], body: dict[str, object]) -> dict[str, object]:
        return {"what": 1} if broken.is_set() and path == "runs/create" else answer(method, path, query, body)

    server.answer = nonsense  # type: ignore[method-assign]
    with live(server, said) as run:
        run.add(points((1, 2.0)))
        wait_for(lambda: said)
        broken.clear()
        wait_for(lambda: server.runs and server.curve("loss"))
    assert len(said) == 2


def test_registering_adopts_the_page_and_adds_only_what_is_missing(server: FakeMlflow, tmp_path: Path) -> None:
    with live(server) as run:
        run.add(points((1, 2.0), (2, 1.5)))
        run.end("FINISHED")
    ended = server.run()["info"]["end_time"]
    card = tmp_path / "card.html"
    card.write_text("card")

    def register() -> None:
        log_training_run(
            MlflowRegistry(server.uri),
            application="assistant",
            adapter_digest=ADAPTER,
            key=KEY,
            dataset=DATASET,
            parameters={"lora": {"rank": 8}, "seed": 7},
            metrics=points((1, 2.0), (2, 1.5), (3, 1.0), at=5000),
            files={"card.html": card},
        )

    register()
    found = server.run()
    assert server.curve("loss") == [(1, 2.0), (2, 1.5), (3, 1.0)]
    assert (found["tags"]["adapter"], found["tags"]["recipe"], found["info"]["end_time"]) == (ADAPTER, "demo", ended)
    assert server.files["card.html"] == b"card"
    before = len(server.requests)
    register()
    # The search alone: what is whole is not touched again.
    assert [path.split("/")[-1] for path in server.requests[before:]] == ["get-by-name", "search"]


def test_a_trial_is_shown_under_its_sweep(server: FakeMlflow) -> None:
    parent = TrainingSubject(digest_json("sweep"), "sweep", {})
    registry = MlflowRegistry(server.uri)
    with LiveTrainingRun(registry, parent):
        pass
    with LiveTrainingRun(registry, TrainingSubject(KEY, "trial", {}, parent_key=parent.key)):
        pass
    sweep, trial = server.runs.values()
    assert trial["tags"]["mlflow.parentRunId"] == sweep["info"]["run_id"]


def test_the_machine_is_shown_and_goes_on_where_the_attempt_before_ended(server: FakeMlflow) -> None:
    for _ in range(2):
        system = SystemMetrics(every_s=0.02)
        wanted = (len(server.curve(CPU)) if server.runs else 0) + 3
        with LiveTrainingRun(MlflowRegistry(server.uri), SUBJECT, send_every_s=0.02, system=system):
            while not server.runs or len(server.curve(CPU)) < wanted:
                time.sleep(0.01)
    steps = [step for step, _ in server.curve(CPU)]
    assert steps == list(range(len(steps)))
    assert len(steps) > 5
    assert 0 < server.curve("system/system_memory_usage_percentage")[0][1] < 100
