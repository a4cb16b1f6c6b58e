"""The bodies for Kubernetes: structure always, the real schemas and rules where they are at hand."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from sluice.training.launcher import INTERRUPTED
from sluice.training.pytorch_job import pytorch_job_body
from sluice.training.train_job import runtime_body, train_job_body
from sluice.training.train_job_launcher import as_yaml, describe_train_job, labelled
from tests.training.cluster import big_job

MANIFESTS = next(
    (
        folder / "shared/manifests"
        for folder in Path(__file__).resolve().parents
        if (folder / "shared/manifests").is_dir()
    ),
    Path("/work/shared/manifests"),
)


def pod_of(train_job: dict[str, Any]) -> dict[str, Any]:
    """What the TrainJob lays over the runtime's pod."""
    (patch,) = train_job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert node["name"] == "node"
    found: dict[str, Any] = node["template"]["spec"]["template"]
    return found


def test_a_train_job_asks_for_what_four_p5_nodes_have() -> None:
    job = big_job()
    body, runtime = train_job_body(job), runtime_body(job)
    spec = body["spec"]
    assert (body["apiVersion"], body["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert body["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "train"
    assert body["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "prod"
    assert spec["suspend"] is True
    assert spec["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert spec["activeDeadlineSeconds"] == 240 * 60 + 120
    trainer = spec["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (4, 8)
    assert trainer["command"] == ["python", "-m", "sluice.training.node", str(job.work_dir)]
    assert trainer["resourcesPerNode"]["limits"] == {
        "memory": "1536Gi",
        "nvidia.com/gpu": "8",
        "vpc.amazonaws.com/efa": "32",
        "hugepages-2Mi": "5120Mi",
    }
    secrets = [one for one in trainer["env"] if "valueFrom" in one]
    assert {one["valueFrom"]["secretKeyRef"]["name"] for one in secrets} == {"s3"}
    pod = pod_of(body)
    assert pod["metadata"]["annotations"]["karpenter.sh/do-not-disrupt"] == "true"
    assert pod["spec"]["nodeSelector"] == {"node.kubernetes.io/instance-type": "p5.48xlarge"}
    assert pod["spec"]["volumes"] == [{"name": "shared", "persistentVolumeClaim": {"claimName": "fsx-train"}}]
    # The recipe's 90 s to save in, and a moment to end the processes.
    assert pod["spec"]["terminationGracePeriodSeconds"] == 120


def test_exit_75_and_evictions_restart_all_nodes_and_do_not_count() -> None:
    template = runtime_body(big_job())["spec"]["template"]["spec"]
    job_spec = template["replicatedJobs"][0]["template"]["spec"]
    exits, conditions = job_spec["podFailurePolicy"]["rules"]
    assert (exits["action"], exits["onExitCodes"]["values"]) == ("FailJob", [INTERRUPTED])
    assert conditions["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    # A pod failure policy needs pods that are not started again by themselves.
    pod = job_spec["template"]["spec"]
    assert (pod["restartPolicy"], job_spec["backoffLimit"]) == ("Never", 0)
    policy = template["failurePolicy"]
    assert (policy["maxRestarts"], policy["restartStrategy"]) == (2, "BlockingRecreate")
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    mounted = {one["name"] for one in pod["containers"][0]["volumeMounts"]}
    given = {one["name"] for one in pod["volumes"] + pod_of(train_job_body(big_job()))["spec"]["volumes"]}
    assert mounted == given == {"shm", "shared"}


def test_a_runtime_is_named_by_its_content() -> None:
    one = runtime_body(big_job())
    assert runtime_body(replace(big_job(), deadline_s=5)) == one
    other = runtime_body(replace(big_job(), restarts=5))
    assert other["metadata"]["name"] != one["metadata"]["name"]


def test_without_a_queue_it_starts_at_once() -> None:
    job = replace(big_job(), queue=None, priority=None)
    assert train_job_body(job)["spec"]["suspend"] is False
    assert not [label for label in train_job_body(job)["metadata"]["labels"] if "kueue" in label]


def test_what_is_described_is_what_is_created() -> None:
    job = big_job()
    assert list(yaml.safe_load_all(describe_train_job(job))) == [runtime_body(job), labelled(train_job_body(job))]
    # Nothing but the annotation is added, and it changes with the body.
    first, second = labelled(train_job_body(job)), labelled(train_job_body(replace(job, nodes=2)))
    assert first["metadata"]["annotations"]["sluice.dev/body"] != second["metadata"]["annotations"]["sluice.dev/body"]
    assert first["spec"] == train_job_body(job)["spec"]


def test_a_pytorch_job_says_the_same_in_older_words() -> None:
    job = big_job()
    new, old = train_job_body(job)["spec"], pytorch_job_body(job)
    replicas = old["spec"]["pytorchReplicaSpecs"]
    assert {name: one["replicas"] for name, one in replicas.items()} == {"Master": 1, "Worker": 3}
    assert old["spec"]["nprocPerNode"] == "8"
    assert old["spec"]["runPolicy"]["activeDeadlineSeconds"] == new["activeDeadlineSeconds"]
    assert old["metadata"] == train_job_body(job)["metadata"]
    for one in replicas.values():
        pod = one["template"]["spec"]
        (container,) = pod["containers"]
        for name in ("image", "command", "env"):
            assert container[name] == new["trainer"][name]
        assert container["resources"] == new["trainer"]["resourcesPerNode"]
        patch = pod_of(train_job_body(job))
        assert one["template"]["metadata"] == patch["metadata"]
        for name in ("serviceAccountName", "nodeSelector", "affinity", "tolerations", "terminationGracePeriodSeconds"):
            assert pod[name] == patch["spec"][name]
    assert set(pytorch_job_body(replace(job, nodes=1))["spec"]["pytorchReplicaSpecs"]) == {"Master"}


@pytest.mark.skipif(not MANIFESTS.is_dir(), reason="the CRDs and their checker are not on this machine")
def test_the_crds_take_the_bodies(tmp_path: Path) -> None:
    job = big_job()
    spoilt = labelled(train_job_body(job))
    spoilt["spec"]["podTemplateOverrides"] = []
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(as_yaml(runtime_body(job), labelled(train_job_body(job)), pytorch_job_body(job)))
    bad.write_text(as_yaml(spoilt))
    folders = ",".join(str(MANIFESTS / "crds" / name) for name in ("kubeflow-trainer", "kubeflow-training-operator"))
    command = [sys.executable, str(MANIFESTS / "check_manifests.py"), "--crds", folders, str(good), str(bad)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert checked.stdout.splitlines()[0] == f"OK   {good}", checked.stdout + checked.stderr
    assert 'unknown field "spec.podTemplateOverrides"' in checked.stdout
    assert checked.returncode == 1
