"""The launcher against a server that answers as the Kubernetes API does."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from sluice.infra.errors import AccessRefused, ConflictError, InputError, StepFailed, UnavailableError
from sluice.training.cluster_api import ClusterApi
from sluice.training.journal import Journal, StepMetrics
from sluice.training.launcher import ClusterJob, Launcher
from sluice.training.train_job import train_job_body
from sluice.training.train_job_launcher import TrainJobLauncher, labelled
from tests.support.kubernetes_api import KubernetesApi, serve
from tests.training.cluster import big_job
from tests.training.test_cluster_status import condition, over, pod, stuck

FAILED_LOG = """[rank3]: Traceback (most recent call last):
[rank3]:   File "train.py", line 1, in main
[rank3]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB
"""


@pytest.fixture
def api() -> Iterator[KubernetesApi]:
    with serve() as server:
        yield server


@pytest.fixture
def job(tmp_path: Path) -> ClusterJob:
    return replace(big_job(), mount=PurePosixPath(tmp_path), work_dir=PurePosixPath(tmp_path / "work"))


def launcher(job: ClusterJob, api: KubernetesApi, **options: Any) -> TrainJobLauncher:
    options = {"poll_s": 0.01, "patience_s": 5.0} | options
    return TrainJobLauncher(job, ClusterApi(api.client(), job.namespace), **options)


def set_state(api: KubernetesApi, job: ClusterJob, *conditions: dict[str, str], suspend: bool = False) -> None:
    found = api.objects["trainjobs", job.name]
    found["spec"]["suspend"] = suspend
    found["status"] = {"conditions": list(conditions)}


def done(api: KubernetesApi, job: ClusterJob) -> None:
    set_state(api, job, condition("Complete", "True", "AllJobsCompleted"))


def test_a_job_is_created_followed_and_kept(api: KubernetesApi, job: ClusterJob) -> None:
    reports: list[tuple[float, float, str]] = []
    found: dict[str, Any] = {}
    Path(job.work_dir).mkdir(parents=True)

    def on_look(number: int) -> None:
        if number == 1:
            found.update(json.loads(json.dumps(api.objects["trainjobs", job.name])))
            # Kueue's own object is found by the job's uid.
            uid = api.objects["trainjobs", job.name]["metadata"]["uid"]
            workload["metadata"]["labels"] = {"kueue.x-k8s.io/job-uid": uid}
        if number == 2:
            set_state(api, job)
            api.pods = [pod(f"a-{n}", "Running") for n in range(4)]
            Journal(Path(job.work_dir)).write(StepMetrics(3, 0.5, 1.0, 1e-3, 400, 200, 2.0, 1.0))
        if number == 4:
            done(api, job)

    api.on_look = on_look
    workload: dict[str, Any] = {"metadata": {"name": "w", "labels": {}}, "status": {}}
    workload["status"] = {"conditions": [condition("QuotaReserved", "False", "", "needs 32 more nvidia.com/gpu")]}
    api.add("workloads", workload)
    run: Launcher = launcher(job, api)
    run.run(lambda *state: reports.append(state))
    words = [message for _, _, message in reports]
    assert "waits in the queue train: needs 32 more nvidia.com/gpu" in words
    assert (3, job.max_steps, "loss 0.500, 200 tokens/s") in reports
    assert list(reports[-1]) == [job.max_steps, job.max_steps, "the cluster has finished training"]
    # Both objects are what `describe` shows, but for what the API adds.
    runtime, body = yaml.safe_load_all(run.describe())
    for created, shown in ((api.objects["trainingruntimes", runtime["metadata"]["name"]], runtime), (found, body)):
        del created["metadata"]["uid"]
        assert created == shown


def test_a_second_attempt_finds_the_job_again(api: KubernetesApi, job: ClusterJob) -> None:
    api.add("trainjobs", labelled(train_job_body(job)))
    api.on_look = lambda number: done(api, job) if number > 2 else None
    launcher(job, api).run()
    assert [method for method, path in api.asked if "trainjobs" in path].count("POST") == 1
    assert "DELETE" not in {method for method, _ in api.asked}


def test_a_finished_job_is_not_run_again(api: KubernetesApi, job: ClusterJob) -> None:
    api.add("trainjobs", labelled(train_job_body(job)))
    done(api, job)
    launcher(job, api).run()
    assert api.looks == 2


def test_a_failed_job_is_replaced_and_resumes(api: KubernetesApi, job: ClusterJob) -> None:
    # Another body does not matter either: what failed holds nothing.
    api.add("trainjobs", labelled(train_job_body(replace(job, nodes=2))))
    set_state(api, job, condition("Failed", "True", "FailedJobs"))
    api.keep_deleted = 2
    api.on_look = lambda number: done(api, job) if number > 5 and ("trainjobs", job.name) in api.objects else None
    launcher(job, api).run()
    assert api.objects["trainjobs", job.name]["spec"]["trainer"]["numNodes"] == 4


def test_a_job_of_the_same_name_with_another_body_is_left_alone(api: KubernetesApi, job: ClusterJob) -> None:
    api.add("trainjobs", labelled(train_job_body(replace(job, nodes=2))))
    with pytest.raises(ConflictError, match="runs already, but with another image"):
        launcher(job, api).run()
    assert "DELETE" not in {method for method, _ in api.asked}


def test_the_cause_of_the_failed_pod_is_told_even_when_it_is_gone(api: KubernetesApi, job: ClusterJob) -> None:
    failing = [over("a-0", 143, "10:00"), over("a-1", 1, "10:05", message=FAILED_LOG)]

    def on_look(number: int) -> None:
        set_state(api, job)
        api.pods = failing if number == 2 else []
        if number == 3:
            set_state(api, job, condition("Failed", "True", "FailedJobs", "jobset failed"))

    api.on_look = on_look
    with pytest.raises(
        StepFailed, match=r"pod a-1 ended with exit code 1: torch\.OutOfMemoryError: CUDA out"
    ) as caught:
        launcher(job, api).run()
    assert "FailedJobs: jobset failed" in caught.value.hint
    # It holds nothing any more and stays for people to look at.
    assert ("trainjobs", job.name) in api.objects
    # The log, where it is still there, knows more than the pod's message.
    api.objects.clear()
    api.looks = 0
    api.logs["a-1"] = FAILED_LOG.replace("CUDA out of memory", "of the log")
    with pytest.raises(StepFailed, match="of the log"):
        launcher(job, api).run()


def test_the_deadline_is_told_as_the_recipes_budget(api: KubernetesApi, job: ClusterJob) -> None:
    api.on_look = lambda _: set_state(api, job, condition("Failed", "True", "DeadlineExceeded", "TrainJob was active"))
    with pytest.raises(StepFailed, match=r"longer than its budget budget\.timeout_minutes = 240"):
        launcher(job, api).run()


def test_a_pod_that_cannot_start_ends_the_job_before_it_costs_more(api: KubernetesApi, job: ClusterJob) -> None:
    api.pods = [pod("a-0", "Running"), stuck("a-1", "ImagePullBackOff", "no such image")]
    api.on_look = lambda _: set_state(api, job) if ("trainjobs", job.name) in api.objects else None
    with pytest.raises(StepFailed, match="a-1: ImagePullBackOff: no such image"):
        launcher(job, api, stuck_s=0.05).run()
    assert ("trainjobs", job.name) not in api.objects


def test_sigterm_deletes_the_job_and_waits_until_it_is_gone(api: KubernetesApi, job: ClusterJob) -> None:
    api.keep_deleted = 3
    api.on_look = lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == 3 else None
    with pytest.raises(SystemExit):
        launcher(job, api).run()
    assert ("trainjobs", job.name) not in api.objects


def test_pods_that_stay_are_told(api: KubernetesApi, job: ClusterJob) -> None:
    api.add("trainjobs", labelled(train_job_body(job)))
    api.keep_deleted = 10**6
    with pytest.raises(UnavailableError, match="hold accelerators"):
        launcher(replace(job, notice_s=-30), api, patience_s=0.1).cancel()


def test_an_api_that_is_away_for_a_while_ends_nothing(api: KubernetesApi, job: ClusterJob) -> None:
    def on_look(number: int) -> None:
        api.away = 2 if number == 1 else 0
        if number == 4:
            done(api, job)

    api.away = 2
    api.on_look = on_look
    launcher(job, api).run()
    assert api.looks == 4


def test_an_api_that_stays_away_is_told_and_the_job_goes_on(api: KubernetesApi, job: ClusterJob) -> None:
    def on_look(number: int) -> None:
        api.away = 10**6

    api.on_look = on_look
    with pytest.raises(UnavailableError, match="503"):
        launcher(job, api, patience_s=0.1).run()
    assert ("trainjobs", job.name) in api.objects
    assert "DELETE" not in {method for method, _ in api.asked}


@pytest.mark.parametrize(
    ("code", "error"), [(403, AccessRefused), (422, InputError), (400, InputError)], ids=["rbac", "invalid", "bad"]
)
def test_what_the_cluster_does_not_take_is_told(
    api: KubernetesApi, job: ClusterJob, code: int, error: type[Exception]
) -> None:
    api.refuse = (code, "admission webhook says no")
    with pytest.raises(error, match="admission webhook says no"):
        launcher(job, api).run()


def test_a_job_that_somebody_deletes_has_failed(api: KubernetesApi, job: ClusterJob) -> None:
    api.on_look = lambda number: api.objects.clear() if number == 2 else None
    with pytest.raises(StepFailed, match="deleted by somebody else"):
        launcher(job, api).run()


def test_another_thread_may_run_it(api: KubernetesApi, job: ClusterJob) -> None:
    api.on_look = lambda _: done(api, job)
    thread = threading.Thread(target=launcher(job, api).run)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
