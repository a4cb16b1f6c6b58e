"""A `ClusterJob` as a PyTorchJob (kubeflow.org/v1), for clusters that still run the older training operator 1.9.

Two things that a TrainJob has are missing. There is no pod failure policy: a node that saved after a notice (exit code
75) and one that crashed are started again alike, and both count against `backoffLimit`. And there is no restart of all
nodes together: each pod starts again by itself, and the others meet it at the next rendezvous after theirs failed.

Without an `elasticPolicy`, and with node 0 as Master, the operator sets the same PET_* variables as a TrainJob's
runtime does, one address for all.
"""

from __future__ import annotations

from typing import Any

from sluice.training.launcher import RENDEZVOUS_PORT, ClusterJob
from sluice.training.train_job import environment, metadata, placement, pod_annotations, shared_volume

API_VERSION = "kubeflow.org/v1"


def pytorch_job_body(job: ClusterJob) -> dict[str, Any]:
    """The PyTorchJob: a Master, which is node 0, and a Worker for each further node."""
    replicas = {"Master": _replicas(job, 1)}
    if job.nodes > 1:
        replicas["Worker"] = _replicas(job, job.nodes - 1)
    return {
        "apiVersion": API_VERSION,
        "kind": "PyTorchJob",
        "metadata": metadata(job),
        "spec": {
            "nprocPerNode": str(job.processes),
            "runPolicy": {
                "activeDeadlineSeconds": job.deadline_s + job.grace_s,
                "backoffLimit": job.restarts,
                # Pods that still run when the job has ended hold accelerators; those that ended keep their logs.
                "cleanPodPolicy": "Running",
                "suspend": job.queue is not None,
            },
            "pytorchReplicaSpecs": replicas,
        },
    }


def _replicas(job: ClusterJob, count: int) -> dict[str, Any]:
    container = {
        # The operator's fixed name of the container that it gives PET_* to.
        "name": "pytorch",
        "image": job.image,
        "command": job.command,
        "env": environment(job),
        "ports": [{"name": "pytorchjob-port", "containerPort": RENDEZVOUS_PORT}],
        "resources": job.resources,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},
        "volumeMounts": [
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "shared", "mountPath": str(job.mount)},
        ],
    }
    return {
        "replicas": count,
        "restartPolicy": "OnFailure",
        "template": {
            "metadata": {"labels": dict(job.labels), "annotations": pod_annotations(job)},
            "spec": {
                "serviceAccountName": job.service_account,
                **placement(job),
                "terminationGracePeriodSeconds": job.grace_s,
                "containers": [container],
                "volumes": [
                    {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": job.shape.shared_memory}},
                    shared_volume(job),
                ],
            },
        },
    }
