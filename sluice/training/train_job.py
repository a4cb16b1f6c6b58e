"""A `ClusterJob` as a TrainJob of Kubeflow Trainer 2.3 (trainer.kubeflow.org/v1alpha1), and the runtime it refers to.

The TrainJob says what this run needs; the TrainingRuntime what every run of Sluice has in common, above all what
happens when a pod ends. A pod that ends with 75 has saved after a notice, and a pod that was evicted, preempted or
drained (condition DisruptionTarget) would have: the whole set starts again, as often as it takes within the deadline.
Any other end counts against the recipe's restarts. All nodes start again together (BlockingRecreate: none before the
last old pod is gone), because a collective cannot go on without one of them.

The runtime's name ends with the digest of its body: creating it again is success, and another version of Sluice never
changes the runtime under a job that waits.
"""

from __future__ import annotations

from typing import Any

from sluice.provenance.canonical import digest_json
from sluice.training.launcher import INTERRUPTED, ClusterJob, Secret

API_VERSION = "trainer.kubeflow.org/v1alpha1"
_NODE = "node"
"""Kubeflow's fixed name of the job and the container that it gives PET_* to."""
_RULE = "SavedAfterNotice"


def runtime_body(job: ClusterJob) -> dict[str, Any]:
    """The TrainingRuntime (namespaced) that the job refers to."""
    pod = {
        # A pod that ends is not started again by itself; see the module's text.
        "restartPolicy": "Never",
        "containers": [
            {
                "name": _NODE,
                # Replaced by the TrainJob's.
                "image": job.image,
                # The end of its log becomes the pod's message: the cause is there when the log is gone.
                "terminationMessagePolicy": "FallbackToLogsOnError",
                # RDMA pins memory.
                "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},
                "volumeMounts": [
                    {"name": "shm", "mountPath": "/dev/shm"},
                    {"name": "shared", "mountPath": str(job.mount)},
                ],
            }
        ],
        # The TrainJob says which claim `shared` is.
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": job.shape.shared_memory}}],
    }
    failure = {
        "rules": [
            {
                "action": "FailJob",
                "onExitCodes": {"containerName": _NODE, "operator": "In", "values": [INTERRUPTED]},
            },
            {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        ]
    }
    spec = {
        "mlPolicy": {"numNodes": 1, "torch": {}},
        "template": {
            "spec": {
                "failurePolicy": {
                    "maxRestarts": job.restarts,
                    "restartStrategy": "BlockingRecreate",
                    "rules": [
                        {
                            "name": _RULE,
                            "action": "RestartJobSetAndIgnoreMaxRestarts",
                            "onJobFailureReasons": ["PodFailurePolicy"],
                        }
                    ],
                },
                # A process looks for node 0 by its host name before that one is ready.
                "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
                "replicatedJobs": [
                    {
                        "name": _NODE,
                        "template": {
                            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
                            "spec": {"backoffLimit": 0, "podFailurePolicy": failure, "template": {"spec": pod}},
                        },
                    }
                ],
            }
        },
    }
    return {
        "apiVersion": API_VERSION,
        "kind": "TrainingRuntime",
        "metadata": {
            "name": f"sluice-{digest_json(spec).removeprefix('sha256:')[:12]}",
            "namespace": job.namespace,
            "labels": {"trainer.kubeflow.org/framework": "torch", "app.kubernetes.io/name": "sluice"},
        },
        "spec": spec,
    }


def train_job_body(job: ClusterJob) -> dict[str, Any]:
    """The TrainJob. With a queue it is born suspended: Kueue lets it go when its quota is free, all nodes at once."""
    pod_spec = {
        "serviceAccountName": job.service_account,
        **placement(job),
        "terminationGracePeriodSeconds": job.grace_s,
        "volumes": [shared_volume(job)],
    }
    patch = {
        "metadata": {"labels": dict(job.labels), "annotations": pod_annotations(job)},
        "spec": pod_spec,
    }
    return {
        "apiVersion": API_VERSION,
        "kind": "TrainJob",
        "metadata": metadata(job),
        "spec": {
            "activeDeadlineSeconds": job.deadline_s + job.grace_s,
            "suspend": job.queue is not None,
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "TrainingRuntime",
                "name": runtime_body(job)["metadata"]["name"],
            },
            "trainer": {
                "numNodes": job.nodes,
                "numProcPerNode": job.processes,
                "image": job.image,
                "command": job.command,
                "env": environment(job),
                "resourcesPerNode": job.resources,
            },
            "runtimePatches": [
                {
                    "manager": "sluice.dev/launcher",
                    "trainingRuntimeSpec": {
                        "template": {
                            "spec": {
                                "replicatedJobs": [{"name": _NODE, "template": {"spec": {"template": patch}}}],
                            }
                        }
                    },
                }
            ],
        },
    }


def metadata(job: ClusterJob) -> dict[str, Any]:
    """Name, namespace, labels and annotations of the job's own object."""
    queued = {"kueue.x-k8s.io/queue-name": job.queue, "kueue.x-k8s.io/priority-class": job.priority}
    labels = dict(job.labels) | {label: value for label, value in queued.items() if value}
    return {
        "name": job.name,
        "namespace": job.namespace,
        "labels": labels,
        **({"annotations": dict(job.annotations)} if job.annotations else {}),
    }


def pod_annotations(job: ClusterJob) -> dict[str, str]:
    """Of each pod. Karpenter must not empty a node under a run to save money, nor because its image drifted."""
    return {**job.annotations, "karpenter.sh/do-not-disrupt": "true"}


def placement(job: ClusterJob) -> dict[str, Any]:
    """On-demand or reserved nodes of the type: a run over several nodes that loses one to a spot notice loses all."""
    return {
        "nodeSelector": {"node.kubernetes.io/instance-type": job.node_type},
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [
                        {
                            "matchExpressions": [
                                {
                                    "key": "karpenter.sh/capacity-type",
                                    "operator": "In",
                                    "values": ["reserved", "on-demand"],
                                }
                            ]
                        }
                    ]
                }
            }
        },
        "tolerations": [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
            {"key": "vpc.amazonaws.com/efa", "operator": "Exists", "effect": "NoSchedule"},
        ],
    }


def shared_volume(job: ClusterJob) -> dict[str, Any]:
    return {"name": "shared", "persistentVolumeClaim": {"claimName": job.claim}}


def environment(job: ClusterJob) -> list[dict[str, Any]]:
    """As a container's `env`; a secret's value is fetched by the kubelet and stands in no object."""
    return [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": value.name, "key": value.key}}}
        if isinstance(value, Secret)
        else {"name": name, "value": value}
        for name, value in job.environment().items()
    ]
