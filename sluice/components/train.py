"""Dataset and base model to an adapter."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from kfp import dsl

from sluice.components.task import Task, component, parse_json
from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json
from sluice.provenance.steps import StepOutput

if TYPE_CHECKING:
    from sluice.training.recipe import Recipe
    from sluice.training.train import TrainingResult


@component
def train(
    dataset: dsl.Input[dsl.Dataset],
    base: str,
    recipe: str,
    overrides: str,
    adapter: dsl.Output[dsl.Model],
    training: dsl.Output[dsl.Artifact],
) -> str:
    """Fine-tune by the recipe; goes on from its last checkpoint when it was interrupted. Returns the digest."""
    from sluice.components.task import digest_of, publish, task
    from sluice.components.train import train_step

    with task("train") as running:
        made, account = train_step(running, dataset=digest_of(dataset), base=base, recipe=recipe, overrides=overrides)
        publish(adapter, made, kind="adapter", base=base)
        publish(training, account, kind="training")
    return made


def train_step(running: Task, *, dataset: str, base: str, recipe: str, overrides: str) -> tuple[str, str]:
    """Digests of the adapter, and of the account of its training (curve, losses, hardware)."""
    from sluice.training.recipe import load_recipe

    chosen = load_recipe(recipe).with_overrides(parse_json(overrides, "overrides"))

    if chosen.base not in (None, base):
        raise InputError(f"The recipe pins base = {chosen.base}; this run trains {base}.")
    if chosen.data.digest not in (None, dataset):
        raise InputError(f"The recipe pins data.digest = {chosen.data.digest}; this run trains on {dataset}.")

    def work(folder: Path) -> StepOutput:
        from sluice.components.training_progress import REPORT, shown_training
        from sluice.training.checkpoint_mirror import CheckpointMirror
        from sluice.training.train import train

        artifacts = running.workspace.artifacts
        mirror = CheckpointMirror(running.workspace.objects, f"checkpoints/{folder.name}")
        with shown_training(running, recipe=chosen, dataset=dataset, base=base, folder=folder) as shown:
            result = train(
                running.workspace.folder(base),
                running.workspace.folder(dataset),
                chosen,
                folder,
                running.report,
                observer=shown,
                mirror=mirror,
            )
            page = shown.page()
        metadata = {"base": base, "dataset": dataset, "recipe": chosen.digest, "seed": chosen.seed}
        adapter = artifacts.put_directory(result.output_dir, "adapter", metadata)
        account = account_of(result, chosen) | {"key": running.state.steps[-1]["digest"]}
        files = {"training.json": json.dumps(account, indent=2, sort_keys=True).encode(), REPORT: page}
        log = folder / "train.log"
        if log.is_file():
            files["train.log"] = log.read_bytes()
        training = artifacts.put_files(files, "training", {"adapter": adapter.digest})
        values = {name: account[name] for name in ("steps", "examples", "final_loss", "validation_loss", "seconds")}
        return StepOutput({"adapter": adapter.digest, "training": training.digest}, values)

    record = running.step(
        "train",
        rooms=("training", "components.train", "components.training_progress"),
        parameters={"recipe": chosen.to_json()},
        inputs={"dataset": dataset, "base": base},
        function=work,
    )
    from sluice.components.verification import sign_release

    sign_release(running.workspace, record.output.artifacts["adapter"], record.statement)
    values = record.output.values
    running.say(f"{values['steps']} steps, loss {values['final_loss']:.3f}, {values['seconds']:.0f} s")
    return record.output.artifacts["adapter"], record.output.artifacts["training"]


def account_of(result: "TrainingResult", recipe: "Recipe") -> dict[str, Json]:
    """What the training artifact keeps of a run, as JSON."""
    curve = [asdict(point) | {"tokens_per_second": point.tokens_per_second} for point in result.curve]
    return {
        "steps": result.steps,
        "used_step": result.used_step,
        "examples": result.examples,
        "final_loss": result.final_loss,
        "validation_loss": result.validation_loss,
        "seconds": round(result.seconds, 1),
        "resumed_from": result.resumed_from,
        "hardware": dict(result.hardware),
        "recipe": recipe.to_json(),
        "probes": list(result.round_trip.probes),
        "round_trip_difference": result.round_trip.difference,
        "curve": curve,
        "validations": [asdict(line) for line in result.validations],
        "samples": [asdict(line) for line in result.samples],
        "events": [asdict(line) for line in result.events],
    }
