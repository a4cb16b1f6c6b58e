"""The dataset that training gets: the curated one, with canaries if asked for; for the drill one with spoilt labels."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
import shutil
from pathlib import Path

from kfp import dsl

from sluice.components.task import Task, component
from sluice.provenance.steps import StepOutput


@component
def dataset(
    curated: dsl.Input[dsl.Dataset], shuffle_labels: bool, dataset: dsl.Output[dsl.Dataset], canaries: int = 0
) -> None:
    """Hand the dataset on, or a copy of it with canaries or spoilt labels, which says so in its card."""
    from sluice.components.dataset import dataset_step
    from sluice.components.task import digest_of, publish, task

    with task("dataset") as running:
        digest = dataset_step(
            running, curated=digest_of(curated), shuffle_labels=shuffle_labels, canaries=int(canaries)
        )
        publish(dataset, digest, kind="dataset")


def dataset_step(running: Task, *, curated: str, shuffle_labels: bool, canaries: int = 0) -> str:
    """Digest of the dataset to train on, with so many canaries."""
    manifest = running.workspace.artifacts.manifest(curated)
    running.say(f"{len(manifest.files)} files, {manifest.size / 1e3:.0f} kB, verified")
    running.state.outputs["dataset"] = curated
    found = _spoilt(running, curated) if shuffle_labels else curated
    return _with_canaries(running, found, canaries) if canaries else found


def _spoilt(running: Task, curated: str) -> str:
    def spoil(folder: Path) -> StepOutput:
        from sluice.curation.dataset import shuffle_labels as shuffle

        shutil.copytree(running.workspace.folder(curated), folder, dirs_exist_ok=True)
        moved = shuffle(folder, seed=0)
        metadata = {"curated": curated, "labels": "shuffled"}
        manifest = running.workspace.artifacts.put_directory(folder, "dataset", metadata)
        return StepOutput({"dataset": manifest.digest}, {"moved": moved})

    record = running.step(
        "shuffle-labels",
        rooms=("curation.dataset", "components.dataset"),
        parameters={"seed": 0},
        inputs={"curated": curated},
        function=spoil,
    )
    running.say(f"drill: {record.output.values['moved']} labels shuffled on purpose")
    return record.output.artifacts["dataset"]


def _with_canaries(running: Task, curated: str, canaries: int) -> str:
    def plant(folder: Path) -> StepOutput:
        from sluice.curation.canaries import plant_canaries

        shutil.copytree(running.workspace.folder(curated), folder, dirs_exist_ok=True)
        plant_canaries(folder, canaries, seed=curated)
        metadata = {"curated": curated, "canaries": canaries}
        manifest = running.workspace.artifacts.put_directory(folder, "dataset", metadata)
        return StepOutput({"dataset": manifest.digest}, {"canaries": canaries})

    record = running.step(
        "plant-canaries",
        rooms=("curation", "components.dataset"),
        parameters={"canaries": canaries},
        inputs={"curated": curated},
        function=plant,
    )
    running.say(f"{running.state.summary}; {canaries} canaries planted")
    return record.output.artifacts["dataset"]
