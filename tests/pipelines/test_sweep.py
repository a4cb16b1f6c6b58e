"""The sweep's pipeline: one DAG a grid, nothing that KFP gets wrong, and started again on the same data."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from sluice.components.task import TaskState
from sluice.infra.settings import Settings
from sluice.pipelines.cli.sweep import _parameters, go_on
from sluice.pipelines.compiled import compile_pipeline
from sluice.pipelines.dags import dag_of, pipeline_of
from sluice.pipelines.runs import SWEEP, Run
from sluice.pipelines.sweep import POOL, POOL_LABEL, sweep_pipeline
from sluice.training.sweep import plan_sweep

PLAN = plan_sweep("tiny", ["optimizer.learning_rate=1e-3,3e-3", "lora.rank=2,4"], rungs=2)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = compile_pipeline(sweep_pipeline(PLAN), tmp_path_factory.mktemp("sweep") / "sweep.yaml")
    return list(yaml.safe_load_all(path.read_text()))


def test_every_trial_is_a_task_at_every_rung_on_the_experiment_pool(documents: list[dict[str, Any]]) -> None:
    spec, platform = documents
    tasks = {task["taskInfo"]["name"]: task for task in spec["root"]["dag"]["tasks"].values()}
    trials = {f"trial-{n}{part}" for n in range(1, 5) for part in ("-rung-1", "-rung-2", "")}
    assert trials <= set(tasks)
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    labelled = [name for name, one in executors.items() if one["nodeSelector"]["labels"] == {POOL_LABEL: POOL}]
    assert len(labelled) == len(trials)
    # Side by side: a trial waits for the data and the rung before, never for another trial of its rung.
    for row in dag_of(sweep_pipeline(PLAN)):
        if row["name"].endswith("-rung-2"):
            assert not [other for other in row["after"] if other.startswith("trial-")]
            assert "rung-1" in row["after"]


def test_trials_are_listed_in_the_order_of_the_grid() -> None:
    plan = plan_sweep("tiny", [f"seed={','.join(map(str, range(11)))}"], rungs=0)
    names = [row["name"] for row in dag_of(sweep_pipeline(plan))]
    assert [name for name in names if name.startswith("trial-") and "score" not in name] == [
        f"trial-{n}" for n in range(1, 12)
    ]


def test_without_rungs_every_trial_trains_to_the_end(tmp_path: Path) -> None:
    plan = plan_sweep("tiny", ["lora.rank=2,4"], rungs=0)
    names = {row["name"] for row in dag_of(sweep_pipeline(plan))}
    assert {"trial-1", "trial-2", "trial-1-score", "choose"} <= names
    assert not [name for name in names if "rung" in name]
    compile_pipeline(sweep_pipeline(plan), tmp_path / "sweep.yaml")


def test_a_run_finds_its_dag_in_its_parameters() -> None:
    function, arguments = pipeline_of(SWEEP, {"plan": PLAN.to_text(), "until": "2026-01-01T00:00:00+00:00"})
    assert arguments == {"until": "2026-01-01T00:00:00+00:00"}
    assert function.pipeline_spec.pipeline_info.name == "sweep"


def test_a_broken_sweep_started_again_sees_the_same_traces(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    first = _parameters(settings, PLAN, ["suite=tiny"])

    def run(state: str) -> None:
        Run("sweep-1", SWEEP, first, state=state, started=1.0, folder=settings.runs / "sweep-1").save()

    first["until"] = "2026-01-01T00:00:00+00:00"
    run("failed")
    assert _parameters(settings, PLAN, ["suite=tiny"]) == first
    assert _parameters(settings, PLAN, ["suite=demo"])["until"] != first["until"]
    assert _parameters(settings, PLAN, ["suite=tiny", "until=2027-01-01T00:00:00Z"])["until"] == "2027-01-01T00:00:00Z"
    run("done")
    assert _parameters(settings, PLAN, ["suite=tiny"])["until"] != first["until"]


def test_the_way_on_is_one_line_that_trains_nothing_again(tmp_path: Path) -> None:
    run = Run("sweep-1", SWEEP, {"plan": PLAN.to_text(), "suite": "tiny", "until": ""}, folder=tmp_path)
    (tmp_path / "tasks").mkdir()
    for name, values in (
        ("choose", {"overrides": {"lora.rank": 4}}),
        ("subjects", {"since": "1970-01-01T00:00:00+00:00", "until": "2026-01-01T00:00:00+00:00"}),
    ):
        state = asdict(TaskState(name, "done", 1.0, values=values))
        (tmp_path / "tasks" / f"{name}.json").write_text(json.dumps(state))
    assert go_on(run, PLAN) == (
        "sluice run retrain -p recipe=tiny -p 'overrides={\"lora.rank\":4}' -p since=1970-01-01T00:00:00+00:00 "
        "-p until=2026-01-01T00:00:00+00:00 -p suite=tiny"
    )
