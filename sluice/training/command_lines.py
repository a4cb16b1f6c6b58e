"""A `ClusterJob` for machines without Kubernetes: one line a node, or an sbatch script for Slurm.

Both start the same program on each node with the same variables as the TrainJob. PET_* are torchrun's own variables,
which Kubeflow sets on a cluster and these lines set here; `sluice.training.node` reads them and starts torchrun with a
c10d rendezvous on node 0 (torchrun's static one hangs when it starts again). Secrets are not written down: the lines
end at once when the environment that they run in lacks them.
"""

from __future__ import annotations

import math
import shlex

from sluice.training.launcher import INTERRUPTED, RENDEZVOUS_PORT, ClusterJob, Secret

SLURM_NOTICE_S = 120
"""Slurm's notice before the time limit; a recipe that needs more to save gets more."""


def torchrun_lines(job: ClusterJob) -> str:
    """For each node the line to run there; `MASTER_ADDR` is the address of node 0."""
    command = shlex.join(job.command)
    lines = [f"# {job.name}: run each line on its node, with MASTER_ADDR set to an address of node 0 that all reach."]
    lines.append(f"# Needs the environment of {job.image}, and {job.mount} mounted on every node.")
    for rank in range(job.nodes):
        variables = [f"{name}={value}" for name, value in _assignments(job).items()]
        variables += [f"PET_NODE_RANK={rank}", 'PET_MASTER_ADDR="${MASTER_ADDR:?}"']
        lines.append(f"env {' '.join(variables)} {_bounded(job)} {command}")
    return "\n".join(lines) + "\n"


def slurm_script(job: ClusterJob) -> str:
    """A script for sbatch: a task a node, a notice before the time limit, queued again after exit code 75."""
    notice = max(SLURM_NOTICE_S, job.grace_s)
    minutes = math.ceil((job.deadline_s + notice) / 60)
    exports = "\n".join(f"export {name}={value}" for name, value in _assignments(job).items())
    partition = f"#SBATCH --partition={job.queue}\n" if job.queue else ""
    qos = f"#SBATCH --qos={job.priority}\n" if job.priority else ""
    return f"""#!/bin/bash
#SBATCH --job-name={job.name}
#SBATCH --nodes={job.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:{job.processes}
#SBATCH --constraint={job.node_type}
#SBATCH --time={minutes}
#SBATCH --signal=B:TERM@{notice}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={shlex.quote(str(job.work_dir))}.slurm.log
{"#SBATCH --exclusive" + chr(10) if job.nodes > 1 else ""}{partition}{qos}
# Needs the environment of {job.image}, and {job.mount} mounted on every node.
set -uo pipefail
{exports}
# One address for all nodes: that of the first.
PET_MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export PET_MASTER_ADDR

# A node that saved must not end the others while they save: no --kill-on-bad-exit, but the others follow soon.
srun --kill-on-bad-exit=0 --wait={job.grace_s} \\
  bash -c 'PET_NODE_RANK="$SLURM_NODEID" exec "$@"' node {shlex.join(job.command)} &
step=$!
# The notice reaches this script alone; srun passes it on to every node. The trap ends `wait` early: wait again.
trap 'noticed=1; kill -TERM "$step" 2>/dev/null' TERM
noticed=1
while [ -n "$noticed" ]; do
  noticed=
  wait "$step"
  code=$?
done
if [ "$code" -eq {INTERRUPTED} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def _bounded(job: ClusterJob) -> str:
    """Ends the node's program at the deadline as a cluster does: SIGTERM to save, SIGKILL after the grace."""
    return f"timeout --signal=TERM --kill-after={job.grace_s} {job.deadline_s}"


def _assignments(job: ClusterJob) -> dict[str, str]:
    """Variables that are the same on every node, each value quoted for a shell."""
    values = {
        name: f'"${{{name}:?}}"' if isinstance(value, Secret) else shlex.quote(value)
        for name, value in job.environment().items()
    }
    return values | {
        "PET_NNODES": str(job.nodes),
        "PET_NPROC_PER_NODE": str(job.processes),
        "PET_MASTER_PORT": str(RENDEZVOUS_PORT),
    }
