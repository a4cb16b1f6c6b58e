"""Running the training processes of one node: start, follow, stop, explain.

The run is wanted as long as `TorchrunLauncher.run` has not returned. Whatever ends it (an exception, SIGTERM to this
process, the budget, or even kill -9), no training process outlives it by more than a moment: see
`sluice.training.entry.exit_with_launcher`. A process that dies alone is restarted with all others from the last
checkpoint by torchrun, as often as `guards.ranks.restarts` says.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from sluice.infra.errors import ConflictError, Interrupted, StepFailed
from sluice.infra.progress import Report, no_report
from sluice.training.checkpoint_mirror import CheckpointMirror, mirrored
from sluice.training.failures import DeadRanks, find_cause
from sluice.training.flight import finding, flight_dir, flight_environment
from sluice.training.job import LOG, Job, Outcome
from sluice.training.journal import Event, Journal, JournalReader, Observer
from sluice.training.progress_line import ProgressLine
from sluice.training.run_figures import RunFigures


@dataclass(frozen=True)
class Rendezvous:
    """Where the processes of all nodes find each other. One node needs no endpoint: a free local port is taken."""

    nodes: int = 1
    node: int = 0
    endpoint: str | None = None

    def arguments(self) -> list[str]:
        """For torchrun. c10d, not static: a static rendezvous hangs when processes are restarted."""
        if self.endpoint is None:
            return ["--standalone", "--local-addr=127.0.0.1"]
        return [
            f"--nnodes={self.nodes}",
            f"--node-rank={self.node}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.endpoint}",
            "--rdzv-id=sluice",
        ]


@dataclass(frozen=True)
class TorchrunLauncher:
    """One node's processes of a job. `mirror` gets copies of the checkpoints, `lock_dir` is on a local disk.

    `price_per_hour` (of all nodes, in dollars) makes cost visible and `budget.dollars` count. Times in seconds.
    """

    job: Job
    observer: Observer | None = None
    mirror: CheckpointMirror | None = None
    rendezvous: Rendezvous = field(default_factory=Rendezvous)
    price_per_hour: float | None = None
    lock_dir: Path | None = None
    poll_s: float = 0.5
    patience_s: float = 5.0

    @property
    def log(self) -> Path:
        """Everything the processes printed, all attempts one after the other."""
        suffix = f".{self.rendezvous.node}" if self.rendezvous.node else ""
        return self.job.work_dir / f"{LOG}{suffix}"

    def describe(self) -> str:
        """The command of each node, for people."""
        return " ".join(self._command(Path("launcher.lock")))

    def run(self, report: Report = no_report) -> Outcome:
        """Train until the processes end in an orderly way: `finished` or `paused`.

        Raises `StepFailed` with the cause when they fail, a guard stops them or a budget is spent, `Interrupted` when
        SIGTERM came and the run is saved, and `ConflictError` when another process trains in the same folder.
        """
        work_dir = self.job.work_dir
        lock_dir = self.lock_dir or work_dir
        lock_dir.mkdir(parents=True, exist_ok=True)
        with (
            _exclusive(lock_dir / "launcher.lock", self.patience_s) as lock,
            _notices() as notice,
            mirrored(self.job, self.mirror),
            self.log.open("ab") as log,
        ):
            attempt_start = log.tell()
            Journal(work_dir).end_lines()
            Outcome.clear(work_dir)
            if self.rendezvous.node == 0:
                where = self.job.recipe.parallelism
                sentence = f"Starting {where.world_size} training processes, {where.processes} on each node."
                Journal(work_dir).write(Event("launched", sentence))
                # What an earlier attempt hung in is not this one's finding.
                shutil.rmtree(flight_dir(work_dir), ignore_errors=True)
            process = subprocess.Popen(
                self._command(lock),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
            )
            grace_s = self.job.recipe.budget.notice_s
            try:
                if not self._follow(process, report, notice, attempt_start):
                    grace_s = 0.0
            finally:
                _stop(process, grace_s)
            return self._conclude(process.returncode, attempt_start, noticed=notice.is_set())

    def _conclude(self, returncode: int, attempt_start: int, *, noticed: bool) -> Outcome:
        outcome = Outcome.read(self.job.work_dir)
        if outcome is None or (returncode and outcome.kind not in ("stopped", "failed")):
            text = self.log.read_bytes()[attempt_start:].decode("utf-8", "replace")
            cause = finding(self.job.work_dir) or find_cause(text, returncode)
            if noticed:
                raise Interrupted(
                    "Training was told to stop and could not save in time.",
                    hint="Run again: it goes on from its last checkpoint.",
                )
            raise StepFailed(f"Training failed: {cause}", hint=f"Log: {self.log}.")
        if outcome.kind == "interrupted":
            raise Interrupted(f"Training was told to stop. {outcome.sentence}", hint="Run again to continue.")
        if outcome.kind == "stopped":
            raise StepFailed(f"Training was stopped: {outcome.sentence}", hint=f"docs/guards.md; log: {self.log}.")
        if outcome.kind == "failed":
            raise StepFailed(f"Training failed: {outcome.sentence}", hint=f"Log: {self.log}.")
        return outcome

    def _command(self, lock: Path) -> list[str]:
        guards = self.job.recipe.guards
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *self.rendezvous.arguments(),
            f"--nproc-per-node={self.job.recipe.parallelism.processes}",
            f"--max-restarts={guards.ranks.restarts + guards.roll_backs}",
            "-m",
            "sluice.training.entry",
            str(self.job.work_dir),
            str(lock),
        ]

    def _environment(self) -> dict[str, str]:
        # Threads beyond the cores cost more than they bring, and their number decides the order of float additions.
        threads = max(1, (os.cpu_count() or 1) // self.job.recipe.parallelism.processes)
        defaults = {
            "OMP_NUM_THREADS": str(threads),
            # Without it a restart finds the store of the attempt before, and fails.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
            # Keep large freed blocks: giving each back to the kernel costs a page fault for every 4 KiB taken again.
            "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
            "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
        }
        if sys.platform == "linux" and self.rendezvous.nodes == 1:
            defaults["GLOO_SOCKET_IFNAME"] = "lo"
        return defaults | flight_environment(self.job.work_dir) | dict(os.environ)

    def _follow(
        self, process: subprocess.Popen[bytes], report: Report, notice: threading.Event, attempt_start: int
    ) -> bool:
        """Until the processes have ended, or need not be waited for: False when there is nothing left to save."""
        job, started = self.job, time.monotonic()
        reader, before = JournalReader(job.work_dir, from_end=True), JournalReader(job.work_dir).new()
        world = job.recipe.parallelism.world_size
        line = ProgressLine(report, max_steps=job.last_step, devices=world, dollars_per_hour=self.price_per_hour)
        observers: list[Observer] = [line, *([self.observer] if self.observer else [])]
        figures = line.figures
        line.see(before)
        dead = DeadRanks(self.log, attempt_start, job.recipe.guards.ranks.restarts)
        told: set[int] = set()
        told_at = 0.0
        while True:
            ended = process.poll() is not None
            for event in dead.new():
                Journal(job.work_dir).write(event)
            if lines := reader.new():
                for observer in observers:
                    observer.see(lines)
            if ended:
                return True
            outcome = Outcome.read(job.work_dir)
            if outcome is not None and outcome.kind == "failed":
                # Every restart would meet it again, and torchrun may be about to try.
                return False
            if notice.is_set():
                if not told_at:
                    told_at = time.monotonic()
                    self._tell("notice", "SIGTERM came: saving.", figures.steps_done)
                # Again and again: torchrun may restart processes that were still starting and died of it.
                told |= _signal_ranks(process, signal.SIGTERM, told)
                if time.monotonic() - told_at > job.recipe.budget.notice_s:
                    return False
            self._check_budget(time.monotonic() - started, figures)
            time.sleep(self.poll_s)

    def _check_budget(self, seconds: float, figures: RunFigures) -> None:
        budget, over = self.job.recipe.budget, ""
        if seconds > budget.timeout_minutes * 60:
            over = f"longer than its budget budget.timeout_minutes = {budget.timeout_minutes:g}"
        elif budget.dollars is not None and figures.dollars is not None and figures.dollars > budget.dollars:
            over = f"${figures.dollars:.2f}, more than its budget budget.dollars = {budget.dollars:g}"
        if over:
            self._tell("stopped", f"Training took {over}.", figures.steps_done)
            raise StepFailed(
                f"Training took {over}.",
                hint=f"Run again to resume from the last checkpoint, or raise the budget. Log: {self.log}.",
            )

    def _tell(self, kind: str, sentence: str, step: int) -> None:
        Journal(self.job.work_dir).write(Event(kind, sentence, step, "warning"))


@contextmanager
def _exclusive(path: Path, patience_s: float) -> Iterator[Path]:
    """Hold the folder's lock. A moment of patience: processes of a killed run look at the lock before they end."""
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise ConflictError(
                        f"Another process trains in {path.parent}.", hint="Wait for it, or give another work folder."
                    ) from error
                time.sleep(0.2)
        yield path
    finally:
        os.close(handle)


@contextmanager
def alone(work_dir: Path, patience_s: float = 5.0) -> Iterator[None]:
    """Change a work folder while nobody trains in it. Raises `ConflictError` when a launcher of this machine does."""
    with ExitStack() as stack:
        # A shared file system without locks: there a job's name keeps a second one away.
        with suppress(OSError):
            stack.enter_context(_exclusive(work_dir / "launcher.lock", patience_s))
        yield


@contextmanager
def _notices() -> Iterator[threading.Event]:
    """An event that SIGTERM sets. Only the main thread may set a handler; elsewhere it is never set."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def note(number: int, frame: FrameType | None) -> None:
        came.set()

    previous = signal.signal(signal.SIGTERM, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, previous)


def _signal_ranks(process: subprocess.Popen[bytes], number: int, but: Collection[int] = ()) -> set[int]:
    """To the training processes, past torchrun: told itself, it gives them 30 s, which may be too few to save.

    Returns the pids that were told now; those in `but` are not told again.
    """
    import psutil

    told = set()
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            if child.pid not in but:
                with suppress(psutil.NoSuchProcess):
                    child.send_signal(number)
                    told.add(child.pid)
    return told


def _stop(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """End torchrun and its processes: SIGTERM lets them save a checkpoint, SIGKILL follows after `grace_s`.

    torchrun puts each process in a session of its own; they end by themselves when torchrun is gone.
    """
    if process.poll() is None:
        _signal_ranks(process, signal.SIGTERM)
        try:
            process.wait(timeout=grace_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
