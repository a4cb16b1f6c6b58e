"""The dataset that training gets: the curated one, or for the drill one with shuffled labels."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
import shutil
from pathlib import Path

from kfp import dsl

from sluice.components.task import Task, component
from sluice.provenance.steps import StepOutput


@component
def dataset(curated: dsl.Input[dsl.Dataset], shuffle_labels: bool, dataset: dsl.Output[dsl.Dataset]) -> None:
    """Hand the dataset on; with `shuffle_labels` a spoilt copy of it, which says so in its card."""
    from sluice.components.dataset import dataset_step
    from sluice.components.task import digest_of, publish, task

    with task("dataset") as running:
        digest = dataset_step(running, curated=digest_of(curated), shuffle_labels=shuffle_labels)
        publish(dataset, digest, kind="dataset")


def dataset_step(running: Task, *, curated: str, shuffle_labels: bool) -> str:
    """Digest of the dataset to train on."""
    if not shuffle_labels:
        manifest = running.workspace.artifacts.manifest(curated)
        running.say(f"{len(manifest.files)} files, {manifest.size / 1e3:.0f} kB, verified")
        running.state.outputs["dataset"] = curated
        return curated

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
