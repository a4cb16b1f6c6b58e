"""A training step's page: the whole journal on it, whatever ended the attempts, and whoever is away."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from sluice.components.rerun import Scratch
from sluice.components.task import Task
from sluice.components.training_progress import events_markdown, shown_training
from sluice.components.workspace import Workspace
from sluice.infra.errors import StepFailed
from sluice.infra.settings import MlflowSettings, Settings
from sluice.provenance.canonical import digest_json
from sluice.registry.run_page import NOTE_TAG
from sluice.training.journal import Event, Journal, JournalReader, Line
from sluice.training.recipe import Recipe, load_recipe
from tests.registry.fake_mlflow import FakeMlflow, fake_mlflow
from tests.training.journals import START, write_journal

RECIPE = load_recipe("tiny").with_overrides({"schedule.max_steps": 40})
DATASET, BASE, KEY = digest_json("dataset"), digest_json("base"), digest_json("step")


@pytest.fixture
def server() -> Iterator[FakeMlflow]:
    with fake_mlflow() as state:
        yield state


def training(home: Path, uri: str | None) -> Task:
    task = Task("train", Workspace(Settings(home=home, mlflow=MlflowSettings(tracking_uri=uri))))
    task.state.steps.append({"digest": KEY})
    return task


def show(task: Task, folder: Path, recipe: Recipe = RECIPE) -> list[Line]:
    """One attempt in which the journal's lines are told one by one, as the engine tells them."""
    lines = JournalReader(folder).new()
    options = {"recipe": recipe, "dataset": DATASET, "base": BASE, "folder": folder}
    with shown_training(task, **options, dollars_per_hour=98.32) as shown:  # type: ignore[arg-type]
        for line in lines:
            shown.see([line])
    return lines


def test_the_page_holds_curves_samples_events_and_the_report(server: FakeMlflow, tmp_path: Path) -> None:
    folder = write_journal(tmp_path / "run", 40, broken=8)
    task = training(tmp_path, server.uri)
    show(task, folder)
    found = server.run()
    assert found["info"]["status"] == "FINISHED"
    assert [step for step, _ in server.curve("learning_rate")] == list(range(1, 41))
    assert dict(server.curve("loss"))[8] == "NaN"
    assert {step for step, _ in server.curve("validation_loss")} == set(range(4, 41, 4))
    assert len(server.curve("mfu")) == 40
    spent = [value for _, value in server.curve("dollars")]
    assert spent == sorted(spent)
    assert found["tags"]["guard.gradient_spike"].startswith("Step 13: the gradient norm")
    assert found["tags"]["attempts"] == "2"
    guards = {name for name in found["tags"] if name.startswith("guard.")}
    assert guards == {"guard.not_finite", "guard.gradient_spike"}
    assert "**warning** The checkpoint of step 24 is damaged" in found["tags"][NOTE_TAG]
    assert set(found["inputs"]) == {"dataset", "recipe tiny", "base model"}
    assert found["params"]["lora.rank"] == "4"
    samples = json.loads(server.files["samples.json"])
    assert len(samples["data"]) == 20
    events = json.loads(server.files["events.json"])["data"]
    assert len(events) == len(Journal(folder).read(Event))
    assert b"Training finished" in server.files["training.html"]
    assert task.state.values["training_run"].endswith(found["info"]["run_id"])


def test_lines_told_twice_and_an_attempt_again_change_nothing(server: FakeMlflow, tmp_path: Path) -> None:
    folder = write_journal(tmp_path / "run", 20)
    show(training(tmp_path, server.uri), folder)
    curves = {name: server.curve(name) for name in ("loss", "dollars", "tokens_per_second", "validation_loss")}
    show(training(tmp_path, server.uri), folder)
    assert {name: server.curve(name) for name in curves} == curves


def test_how_an_attempt_ends_is_the_state_of_the_run(server: FakeMlflow, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    options = {"recipe": RECIPE, "dataset": DATASET, "base": BASE, "folder": folder}

    def attempt(error: BaseException, *events: Event) -> str:
        def run() -> None:
            with shown_training(training(tmp_path, server.uri), **options):  # type: ignore[arg-type]
                for event in events:
                    Journal(folder).write(event)
                raise error

        with pytest.raises(type(error)):
            run()
        return str(server.run()["info"]["status"])

    assert attempt(StepFailed("Training failed: out of memory.")) == "FAILED"
    assert b"Out of memory. 0 of 40 steps were done." in server.files["training.html"]
    assert attempt(KeyboardInterrupt()) == "KILLED"
    started = Event("started", "Go.", time=START)
    notice = Event("interrupted", "Saved after a notice: run again.", 7, "warning", time=START + 1)
    assert attempt(StepFailed("Interrupted."), started, notice) == "KILLED"
    assert b"Saved after a notice" in server.files["training.html"]
    assert attempt(RuntimeError("boom"), Event("started", "Go.", time=START + 2)) == "FAILED"


def test_no_server_no_page_and_no_harm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_journal(tmp_path / "run", 5)
    show(training(tmp_path, None), folder)
    assert capsys.readouterr().out == ""
    show(training(tmp_path, "http://127.0.0.1:9"), folder)
    assert capsys.readouterr().out.count("MLflow does not show this training now") == 1


def test_a_training_done_again_to_be_compared_is_not_shown(server: FakeMlflow, tmp_path: Path) -> None:
    folder = write_journal(tmp_path / "run", 5)
    task = training(tmp_path, server.uri)
    task.workspace = Scratch(task.workspace.settings, task.workspace, tmp_path, None)  # type: ignore[arg-type]
    show(task, folder)
    assert server.requests == []


def test_a_sentence_cannot_break_the_table() -> None:
    text = events_markdown([Event("guard", "a | b\nc", 1, "error", time=START)])
    assert text.splitlines()[-1] == "| 2026-02-25 06:13:20 | 1 | **error** a \\| b c |"
