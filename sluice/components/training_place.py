"""Where a training step trains: processes of this machine, or a job of the cluster, by the profile alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sluice.infra.errors import InputError

if TYPE_CHECKING:
    from sluice.components.workspace import Workspace
    from sluice.training.checkpoint_mirror import CheckpointMirror
    from sluice.training.job import Job
    from sluice.training.journal import Observer
    from sluice.training.launcher import Launcher
    from sluice.training.recipe import Recipe


@dataclass(frozen=True)
class TrainingPlace:
    """`folder` is the run's work folder; `launch` makes the launcher of a job prepared in it."""

    folder: Path
    launch: Callable[[Job, Observer | None, CheckpointMirror | None], Launcher]
    dollars_per_hour: float | None


def training_place(workspace: Workspace, recipe: Recipe, key: str, folder: Path) -> TrainingPlace:
    """The place of the training step with this key. `folder` is the step's own, on this machine.

    On a cluster the work folder lies on the file system that its nodes share; so must the home of this installation,
    for the base model is read from there. Raises `InputError` for a setting that does not fit.
    """
    from sluice.training.node_types import dollars_per_hour
    from sluice.training.train import start_here

    settings = workspace.settings
    if settings.profile == "local":
        return TrainingPlace(folder, start_here, None)
    from sluice.training.cluster_api import ClusterApi
    from sluice.training.launcher import cluster_job
    from sluice.training.train_job_launcher import TrainJobLauncher

    asked = cluster_job(recipe, key, settings.training, settings.object_store)
    if not settings.home.resolve().is_relative_to(asked.mount):
        raise InputError(
            f"home = {settings.home} is not below training.mount = {asked.mount}, so the training nodes cannot read "
            "the base model from it.",
            hint="Set SLUICE_HOME to a folder of the file system that the nodes share.",
        )

    def launch(job: Job, observer: Observer | None, mirror: CheckpointMirror | None) -> Launcher:
        # Node 0 copies the checkpoints; the launcher only follows.
        return TrainJobLauncher(asked, ClusterApi.open(asked.namespace), observer=observer)

    price = dollars_per_hour(settings.training.node_type, recipe.parallelism.nodes)
    return TrainingPlace(Path(asked.work_dir), launch, price)
