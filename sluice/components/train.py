"""Dataset and base model to an adapter."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfp import dsl

from sluice.components.task import Task, component, parse_json
from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json, hex_of
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
    from sluice.components.train import require_adapter, train_step

    with task("train") as running:
        require_adapter(recipe, overrides)
        made, account = train_step(running, dataset=digest_of(dataset), base=base, recipe=recipe, overrides=overrides)
        publish(adapter, made, kind="adapter", base=base)
        publish(training, account, kind="training")
    return made


def require_adapter(recipe: str, overrides: str) -> None:
    """Raise `InputError` for a recipe whose result is no adapter that a server takes: pipelines release adapters."""
    from sluice.training.recipe import load_recipe

    method = load_recipe(recipe).with_overrides(parse_json(overrides, "overrides")).method
    if method in ("full", "dora"):
        raise InputError(
            f"The recipe {recipe!r} has method = {method!r}: what it leaves is served as a whole model, and this "
            "pipeline releases adapters.",
            hint="Train it with `sluice train`, or choose method lora.",
        )


def train_step(
    running: Task, *, dataset: str, base: str, recipe: str, overrides: str, processes: int | None = None
) -> tuple[str, str]:
    """Digests of what came out (an adapter, or the model of method `full`) and of the account of its training.

    `processes` is the size of this attempt, if not the recipe's; it is no part of the step's key.
    """
    from sluice.components.training_place import training_place
    from sluice.components.verification import sign_release
    from sluice.training.checkpoint_mirror import CheckpointMirror
    from sluice.training.recipe import load_recipe

    chosen = load_recipe(recipe).with_overrides(parse_json(overrides, "overrides"))
    if chosen.base not in (None, base):
        raise InputError(f"The recipe pins base = {chosen.base}; this run trains {base}.")
    if chosen.data.digest not in (None, dataset):
        raise InputError(f"The recipe pins data.digest = {chosen.data.digest}; this run trains on {dataset}.")
    arguments = step_arguments(chosen, dataset=dataset, base=base)
    key = running.key("train", **arguments)[0].digest
    # A reproduction computes everything itself.
    mirror = (
        CheckpointMirror(running.workspace.objects, f"checkpoints/{hex_of(key)}") if running.workspace.SHOWN else None
    )
    kind = "model" if chosen.method == "full" else "adapter"

    def work(folder: Path) -> StepOutput:
        from sluice.components.training_progress import REPORT, shown_training
        from sluice.training.train import train

        workspace = running.workspace
        artifacts = workspace.artifacts
        place = training_place(workspace, chosen, key, folder)
        shown = shown_training(
            running,
            recipe=chosen,
            dataset=dataset,
            base=base,
            folder=place.folder,
            dollars_per_hour=place.dollars_per_hour,
        )
        with shown as observer:
            result = train(
                workspace.folder(base),
                workspace.folder(dataset),
                chosen,
                place.folder,
                running.report,
                observer=observer,
                mirror=mirror,
                launch=place.launch,
                processes=processes,
            )
            page = observer.page()
        metadata = {"base": base, "dataset": dataset, "recipe": chosen.digest, "seed": chosen.seed}
        made = {kind: artifacts.put_directory(result.output_dir, kind, metadata).digest}
        if result.merged is not None:
            merged = artifacts.put_directory(result.merged.model_dir, "model", metadata | {"adapter": made[kind]})
            made["merged"] = merged.digest
        account = account_of(result, chosen) | {"key": key}
        files = {"training.json": json.dumps(account, indent=2, sort_keys=True).encode(), REPORT: page}
        log = place.folder / "train.log"
        if log.is_file():
            files["train.log"] = log.read_bytes()
        training = artifacts.put_files(files, "training", {kind: made[kind]})
        values = {name: account[name] for name in ("steps", "examples", "final_loss", "validation_loss", "seconds")}
        return StepOutput({**made, "training": training.digest}, values)

    record = running.step("train", **arguments, function=work)
    # What the run could have resumed from has served its purpose once its result is on record.
    if mirror is not None:
        mirror.clear()
    sign_release(running.workspace, record.output.artifacts[kind], record.statement)
    values = record.output.values
    running.say(f"{values['steps']} steps, loss {values['final_loss']:.3f}, {values['seconds']:.0f} s")
    return record.output.artifacts[kind], record.output.artifacts["training"]


def step_arguments(recipe: "Recipe", *, dataset: str, base: str) -> dict[str, Any]:
    """What decides the key of the training step, and so its work folder."""
    return {
        "rooms": ("training", "components.train", "components.training_place", "components.training_progress"),
        "parameters": {"recipe": recipe.to_json()},
        "inputs": {"dataset": dataset, "base": base},
    }


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
