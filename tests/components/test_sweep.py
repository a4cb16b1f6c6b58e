"""A sweep's components on a real store: trials share the training step's folder, losers stop, the best is named.

Training itself is replaced where a component calls it; what it does is tested in its own room.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sluice.components.sweep import choose_step, open_page, rank, score_step, selection_step
from sluice.components.task import Task
from sluice.components.train import step_arguments
from sluice.components.trial import STOPPED, end_of_trial, judge, rung_of_trial, stop_trial, trial_step
from sluice.components.workspace import Workspace
from sluice.evaluation.answers import Answer, write_answers
from sluice.evaluation.items import ITEMS_FILE, Item, read_items
from sluice.infra.errors import InputError, StepFailed
from sluice.infra.settings import MlflowSettings, Settings
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import digest_json
from sluice.provenance.steps import StepOutput
from sluice.registry.run_page import PARENT_TAG
from sluice.training import train as training
from sluice.training.recipe import Recipe, load_recipe
from sluice.training.sweep import plan_sweep
from tests.registry.fake_mlflow import FakeMlflow, fake_mlflow
from tests.support.directory_store import DirectoryStore

PLAN = plan_sweep("tiny", ["lora.rank=2,4,8,16"], rungs=2)
ROWS = [
    {"id": f"v{n}", "messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a permit"}]}
    for n in range(10)
]


@pytest.fixture
def server() -> Iterator[FakeMlflow]:
    with fake_mlflow() as state:
        yield state


class Place:
    """An installation's stores, a dataset and a base model in them."""

    def __init__(self, home: Path, objects: DirectoryStore, artifacts: ArtifactStore, uri: str) -> None:
        self.workspace = Workspace(Settings(home=home, mlflow=MlflowSettings(tracking_uri=uri)))
        self.workspace.__dict__.update(objects=objects, artifacts=artifacts)
        lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
        self.dataset = artifacts.put_files({"train.jsonl": lines, "validation.jsonl": lines}, "dataset").digest
        self.base = artifacts.put_files({"config.json": b"{}"}, "base-model").digest

    def task(self, name: str = "trial") -> Task:
        return Task(name, self.workspace)

    def options(self, trial: int) -> dict[str, str]:
        overrides = PLAN.trials[trial - 1].overrides_text
        return {"dataset": self.dataset, "base": self.base, "recipe": "tiny", "overrides": overrides}

    def chain(self, trial: int) -> Path:
        """The work folder of the training step of a trial's recipe."""
        recipe = load_recipe("tiny").with_overrides(PLAN.trials[trial - 1].overrides)
        key, _ = Task.key("train", **step_arguments(recipe, dataset=self.dataset, base=self.base))
        return self.workspace.steps.folder(key)

    def trained(self, trial: int) -> str:
        """An adapter that could be a trial's."""
        return self.workspace.artifacts.put_files({"adapter": str(trial).encode()}, "adapter").digest


@pytest.fixture
def place(tmp_path: Path, object_store: DirectoryStore, artifacts: ArtifactStore, server: FakeMlflow) -> Place:
    return Place(tmp_path / "home", object_store, artifacts, server.uri)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """(rank, steps that were there, step asked for) of every call of the trainer; the higher the rank the better."""
    calls: list[tuple[int, int, int]] = []

    def train_until(step: int, base: Path, dataset: Path, recipe: Recipe, folder: Path, *_: Any, **__: Any) -> Any:
        done = folder / "done"
        calls.append((recipe.lora.rank, int(done.read_text()) if done.exists() else 0, step))
        done.write_text(str(step))
        loss = float("nan") if recipe.lora.rank == 2 else 1 / recipe.lora.rank
        return SimpleNamespace(step=step, validation_loss=loss)

    monkeypatch.setattr(training, "train_until", train_until)
    return calls


def test_a_sweep_stops_the_worse_and_trains_no_step_twice(
    place: Place, asked: list[tuple[int, int, int]], server: FakeMlflow
) -> None:
    sweep = open_page(place.task("selection"), PLAN, dataset=place.dataset, base=place.base)
    first = [trial_step(place.task(), **place.options(n), until_step=PLAN.rungs[0], sweep=sweep) for n in range(1, 5)]
    assert first == ["diverged", "0.25", "0.125", "0.0625"]
    alive = judge(rung := place.task("rung"), losses=first, step=PLAN.rungs[0], keep=0.5)
    assert alive == (4, 3)
    assert rung.state.summary == "step 2: 2 of 4 trials go on, trial 4 leads with 0.062"
    folders = {n: place.chain(n) for n in range(1, 5)}
    assert all(folder.is_dir() for folder in folders.values())
    second = [
        rung_of_trial(place.task(), **place.options(n), number=n, alive="4 3", until_step=PLAN.rungs[1], sweep=sweep)
        for n in range(1, 5)
    ]
    assert second == [STOPPED, STOPPED, "0.125", "0.0625"]
    assert [folder.exists() for folder in folders.values()] == [False, False, True, True]
    assert judge(place.task(), losses=second, step=PLAN.rungs[1], keep=0.5) == (4,)
    assert end_of_trial(running := place.task(), **place.options(3), number=3, alive="4") == STOPPED
    assert "stopped" in running.state.summary
    # A survivor goes on in its own folder.
    assert [call for call in asked if call[0] == 16] == [(16, 0, 2), (16, 2, 3)]
    # The whole rung again: nothing is computed.
    before = len(asked)
    trial_step(place.task(), **place.options(4), until_step=PLAN.rungs[0], sweep=sweep)
    assert len(asked) == before
    pages = list(server.runs.values())
    parent = pages[0]["info"]["run_id"]
    assert [page["tags"].get(PARENT_TAG) for page in pages] == [None, *[parent] * 4]
    assert [page["info"]["status"] for page in pages] == ["RUNNING", *["FINISHED"] * 3, "SCHEDULED"]
    assert pages[1]["tags"]["sweep"].startswith("stopped early")


def test_a_rung_without_any_number_says_so(place: Place) -> None:
    with pytest.raises(StepFailed, match="No trial of the sweep"):
        judge(place.task(), losses=["diverged", "diverged"], step=1, keep=0.5)


def test_trials_are_chosen_by_the_validation_split_and_scored_by_the_gates_metric(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = selection_step(place.task("selection"), dataset=place.dataset)
    items = read_items(place.workspace.folder(prompts) / ITEMS_FILE)
    assert items[3] == Item("v3", "q3", "a permit", ({"role": "user", "content": "q3"},))
    answers = [Answer(f"v{n}", "a permit" if n < 4 else "", "stop", 1, 1, 0.1, 0.1) for n in range(10)]

    def evaluate(*_: Any, **__: Any) -> str:
        folder = place.workspace.settings.home / f"answers-{len(answers)}"
        folder.mkdir(exist_ok=True)
        write_answers(folder / "answers.jsonl", answers)
        return place.workspace.artifacts.put_directory(folder, "answers").digest

    monkeypatch.setattr("sluice.components.answers.answers_step", evaluate)
    options = {"release": place.trained(1), "base": place.base, "prompts": prompts, "suite": "demo"}
    assert score_step(running := place.task("score"), **options) == "0.4"
    assert running.state.summary == "token_f1 0.400 over 10 validation examples"
    # One answer lost is more than the policy allows of ten: no result, not a low one.
    answers.pop()
    assert score_step(place.task("score"), **options) == "none"
    assert score_step(place.task("score"), **{**options, "release": STOPPED}) == STOPPED


def test_a_dataset_without_a_validation_split_cannot_choose(place: Place) -> None:
    empty = place.workspace.artifacts.put_files({"validation.jsonl": b""}, "dataset").digest
    with pytest.raises(InputError, match="no validation split"):
        selection_step(place.task("selection"), dataset=empty)


def test_the_best_is_named_with_its_whole_recipe(place: Place, server: FakeMlflow) -> None:
    sweep = open_page(place.task("selection"), PLAN, dataset=place.dataset, base=place.base)
    four, three = place.trained(4), place.trained(3)
    made, adapter = choose_step(
        running := place.task("choose"),
        PLAN,
        dataset=place.dataset,
        base=place.base,
        suite="demo",
        losses=["diverged", "0.25", "0.125", "0.0625", STOPPED, STOPPED, "0.1", "0.05"],
        adapters=[STOPPED, STOPPED, three, four],
        scores=[STOPPED, STOPPED, "0.5", "0.4"],
        sweep=sweep,
    )
    assert adapter == three
    assert running.state.values["overrides"] == {"lora.rank": 8}
    recipe = Recipe.model_validate(__import__("yaml").safe_load(place.workspace.file(made, "recipe.yaml")))
    assert recipe == load_recipe("tiny").with_overrides({"lora.rank": 8})
    table = place.workspace.file(made, "ranking.md").decode().splitlines()
    assert table[2:6] == [
        "| 1 | rank=8 | 0.500 | 6 | 0.100 |",
        "| 2 | rank=16 | 0.400 | 6 | 0.050 |",
        "| 3 | rank=4 |  | 2 (stopped) | 0.250 |",
        "| 4 | rank=2 |  | 2 (stopped) |  |",
    ]
    assert server.run()["info"]["status"] == "FINISHED"
    assert server.run()["tags"]["mlflow.note.content"].splitlines() == table
    with pytest.raises(StepFailed, match="could be scored"):
        choose_step(
            place.task("choose"),
            PLAN,
            dataset=place.dataset,
            base=place.base,
            suite="demo",
            losses=["1.0"] * 8,
            adapters=[four] * 4,
            scores=["none"] * 4,
            sweep=sweep,
        )


def test_less_is_better_for_some_metrics_and_no_score_is_never_first() -> None:
    adapters = [digest_json(n) for n in range(4)]
    given = {"losses": ["1.0"] * 8, "adapters": adapters, "scores": ["3.0", "none", "1.0", "2.0"]}
    assert [row.number for row in rank(PLAN, **given, higher_is_better=False)] == [3, 4, 1, 2]
    assert [row.number for row in rank(PLAN, **given, higher_is_better=True)] == [1, 4, 3, 2]


def test_mlflow_away_does_not_stop_a_sweep(
    place: Place, asked: list[tuple[int, int, int]], server: FakeMlflow, capsys: pytest.CaptureFixture[str]
) -> None:
    server.down = True
    sweep = open_page(place.task("selection"), PLAN, dataset=place.dataset, base=place.base)
    assert trial_step(place.task(), **place.options(4), until_step=2, sweep=sweep) == "0.0625"
    stop_trial(place.task(), **place.options(2))
    assert "MLflow does not show this sweep" in capsys.readouterr().out


def test_a_finished_training_is_found_by_the_trials_key(place: Place, asked: list[tuple[int, int, int]]) -> None:
    """What `retrain` asks for with the chosen recipe is the step that the trial went through."""
    trial_step(place.task(), **place.options(4), until_step=2, sweep=digest_json("sweep"))
    seen: list[str] = []
    recipe = load_recipe("tiny").with_overrides(PLAN.trials[3].overrides)

    def work(folder: Path) -> StepOutput:
        seen.append((folder / "done").read_text())
        return StepOutput({}, {})

    arguments = step_arguments(recipe, dataset=place.dataset, base=place.base)
    place.task("train").step("train", **arguments, function=work)
    assert seen == ["2"]
