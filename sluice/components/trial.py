"""One trial of a sweep: trained to a rung, judged with the others, stopped there or trained on to its end.

A trial trains in the work folder of the very training step that `retrain` would run for its recipe. So a survivor
goes on from its own checkpoint, the learning rate keeps the schedule of all steps, and the chosen trial's adapter is
found by its key when `retrain` asks for it: nothing is trained twice.
"""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
import shutil
from pathlib import Path
from typing import Any, List  # noqa: UP035  (KFP reads List)

from kfp import dsl

from sluice.components.task import Task, component, parse_json
from sluice.infra.errors import SluiceError
from sluice.provenance.steps import StepOutput

STOPPED = "stopped"
"""Stands for the loss, adapter or score of a trial that did not go on."""


@component
def train_trial(
    dataset: dsl.Input[dsl.Dataset],
    base: str,
    recipe: str,
    overrides: str,
    number: int,
    step: int,
    alive: str,
    sweep: str,
) -> str:
    """Train a trial to a step, unless it was stopped before. Returns its validation loss."""
    from sluice.components.task import digest_of, task
    from sluice.components.trial import rung_of_trial

    with task("trial") as running:
        return rung_of_trial(
            running,
            dataset=digest_of(dataset),
            base=base,
            recipe=recipe,
            overrides=overrides,
            number=number,
            alive=alive,
            until_step=step,
            sweep=sweep,
        )


@component
def finish_trial(
    dataset: dsl.Input[dsl.Dataset], base: str, recipe: str, overrides: str, number: int, alive: str
) -> str:
    """Train a trial that is left to its end. Returns the adapter's digest."""
    from sluice.components.task import digest_of, task
    from sluice.components.trial import end_of_trial

    with task("trial") as running:
        return end_of_trial(
            running,
            dataset=digest_of(dataset),
            base=base,
            recipe=recipe,
            overrides=overrides,
            number=number,
            alive=alive,
        )


@component
def rung(losses: List[str], step: int, keep: float) -> str:  # noqa: UP006
    """The better share of the trials, as their numbers with blanks between them."""
    from sluice.components.task import task
    from sluice.components.trial import judge

    with task("rung") as running:
        return " ".join(map(str, judge(running, losses=losses, step=step, keep=keep)))


def rung_of_trial(running: Task, *, number: int, alive: str, until_step: int, sweep: str, **options: str) -> str:
    """The validation loss of a trial at a rung; `STOPPED` when an earlier one stopped it. No `alive`: all are."""
    if _left_behind(number, alive):
        stop_trial(running, **options)
        return STOPPED
    return trial_step(running, **options, until_step=until_step, sweep=sweep)


def end_of_trial(running: Task, *, number: int, alive: str, **options: Any) -> str:
    """The adapter of a trial that is left; `STOPPED` for another one."""
    from sluice.components.train import train_step

    if _left_behind(number, alive):
        stop_trial(running, **options)
        return STOPPED
    return train_step(running, **options)[0]


def _left_behind(number: int, alive: str) -> bool:
    return bool(alive) and str(number) not in alive.split()


def trial_step(
    running: Task, *, dataset: str, base: str, recipe: str, overrides: str, until_step: int, sweep: str
) -> str:
    """The validation loss after `until_step` steps as text, `diverged` when it is no number."""
    from sluice.components.train import step_arguments
    from sluice.training.recipe import load_recipe
    from sluice.training.run_figures import loss_text

    chosen = load_recipe(recipe).with_overrides(parse_json(overrides, "overrides"))
    key, _ = running.key("train", **step_arguments(chosen, dataset=dataset, base=base))
    chain = running.workspace.steps.folder(key)

    def work(_: Path) -> StepOutput:
        from sluice.components.training_progress import shown_training
        from sluice.training.train import train_until

        chain.mkdir(parents=True, exist_ok=True)
        shown = shown_training(
            running,
            recipe=chosen,
            dataset=dataset,
            base=base,
            folder=chain,
            key=key.digest,
            parent_key=sweep,
            pauses=True,
        )
        with shown as observer:
            workspace = running.workspace
            pause = train_until(
                until_step,
                workspace.folder(base),
                workspace.folder(dataset),
                chosen,
                chain,
                running.report,
                observer=observer,
            )
        return StepOutput({}, {"validation_loss": _finite(pause.validation_loss), "step": pause.step})

    record = running.step(
        "train-trial",
        rooms=("training", "components.trial", "components.training_progress"),
        parameters={"recipe": chosen.to_json(), "until_step": until_step},
        inputs={"dataset": dataset, "base": base},
        function=work,
    )
    loss = record.output.values["validation_loss"]
    running.say(f"step {until_step}: validation loss {'not a number' if loss is None else loss_text(loss)}")
    return "diverged" if loss is None else repr(float(loss))


def judge(running: Task, *, losses: list[str], step: int, keep: float) -> tuple[int, ...]:
    """Numbers of the trials that go on from a rung. `losses` are in the order of the grid, which counts from 1.

    Raises `StepFailed` when no trial has a loss that is a number.
    """
    from sluice.training.run_figures import loss_text
    from sluice.training.sweep import survivors

    found = {number: loss_of(text) for number, text in enumerate(losses, start=1) if text != STOPPED}
    alive = survivors(found, keep)
    running.state.values["alive"] = list(alive)
    best = found[alive[0]]
    running.say(
        f"step {step}: {len(alive)} of {len(found)} trials go on, trial {alive[0]} leads with {loss_text(best or 0.0)}"
    )
    return alive


def loss_of(text: str) -> float | None:
    """A loss as `trial_step` spells it; None for a trial that diverged or was stopped."""
    try:
        return float(text)
    except ValueError:
        return None


def stop_trial(running: Task, *, dataset: str, base: str, recipe: str, overrides: str) -> None:
    """Say that a trial stays behind, here and on its page, and free what it would have gone on from."""
    from sluice.components.train import step_arguments
    from sluice.registry.mlflow_registry import MlflowRegistry
    from sluice.registry.run_page import RunPage
    from sluice.training.recipe import load_recipe

    chosen = load_recipe(recipe).with_overrides(parse_json(overrides, "overrides"))
    key, _ = running.key("train", **step_arguments(chosen, dataset=dataset, base=base))
    shutil.rmtree(running.workspace.steps.folder(key), ignore_errors=True)
    running.say("stopped: others had a lower validation loss at the rung")
    try:
        page = RunPage.find(MlflowRegistry(running.workspace.settings.mlflow.tracking_uri), "training", key.digest)
        if page is not None and page.status == "SCHEDULED":
            page.set_tags({"sweep": "stopped early: others had a lower validation loss at the rung"})
            page.set_status("FINISHED")
    except SluiceError as error:
        print(f"MLflow does not show that this trial was stopped: {error.message}", flush=True)


def _finite(value: float | None) -> float | None:
    return value if value is not None and abs(value) < float("inf") else None
