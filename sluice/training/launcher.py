"""One protocol for whatever runs a training, and the job that a cluster is asked for, in whichever form.

    job = cluster_job(recipe, key, settings.training, settings.object_store)
    TrainJobLauncher(job, api).run(report)            # or describe(), which is what `sluice train --print` shows

Everything that all forms share stands here: the name, the command, the environment. `train_job.py`, `pytorch_job.py`
and `command_lines.py` only say it in the words of their scheduler.
"""

from __future__ import annotations

import math
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from types import FrameType
from typing import Protocol

from sluice.infra.errors import InputError, Interrupted
from sluice.infra.progress import Report, no_report
from sluice.infra.settings import ObjectStoreSettings, TrainingSettings
from sluice.training.cluster_shapes import NodeShape, shape_of
from sluice.training.fabric import fabric_environment
from sluice.training.recipe import Recipe

INTERRUPTED = Interrupted.exit_code
"""Exit code (EX_TEMPFAIL) of a node that saved after a notice: run again to continue."""
RENDEZVOUS_PORT = 29500
"""Where process 0's store listens: the port that Kubeflow's runtimes use."""
_PINNED = re.compile(r"^[^@\s]+@sha256:[0-9a-f]{64}$")
_NAME = re.compile(r"^[a-z]([a-z0-9-]{0,50}[a-z0-9])?$")


class Launcher(Protocol):
    """Runs a training somewhere."""

    def run(self, report: Report = no_report) -> object:
        """Train until the end; the job's `Outcome` says how. Raises `StepFailed` with the cause; cancelled, it leaves
        nothing running."""

    def describe(self) -> str:
        """What would be started, as text that people can read and start by hand."""


@dataclass(frozen=True)
class Secret:
    """A value that only the cluster knows: `key` of the Secret `name`."""

    name: str
    key: str


@dataclass(frozen=True)
class ClusterJob:
    """A training on a cluster. Times in seconds; `processes` of one node. Raises `InputError` for what cannot work.

    `work_dir` lies below `mount`, where every node has the shared file system of the claim. Without a `secret` the
    service account itself may use the object store.
    """

    name: str
    namespace: str
    image: str
    nodes: int
    processes: int
    node_type: str
    work_dir: PurePosixPath
    mount: PurePosixPath
    claim: str
    service_account: str
    deadline_s: int
    notice_s: int
    restarts: int
    max_steps: int
    object_store: Mapping[str, str]
    secret: str | None = None
    queue: str | None = None
    priority: str | None = None
    net_plugin: str = "aws-ofi"
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise InputError(f"The job's name {self.name!r} is none that Kubernetes takes for pods and their hosts.")
        if not _PINNED.match(self.image):
            raise InputError(
                f"training.image = {self.image!r} is not pinned by digest.",
                hint="Give NAME@sha256:...: a tag may say something else on every node and at every restart.",
            )
        if self.work_dir == self.mount or not self.work_dir.is_relative_to(self.mount):
            raise InputError(
                f"The work folder {self.work_dir} is not below {self.mount}, where the nodes share a file system."
            )
        if not 1 <= self.processes <= self.shape.accelerators:
            raise InputError(
                f"parallelism.processes = {self.processes}, but a {self.node_type} has {self.shape.accelerators} "
                "accelerators."
            )
        if self.nodes > 1 and self.processes != self.shape.accelerators:
            raise InputError(
                f"parallelism.processes = {self.processes} uses a part of each of {self.nodes} nodes: over several "
                f"nodes a run takes whole ones, {self.shape.accelerators} processes on a {self.node_type}."
            )
        if self.priority and not self.queue:
            raise InputError(
                f"training.priority = {self.priority!r} means nothing without training.queue.",
                hint="It names a WorkloadPriorityClass of Kueue.",
            )

    @property
    def shape(self) -> NodeShape:
        return shape_of(self.node_type)

    @property
    def command(self) -> list[str]:
        """What each node executes: it reads PET_* and starts torchrun with a c10d rendezvous."""
        return ["python", "-m", "sluice.training.node", str(self.work_dir)]

    @property
    def resources(self) -> dict[str, dict[str, str]]:
        return self.shape.resources(self.processes, network=self.nodes > 1)

    @property
    def grace_s(self) -> int:
        """From SIGTERM to SIGKILL: the notice to save in, and a moment to end the processes."""
        return self.notice_s + 30

    def environment(self) -> dict[str, str | Secret]:
        """Of each node's process. PET_* are the runtime's to set (a TrainJob that sets one is refused)."""
        variables: dict[str, str | Secret] = {
            "SLUICE_PROFILE": "cluster",
            "SLUICE_TRAINING__NODE_TYPE": self.node_type,
            **{f"SLUICE_OBJECT_STORE__{name.upper()}": value for name, value in self.object_store.items()},
        }
        if self.secret:
            for name in ("access_key", "secret_key"):
                variables[f"SLUICE_OBJECT_STORE__{name.upper()}"] = Secret(self.secret, name)
        # On one node NCCL needs no network, and pinning one that is not there would end the run.
        return variables | (fabric_environment(self.net_plugin) if self.nodes > 1 else {})


def job_name(key: str) -> str:
    """The name of the job of a training step, from the digest of the step's key: a retry finds the job again."""
    digest = key.removeprefix("sha256:")
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise InputError(f"The training step's key {key!r} is no sha256 digest.")
    return f"sluice-train-{digest[:16]}"


def cluster_job(
    recipe: Recipe,
    key: str,
    settings: TrainingSettings,
    store: ObjectStoreSettings,
    *,
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> ClusterJob:
    """The job of a training step with that key. Raises `InputError` for a setting that is missing or does not fit."""
    for name, value in (("image", settings.image), ("claim", settings.claim)):
        if not value:
            raise InputError(
                f"training.{name} is not set.",
                hint="The section `training` of the settings describes the cluster: docs/cluster-training.md.",
            )
    if recipe.parallelism.backend != "nccl":
        raise InputError(
            f"parallelism.backend = {recipe.parallelism.backend!r} trains on processors; a cluster's nodes have "
            "accelerators.",
            hint="Set parallelism.backend: nccl in the recipe.",
        )
    name = job_name(key)
    plain = {"bucket": store.bucket, "region": store.region, "endpoint_url": store.endpoint_url}
    return ClusterJob(
        name=name,
        namespace=settings.namespace,
        image=settings.image,
        nodes=recipe.parallelism.nodes,
        processes=recipe.parallelism.processes,
        node_type=settings.node_type,
        work_dir=settings.mount / "sluice" / name,
        mount=settings.mount,
        claim=settings.claim,
        service_account=settings.service_account,
        deadline_s=math.ceil(recipe.budget.timeout_minutes * 60),
        notice_s=math.ceil(recipe.budget.notice_s),
        restarts=recipe.guards.ranks.restarts,
        max_steps=recipe.schedule.max_steps,
        object_store={field: value for field, value in plain.items() if value},
        secret=settings.object_store_secret,
        queue=settings.queue,
        priority=settings.priority,
        net_plugin=settings.net_plugin,
        labels={
            "app.kubernetes.io/name": "sluice",
            "app.kubernetes.io/component": "training",
            "sluice.dev/recipe": recipe.name,
            **(labels or {}),
        },
        annotations={"sluice.dev/key": key, "sluice.dev/recipe-digest": recipe.digest, **(annotations or {})},
    )


@contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """SIGTERM as SystemExit, so that `finally` runs."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with _handling_sigterm(terminate):
        yield


@contextmanager
def sigterm_as_interrupted() -> Iterator[None]:
    """SIGTERM as `Interrupted`, where no launcher handles it: before the processes start and after they have ended."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted("Training was told to stop.", hint="Run again: it goes on where it was.")

    with _handling_sigterm(interrupt):
        yield


@contextmanager
def _handling_sigterm(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Only the main thread may set a handler; elsewhere nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
