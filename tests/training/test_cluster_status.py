"""Why a job waits and how it ended, from objects as the API sends them."""

from __future__ import annotations

from typing import Any

import pytest

from sluice.training.cluster_status import Ended, FailedPod, ended, failed_pod, hopeless, waiting


def job(*conditions: dict[str, str], suspend: bool = False) -> dict[str, Any]:
    return {
        "metadata": {"name": "a", "labels": {"kueue.x-k8s.io/queue-name": "train"}},
        "spec": {"suspend": suspend, "trainer": {"numNodes": 2}},
        "status": {"conditions": list(conditions)},
    }


def condition(kind: str, status: str, reason: str = "", message: str = "") -> dict[str, str]:
    return {"type": kind, "status": status, "reason": reason, "message": message}


def pod(name: str, phase: str, **status: Any) -> dict[str, Any]:
    return {"metadata": {"name": name}, "status": {"phase": phase, **status}}


def stuck(name: str, reason: str, message: str) -> dict[str, Any]:
    return pod(name, "Pending", containerStatuses=[{"state": {"waiting": {"reason": reason, "message": message}}}])


def over(name: str, code: int, at: str, reason: str = "Error", message: str = "") -> dict[str, Any]:
    terminated = {"exitCode": code, "finishedAt": at, "reason": reason, "message": message}
    return pod(name, "Failed", containerStatuses=[{"state": {"terminated": terminated}}])


def test_the_end_is_a_true_condition() -> None:
    assert ended(job(condition("Created", "True"))) is None
    assert ended(job(condition("Failed", "False"))) is None
    assert ended(job(condition("Complete", "True", "Done", "all nodes"))) == Ended(True, "Done: all nodes")
    assert ended(job(condition("Failed", "True", "DeadlineExceeded"))) == Ended(False, "DeadlineExceeded")
    assert ended({"metadata": {}, "spec": {}}) is None


def test_a_queue_says_why_it_holds_a_job() -> None:
    workload = {"status": {"conditions": [condition("QuotaReserved", "False", "Pending", "needs 16 more GPUs")]}}
    assert waiting(job(suspend=True), [], workload) == "waits in the queue train: needs 16 more GPUs"
    assert waiting(job(suspend=True), [], None) == "waits in the queue train"


def test_each_reason_of_a_pod_that_waits_is_said_once() -> None:
    unschedulable = condition("PodScheduled", "False", "Unschedulable", "0/9 nodes: untolerated taint {gpu: x}")
    pods = [pod("a-0", "Pending", conditions=[unschedulable]), pod("a-1", "Pending", conditions=[unschedulable])]
    said = waiting(job(), pods, None)
    assert said == "0 of 2 nodes run; 2 pods wait: Unschedulable: 0/9 nodes: untolerated taint {gpu: x}"
    pods = [pod("a-0", "Running"), stuck("a-1", "ImagePullBackOff", "no such image")]
    assert waiting(job(), pods, None) == "1 of 2 nodes run; 1 pods wait: ImagePullBackOff: no such image"
    pods = [pod("a-0", "Running"), stuck("a-1", "ContainerCreating", "")]
    assert "being created" in waiting(job(), pods, None)
    assert "waits for the controller" in waiting(job(), [pod("a-0", "Running")], None)
    assert waiting(job(), [pod("a-0", "Running"), pod("a-1", "Running")], None) == ""
    refused = job(condition("Created", "False", "JobsBuildFailed", "Failed to build Jobs"))
    assert waiting(refused, [], None) == "was not created: JobsBuildFailed Failed to build Jobs"


def test_only_what_rarely_mends_itself_is_hopeless() -> None:
    assert hopeless([stuck("a-0", "ContainerCreating", "")]) == ""
    found = hopeless([pod("a-1", "Running"), stuck("a-0", "CreateContainerConfigError", 'secret "s3" not found')])
    assert found == 'a-0: CreateContainerConfigError: secret "s3" not found'


@pytest.mark.parametrize(
    ("pods", "name", "words"),
    [
        # Those that were ended because another failed come later, whatever the clock says.
        ([over("a-0", 143, "10:00"), over("a-1", 1, "10:05")], "a-1", "exit code 1"),
        ([over("a-0", 75, "10:00"), over("a-1", 7, "10:05")], "a-1", "exit code 7"),
        ([over("a-0", 1, "10:09"), over("a-1", 2, "10:05")], "a-1", "exit code 2"),
        ([over("a-0", 137, "10:05", "OOMKilled"), over("a-1", 1, "10:06")], "a-0", "lack of memory"),
        ([over("a-0", 139, "10:05")], "a-0", "SIGSEGV"),
        ([over("a-0", 75, "10:05")], "a-0", "saved after a notice"),
        ([pod("a-0", "Failed", reason="Evicted", message="disk pressure")], "a-0", "(Evicted)"),
    ],
)
def test_the_pod_that_failed_first_is_the_cause(pods: list[dict[str, Any]], name: str, words: str) -> None:
    found = failed_pod(pods)
    assert found is not None
    assert found.name == name
    assert words in found.sentence


def test_nothing_failed() -> None:
    assert failed_pod([]) is None
    assert failed_pod([over("a-0", 0, "10:00", "Completed"), pod("a-1", "Running")]) is None
    assert FailedPod("a", 200, "Error", "").sentence == "pod a ended with exit code 200"
