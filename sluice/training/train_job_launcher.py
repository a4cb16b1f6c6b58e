"""Training as a TrainJob: create or find it again, follow it, say why it waits or failed, leave nothing behind.

The job's name is that of the training step's key. A launcher that was killed finds its job by that name and goes on
following it; one that is cancelled deletes it, and the pods save a checkpoint on their way out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sluice.infra.errors import AccessRefused, ConflictError, InputError, StepFailed, UnavailableError
from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import digest_json
from sluice.training.cluster_api import RUNTIMES, TRAIN_JOBS, WORKLOADS, ClusterApi
from sluice.training.cluster_status import FailedPod, ended, failed_pod, hopeless, waiting
from sluice.training.failures import find_cause
from sluice.training.journal import JournalReader, Observer, StepMetrics
from sluice.training.launcher import ClusterJob, sigterm_as_exit
from sluice.training.train_job import runtime_body, train_job_body

_BODY = "sluice.dev/body"
_T = TypeVar("_T")


@dataclass
class TrainJobLauncher:
    """One job on one cluster. Times in seconds: `poll_s` between two looks, `patience_s` that the API may be away, and
    `stuck_s` that a pod may wait for an image or a secret while others hold accelerators."""

    job: ClusterJob
    api: ClusterApi
    poll_s: float = 5.0
    patience_s: float = 600.0
    stuck_s: float = 600.0
    observer: Observer | None = None
    _failed: FailedPod | None = field(default=None, init=False)

    def describe(self) -> str:
        """Both objects as YAML, as `run` creates them."""
        return describe_train_job(self.job)

    def run(self, report: Report = no_report) -> None:
        """Train until the job is complete.

        Raises `StepFailed` with the cause of the pod that failed first, `ConflictError` when a job of this name runs
        with another body, `InputError` or `AccessRefused` when the cluster does not take it, and `UnavailableError`
        when the API is away for longer than `patience_s` (the job goes on; run again to follow it).
        """
        with sigterm_as_exit():
            try:
                self._ensure(report)
                failure = self._follow(report)
            except (KeyboardInterrupt, SystemExit, StepFailed):
                self._delete(report)
                raise
        # A failed job holds nothing any more. It stays, with its pods' logs, until it is tried again.
        if failure is not None:
            raise failure

    def cancel(self) -> None:
        """Delete the job and wait until its pods are gone."""
        self._delete(no_report)

    def _ensure(self, report: Report) -> None:
        """The job exists afterwards: ours, or one of the same body that an earlier attempt created."""
        report(0, self.job.max_steps, f"asking the cluster for {self.job.nodes} x {self.job.node_type}")
        self._insist(lambda: self.api.create(RUNTIMES, runtime_body(self.job)))
        body = labelled(train_job_body(self.job))
        deadline = time.monotonic() + self.patience_s
        while not self._insist(lambda: self.api.create(TRAIN_JOBS, body)):
            found = self._insist(lambda: self.api.get(TRAIN_JOBS, self.job.name))
            if found is not None and not found["metadata"].get("deletionTimestamp"):
                same = found["metadata"].get("annotations", {}).get(_BODY) == body["metadata"]["annotations"][_BODY]
                over = ended(found)
                if same and (over is None or over.complete):
                    return
                if over is None:
                    raise ConflictError(
                        f"The TrainJob {self.job.name} runs already, but with another image, size or placement.",
                        hint=f"Wait for it, or end it: kubectl -n {self.job.namespace} delete trainjob {self.job.name}",
                    )
                # It failed: a new one resumes from its checkpoints.
                self._insist(lambda: self.api.delete(TRAIN_JOBS, self.job.name))
            if time.monotonic() > deadline:
                raise UnavailableError(f"The former TrainJob {self.job.name} is still being deleted.")
            report(0, self.job.max_steps, "waiting for the former job to be gone")
            time.sleep(self.poll_s)

    def _follow(self, report: Report) -> StepFailed | None:
        """Until the job has ended: None, or why it failed. Raises `StepFailed` where it has to be ended from here."""
        journal = JournalReader(Path(self.job.work_dir))
        step, words, stuck_since = 0, "", None
        running_since: float | None = None
        while True:
            found = self._insist(lambda: self.api.get(TRAIN_JOBS, self.job.name))
            if found is None:
                raise StepFailed(f"The TrainJob {self.job.name} was deleted by somebody else.")
            pods = self._pods()
            self._failed = failed_pod(pods) or self._failed
            if (over := ended(found)) is not None:
                if over.complete:
                    report(self.job.max_steps, self.job.max_steps, "the cluster has finished training")
                    return None
                return self._failure(over.message)
            lines = journal.new()
            if lines and self.observer is not None:
                self.observer.see(lines)
            for line in lines:
                if isinstance(line, StepMetrics):
                    step, words = line.step, f"loss {line.loss:.3f}, {line.tokens_per_second:.0f} tokens/s"
            why = waiting(found, pods, self._workload(found))
            report(step, self.job.max_steps, why or words or "training")
            stuck_since = (stuck_since or time.monotonic()) if hopeless(pods) else None
            if stuck_since is not None and time.monotonic() - stuck_since >= self.stuck_s:
                raise StepFailed(f"A pod of {self.job.name} cannot start: {hopeless(pods)}.")
            # The controller's own deadline should have ended it long ago. Accelerators are not left to that alone.
            running_since = None if found["spec"].get("suspend") else running_since or time.monotonic()
            allowed = self.job.deadline_s + 2 * self.job.grace_s + self.patience_s
            if running_since is not None and time.monotonic() - running_since > allowed:
                raise StepFailed(f"The TrainJob {self.job.name} outlived its deadline of {self.job.deadline_s} s.")
            time.sleep(self.poll_s)

    def _failure(self, said: str) -> StepFailed:
        """The error of a job that failed, with the best cause that can be had."""
        budget = f"budget.timeout_minutes = {self.job.deadline_s / 60:g}"
        if "DeadlineExceeded" in said:
            return StepFailed(
                f"Training took longer than its budget {budget}.",
                hint="Run again to resume from the last checkpoint, or raise the budget.",
            )
        if (pod := self._failed) is None:
            return StepFailed(f"Training failed: {said or 'the cluster gives no reason'}.")
        cause = find_cause(self._log(pod), pod.exit_code)
        known = "" if "no message" in cause or pod.reason == "OOMKilled" else f": {cause}"
        return StepFailed(
            f"Training failed: {pod.sentence}{known}.".replace("..", "."),
            hint=f"The log of all attempts is train.log in {self.job.work_dir}. The controller says: {said}.",
        )

    def _log(self, pod: FailedPod) -> str:
        try:
            return self.api.log(pod.name) or pod.message
        except UnavailableError:
            return pod.message

    def _pods(self) -> list[dict[str, Any]]:
        return self._insist(lambda: self.api.pods(f"jobset.sigs.k8s.io/jobset-name={self.job.name}"))

    def _workload(self, found: dict[str, Any]) -> dict[str, Any] | None:
        """Kueue's object for a job that waits in a queue. Whoever may not read it learns less."""
        if not (found["spec"].get("suspend") and self.job.queue):
            return None
        try:
            labels = f"kueue.x-k8s.io/job-uid={found['metadata'].get('uid', '')}"
            return next(iter(self.api.listed(WORKLOADS, labels)), None)
        except (UnavailableError, InputError, AccessRefused):
            return None

    def _delete(self, report: Report) -> None:
        """Until the object is gone, and with it the pods: an accelerator is held until then."""
        report(0, self.job.max_steps, "ending the job on the cluster")
        self._insist(lambda: self.api.delete(TRAIN_JOBS, self.job.name))
        deadline = time.monotonic() + self.job.grace_s + self.patience_s
        while self._insist(lambda: self.api.get(TRAIN_JOBS, self.job.name)) is not None:
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"The TrainJob {self.job.name} was deleted, but its pods are still there and hold accelerators.",
                    hint=f"kubectl -n {self.job.namespace} get pods -l jobset.sigs.k8s.io/jobset-name={self.job.name}",
                )
            time.sleep(min(self.poll_s, 1.0))

    def _insist(self, ask: Callable[[], _T]) -> _T:
        """Ask again while the API is away, for `patience_s`: hours of training do not end because of that."""
        deadline = time.monotonic() + self.patience_s
        while True:
            try:
                return ask()
            except UnavailableError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(self.poll_s)


def labelled(body: dict[str, Any]) -> dict[str, Any]:
    """The body with its own digest as an annotation: the API adds defaults, so what it returns cannot be compared."""
    metadata = dict(body["metadata"])
    metadata["annotations"] = {**metadata.get("annotations", {}), _BODY: digest_json(body)}
    return {**body, "metadata": metadata}


def describe_train_job(job: ClusterJob) -> str:
    """The runtime and the TrainJob, as YAML documents that `kubectl apply -f -` takes."""
    return as_yaml(runtime_body(job), labelled(train_job_body(job)))


def as_yaml(*bodies: dict[str, Any]) -> str:
    import yaml

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump_all(bodies, Dumper=Plain, sort_keys=False, width=120)
