"""What one pod (or one host of a Slurm job) executes: `python -m sluice.training.node WORK_DIR`.

The launcher of this node's processes, with the rendezvous that the cluster's trainer hands over in PET_* variables (or
Slurm's own). It ends with exit code 0 when training finished, 75 when it was saved after SIGTERM (spot, eviction) and
should be started again, and the code of the error otherwise. Over several nodes the network is checked first. Node 0
copies checkpoints to the object store beside training.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from sluice.infra.errors import InputError, SluiceError
from sluice.training.checkpoint_mirror import CheckpointMirror
from sluice.training.job import Job
from sluice.training.launcher import RENDEZVOUS_PORT, sigterm_as_interrupted
from sluice.training.node_types import dollars_per_hour
from sluice.training.preflight_launch import PreflightPlan, require_passed, run_preflight
from sluice.training.torchrun import Rendezvous, TorchrunLauncher

NODE_TYPE = "SLUICE_TRAINING__NODE_TYPE"
JOIN_S = 600.0
"""How long the preflight waits for the slowest node: its image may be pulled."""


def rendezvous_of(environment: Mapping[str, str]) -> Rendezvous:
    """From PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT; nothing set means one node.

    Raises `InputError` naming the variable that is missing or no number.
    """
    if int(_number(environment, "PET_NNODES", "1")) == 1:
        return Rendezvous()
    for name in ("PET_MASTER_ADDR", "PET_NODE_RANK"):
        if not environment.get(name):
            raise InputError(f"PET_NNODES is {environment['PET_NNODES']}, but {name} is not set.")
    port = _number(environment, "PET_MASTER_PORT", str(RENDEZVOUS_PORT))
    endpoint = f"{environment['PET_MASTER_ADDR']}:{port}"
    return Rendezvous(int(environment["PET_NNODES"]), int(_number(environment, "PET_NODE_RANK", "0")), endpoint)


def _number(environment: Mapping[str, str], name: str, default: str) -> str:
    value = environment.get(name, default)
    if not value.isdigit():
        raise InputError(f"{name} = {value!r} is no number.", hint="A fixed number of nodes is needed, not a range.")
    return value


@sigterm_as_interrupted()
def run(work_dir: Path) -> None:
    """Train this node's share of the job in `work_dir`. Raises what `TorchrunLauncher.run` raises."""
    job, where = Job.read(work_dir), rendezvous_of(os.environ)
    if where.nodes != job.recipe.parallelism.nodes:
        raise InputError(
            f"PET_NNODES = {where.nodes}, but the job's recipe says parallelism.nodes = {job.recipe.parallelism.nodes}."
        )
    node_type = os.environ.get(NODE_TYPE, "")
    if where.endpoint is not None:
        # A fabric that fell back to sockets would cost hours; finding that out costs a minute.
        address, _, port = where.endpoint.rpartition(":")
        processes = job.recipe.parallelism.processes
        require_passed(
            run_preflight(
                PreflightPlan(node_type, "nccl", processes, where.nodes, where.node, address, int(port) + 1, JOIN_S)
            )
        )
    mirror = _mirror(job) if where.node == 0 else None
    with tempfile.TemporaryDirectory() as local:
        # The lock is local: shared file systems are often mounted without flock.
        TorchrunLauncher(job, None, mirror, where, dollars_per_hour(node_type, where.nodes), Path(local)).run(
            lambda done, total, message: print(f"step {done:g} of {total:g}: {message}", flush=True)
        )


def _mirror(job: Job) -> CheckpointMirror | None:
    """The object store of the pod's settings (`SLUICE_OBJECT_STORE__...`), where the job names a place in it."""
    from sluice.infra.object_store import S3ObjectStore
    from sluice.infra.settings import load_settings

    return CheckpointMirror(S3ObjectStore(load_settings().object_store), job.mirror) if job.mirror else None


def main(arguments: list[str]) -> int:
    try:
        run(Path(arguments[0]))
    except SluiceError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
