"""`sluice why` and `sluice diff` over runs on disk: what a word names, and where two runs parted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sluice.components.task import TASK_VARIABLE, Task, task
from sluice.infra.errors import InputError
from sluice.infra.progress import RUN_DIR_VARIABLE
from sluice.infra.settings import Settings
from sluice.pipelines.explain import compare_runs, explain_step
from sluice.pipelines.runs import Run
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.attestation import Signer
from sluice.provenance.steps import StepOutput, StepRunner
from tests.support.directory_store import DirectoryStore


@pytest.fixture
def workspace(
    tmp_path: Path, object_store: DirectoryStore, artifacts: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> Any:
    signer = Signer.load_or_create(tmp_path / "signing.pem")
    steps = StepRunner(object_store, artifacts, signer, tmp_path / "work")
    monkeypatch.delenv(TASK_VARIABLE, raising=False)
    return SimpleNamespace(
        settings=Settings(home=tmp_path / "home"), objects=object_store, artifacts=artifacts, steps=steps
    )


def a_run(
    workspace: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    *,
    until: str = "noon",
    rate: float = 0.1,
    fails: bool = False,
) -> Run:
    """A run of three tasks: `subjects` pins, `curate` makes a dataset from that, `train` uses it."""
    run = Run(
        f"retrain-{name}",
        "retrain",
        {"recipe": "lora"},
        "done",
        float(len(name)),
        folder=workspace.settings.runs / f"retrain-{name}",
    )
    run.save()
    order: list[dict[str, Any]] = [{"name": one, "after": []} for one in ("subjects", "curate", "train")]
    (run.folder / "dag.json").write_text(json.dumps(order))
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(run.folder))

    def step(running: Task, parameters: dict[str, Any], inputs: dict[str, str], content: str) -> str:
        def function(folder: Path) -> StepOutput:
            if fails and running.name == "train":
                raise KeyError("broken")
            made = workspace.artifacts.put_files({"data": content.encode()}, running.name)
            return StepOutput({"made": made.digest})

        record = running.step(
            running.name, rooms=("curation.holdout",), parameters=parameters, inputs=inputs, function=function
        )
        return record.output.artifacts["made"]

    with task("subjects", workspace) as running:
        running.state.values["until"] = f"until {until}"
    with task("curate", workspace) as running:
        dataset = step(running, {"until": f"until {until}"}, {}, until)
    with task("train", workspace) as running:
        step(running, {"rate": rate}, {"dataset": dataset}, f"{until} {rate}")
    return run


def test_equal_runs_differ_in_nothing(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a_run(workspace, monkeypatch, "a")
    a_run(workspace, monkeypatch, "bb")
    found = compare_runs(workspace, "a", "bb")
    assert (found.first, found.tasks) == (None, ())


def test_the_first_input_that_differed_is_named_and_what_follows_says_so(
    workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_run(workspace, monkeypatch, "a")
    a_run(workspace, monkeypatch, "bb", until="evening", rate=0.2)
    found = compare_runs(workspace, "a", "bb")
    assert found.first is not None
    assert (found.first.task, found.first.differences[0].name) == ("subjects", "until")
    told = [(one.task, item.part, item.name, item.follows) for one in found.tasks for item in one.differences]
    assert told == [
        ("subjects", "value", "until", ""),
        ("curate", "parameter", "until", "subjects"),
        ("train", "parameter", "rate", ""),
        ("train", "input", "dataset", "curate"),
    ]
    (data,) = [item for one in found.tasks for item in one.differences if item.name == "dataset"]
    assert [(one.part, one.name, one.before, one.after) for one in data.inside] == [("file", "data", 4, 7)]


def test_a_word_names_a_task_a_run_and_task_a_key_or_a_step(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a_run(workspace, monkeypatch, "a")
    a_run(workspace, monkeypatch, "bb", rate=0.2)
    (newest,) = explain_step(workspace, "train")
    assert (newest.outcome, newest.sentence) == ("computed", "parameter rate differs")
    (older,) = explain_step(workspace, "a/train")
    assert older.sentence == "no earlier step is called 'train'"
    (hit,) = explain_step(workspace, "last/curate")
    assert hit.outcome == "hit"
    for word in (newest.key.digest, newest.key.digest.removeprefix("sha256:")[:10]):
        assert explain_step(workspace, word)[0].key == newest.key
    with pytest.raises(InputError, match="names no step") as refused:
        explain_step(workspace, "tune")
    assert "curate, train" in refused.value.hint
    with pytest.raises(InputError, match="came to no step"):
        explain_step(workspace, "a/subjects")
    with pytest.raises(InputError, match="is the key of no step"):
        explain_step(workspace, "0" * 12)


def test_a_step_that_failed_is_explained(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a_run(workspace, monkeypatch, "a")
    with pytest.raises(KeyError):
        a_run(workspace, monkeypatch, "bb", rate=0.3, fails=True)
    (found,) = explain_step(workspace, "bb/train")
    assert (found.outcome, found.sentence) == ("unfinished", "parameter rate differs")


def test_runs_of_two_pipelines_are_refused(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a_run(workspace, monkeypatch, "a")
    other = Run("reembed-x", "reembed", {}, "done", 5.0, folder=workspace.settings.runs / "reembed-x")
    other.save()
    with pytest.raises(InputError, match="two pipelines"):
        compare_runs(workspace, "retrain-a", "reembed-x")
