"""Running the training processes of one node: start, follow, stop, explain.

The run is wanted as long as `TorchrunLauncher.run` has not returned. Whatever ends it (an exception, a SIGTERM to this
process, the budget, or even kill -9), no training process outlives it by more than a moment: see
`sluice.training.entry.exit_with_launcher`.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from sluice.infra.errors import ConflictError, StepFailed
from sluice.infra.progress import Report, no_report

_SECONDARY = re.compile(
    r"ChildFailedError|DistBackendError|DistNetworkError|SignalException"
    r"|gloo.*(Connection (closed|reset)|Timed out|Broken pipe)|Connection (closed|reset) by peer"
)
"""What a process says because another one failed: never the cause while something else is on record."""


@dataclass(frozen=True)
class TorchrunLauncher:
    """How to start one node's processes. `config` is AutoModel's configuration file; times in seconds."""

    config: Path
    work_dir: Path
    metrics: Path
    processes: int
    max_steps: int
    timeout_s: float
    poll_s: float = 0.5
    grace_s: float = 15.0
    patience_s: float = 5.0

    @property
    def log(self) -> Path:
        """Everything the processes printed, all attempts one after the other."""
        return self.work_dir / "train.log"

    @property
    def hardware(self) -> Path:
        return self.work_dir / "hardware.json"

    def run(self, report: Report = no_report) -> None:
        """Train until the processes end by themselves with success.

        Raises `StepFailed` with the cause when they fail or exceed `timeout_s`, and `ConflictError` when another
        process trains in the same folder. SIGTERM raises SystemExit here after the processes were stopped.
        """
        self.work_dir.mkdir(parents=True, exist_ok=True)
        with (
            _exclusive(self.work_dir / "launcher.lock", self.patience_s) as lock,
            _terminate_as_exception(),
            self.log.open("ab") as log,
        ):
            attempt_start = log.tell()
            _end_last_line(self.metrics)
            process = subprocess.Popen(
                self._command(lock),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
            )
            try:
                self._follow(process, report)
            finally:
                _stop(process, self.grace_s)
            if process.returncode != 0:
                text = self.log.read_bytes()[attempt_start:].decode("utf-8", "replace")
                raise StepFailed(f"Training failed: {find_cause(text, process.returncode)}", hint=f"Log: {self.log}.")

    def _command(self, lock: Path) -> list[str]:
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            # A rendezvous on a free local port. Restarts are the step's business: it resumes from the checkpoint.
            "--standalone",
            "--local-addr=127.0.0.1",
            f"--nproc-per-node={self.processes}",
            "--max-restarts=0",
            "-m",
            "sluice.training.entry",
            str(self.config),
            str(lock),
            str(self.hardware),
        ]

    def _environment(self) -> dict[str, str]:
        # Threads beyond the cores cost more than they bring, and their number decides the order of float additions.
        threads = max(1, (os.cpu_count() or 1) // self.processes)
        defaults = {
            "OMP_NUM_THREADS": str(threads),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
            # Keep large freed blocks: giving each back to the kernel costs a page fault for every 4 KiB taken again.
            "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
            "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
        }
        if sys.platform == "linux":
            defaults["GLOO_SOCKET_IFNAME"] = "lo"
        return defaults | dict(os.environ)

    def _follow(self, process: subprocess.Popen[bytes], report: Report) -> None:
        started = time.monotonic()
        position = self.metrics.stat().st_size if self.metrics.exists() else 0
        report(0, self.max_steps, f"starting {self.processes} training processes")
        while True:
            ended = process.poll() is not None
            records, position = read_records(self.metrics, position)
            for record in records:
                step = int(record["step"]) + 1
                report(step, self.max_steps, f"loss {record['loss']:.3f}, {record.get('tps', 0.0):.0f} tokens/s")
            if ended:
                return
            if time.monotonic() - started > self.timeout_s:
                raise StepFailed(
                    f"Training took longer than its budget budget.timeout_minutes = {self.timeout_s / 60:g}.",
                    hint=f"Run again to resume from the last checkpoint, or raise the budget. Log: {self.log}.",
                )
            time.sleep(self.poll_s)


def read_records(path: Path, position: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Whole JSON lines of `path` after byte `position`, and the position after them. No file is no lines."""
    try:
        with path.open("rb") as stream:
            stream.seek(position)
            data = stream.read()
    except FileNotFoundError:
        return [], position
    end = data.rfind(b"\n") + 1
    records = []
    for line in data[:end].splitlines():
        # A line that a kill cut in two is passed over; the step is done again from the checkpoint.
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records, position + end


def _end_last_line(path: Path) -> None:
    """Close a line that a kill cut in two, so that the next attempt's first line stands alone."""
    if path.is_file() and not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as stream:
            stream.write(b"\n")


def find_cause(log: str, returncode: int) -> str:
    """The line that says why: the first exception that is not another process's echo, else how a process ended."""
    exceptions = []
    lines = [re.sub(r"^\[?(default\d*|rank\d+)\]?:\s?", "", line) for line in log.splitlines()]
    for start, line in enumerate(lines):
        if not line.startswith("Traceback (most recent call last)"):
            continue
        for following in lines[start + 1 :]:
            if following and not following[0].isspace():
                exceptions.append(following.strip())
                break
    for exception in exceptions:
        if not _SECONDARY.search(exception):
            return exception
    killed = re.search(r"exitcode\s*:\s*-(\d+)", log)
    if killed:
        name = signal.Signals(int(killed[1])).name
        return f"a training process was killed by {name}" + (
            ", perhaps for lack of memory." if name == "SIGKILL" else "."
        )
    return exceptions[0] if exceptions else f"the processes ended with exit code {returncode} and no message."


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
def _terminate_as_exception() -> Iterator[None]:
    """SIGTERM as SystemExit, so that `finally` runs. Only the main thread may set a handler; elsewhere nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """End torchrun and its processes: SIGTERM lets them save a checkpoint, SIGKILL follows after `grace_s`.

    torchrun puts each process in a session of its own; they end by themselves when torchrun is gone.
    """
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=grace_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
