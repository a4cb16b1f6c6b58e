"""What a job's objects say of it: why it waits, how it ended, what the cause was. Pure functions over plain JSON.

Conditions of a TrainJob: Suspended, Created, Complete, Failed (kubeflow/trainer, pkg/apis/trainer/v1alpha1). Of pods:
https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sluice.training.launcher import INTERRUPTED

Object = Mapping[str, Any]
_HOPELESS = (
    "ImagePullBackOff",
    "ErrImagePull",
    "InvalidImageName",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
)
"""Why a container waits for something that rarely comes by itself, while pods beside it hold accelerators."""


@dataclass(frozen=True)
class Ended:
    """How a job ended: `complete`, or not with the controller's own words."""

    complete: bool
    message: str


@dataclass(frozen=True)
class FailedPod:
    """The pod that failed first: its exit code, the platform's reason (OOMKilled, Evicted, ...), the end of its log."""

    name: str
    exit_code: int
    reason: str
    message: str

    @property
    def sentence(self) -> str:
        """What the exit itself says, in words."""
        if self.reason == "OOMKilled":
            return f"pod {self.name} was killed for lack of memory (OOMKilled)"
        if self.exit_code == INTERRUPTED:
            return f"pod {self.name} saved after a notice and was not started again"
        if self.exit_code > 128:
            try:
                return f"pod {self.name} was killed by {signal.Signals(self.exit_code - 128).name}"
            except ValueError:
                pass
        words = f" ({self.reason})" if self.reason not in ("", "Error") else ""
        return f"pod {self.name} ended with exit code {self.exit_code}{words}"


def ended(job: Object) -> Ended | None:
    """None while it waits or runs."""
    for name in ("Complete", "Failed"):
        if (condition := _condition(job, name)) is not None and condition["status"] == "True":
            words = ": ".join(word for word in (condition.get("reason"), condition.get("message")) if word)
            return Ended(name == "Complete", words)
    return None


def waiting(job: Object, pods: Sequence[Object], workload: Object | None) -> str:
    """Why not all of the job's nodes run yet; empty when they do. `workload` is Kueue's view of a queued job."""
    if job["spec"].get("suspend"):
        queue = job["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name", "")
        where = f"in the queue {queue}" if queue else "suspended"
        reserved = _condition(workload, "QuotaReserved") if workload else None
        said = f": {reserved['message']}" if reserved and reserved["status"] != "True" else ""
        return f"waits {where}{said}"
    created = _condition(job, "Created")
    if created is not None and created["status"] == "False":
        return f"was not created: {created.get('reason', '')} {created.get('message', '')}".strip()
    live = [pod for pod in pods if pod.get("status", {}).get("phase") in ("Pending", "Running")]
    pending = [pod for pod in live if pod["status"]["phase"] == "Pending"]
    wanted = int(job["spec"].get("trainer", {}).get("numNodes", 1))
    if pending:
        running = len(live) - len(pending)
        reasons = sorted({_why_pending(pod) for pod in pending})
        return f"{running} of {wanted} nodes run; {len(pending)} pods wait: {'; '.join(reasons)}"
    if len(live) < wanted:
        return f"{len(live)} of {wanted} nodes run; waits for the controller to create pods"
    return ""


def hopeless(pods: Sequence[Object]) -> str:
    """Why a pod can hardly ever start (an image that is not there, a secret that is not); empty if none is stuck."""
    for pod in pods:
        for status in _containers(pod):
            state = status.get("state", {}).get("waiting", {})
            if state.get("reason") in _HOPELESS:
                return f"{_name(pod)}: {state['reason']}: {state.get('message', '')}".rstrip(": ")
    return ""


def failed_pod(pods: Sequence[Object]) -> FailedPod | None:
    """The first to fail: the rest follow it. A pod that saved after a notice, or was ended beside another, comes last.

    Evicted pods have no container status, only their own reason.
    """
    found: list[tuple[bool, str, FailedPod]] = []
    for pod in pods:
        status = pod.get("status", {})
        for container in _containers(pod):
            over = container.get("state", {}).get("terminated") or container.get("lastState", {}).get("terminated")
            if over and over["exitCode"] != 0:
                one = FailedPod(_name(pod), over["exitCode"], over.get("reason", ""), over.get("message", ""))
                follower = over["exitCode"] in (INTERRUPTED, 128 + signal.SIGTERM, 128 + signal.SIGKILL)
                found.append((follower and one.reason != "OOMKilled", over.get("finishedAt", ""), one))
        if status.get("phase") == "Failed" and status.get("reason") and not _containers(pod):
            found.append((False, "", FailedPod(_name(pod), 1, status["reason"], status.get("message", ""))))
    return min(found, key=lambda one: one[:2])[2] if found else None


def _why_pending(pod: Object) -> str:
    for status in _containers(pod):
        state = status.get("state", {}).get("waiting", {})
        if state.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            return f"{state['reason']}: {state.get('message', '')}".rstrip(": ")
    scheduled = _condition(pod, "PodScheduled")
    if scheduled is not None and scheduled["status"] == "False":
        return f"{scheduled.get('reason', 'Unschedulable')}: {scheduled.get('message', '')}".rstrip(": ")
    return "its containers are being created"


def _containers(pod: Object) -> Sequence[Object]:
    statuses: Sequence[Object] = pod.get("status", {}).get("containerStatuses") or ()
    return statuses


def _condition(thing: Object, name: str) -> Object | None:
    conditions = thing.get("status", {}).get("conditions") or ()
    return next((one for one in conditions if one["type"] == name), None)


def _name(pod: Object) -> str:
    return str(pod["metadata"]["name"])
