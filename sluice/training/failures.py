"""Why training processes ended, read from what they printed."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

from sluice.training.journal import Event

_ECHO = re.compile(
    r"ChildFailedError|DistBackendError|DistNetworkError|DistStoreError|SignalException"
    r"|(?i:gloo).*(Connection (closed|reset)|Timed out|Broken pipe|timeout)|Connection (closed|reset) by peer|NCCL"
)
"""What a process says because another one failed: never the cause while something else is on record."""
START_AGAIN = 77
"""Exit code of a process that wants the whole run restarted from the base: a roll-back before the first checkpoint."""
_FAILED = re.compile(rb"failed \(exitcode: (-?\d+)\) local_rank: (\d+) \(pid: (\d+)\)")


def is_echo(message: str) -> bool:
    """Whether an exception's text tells of another process's end, so that a restart may mend it."""
    return bool(_ECHO.search(message))


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
        if not is_echo(exception):
            return exception
    killed = re.search(r"exitcode\s*:\s*-(\d+)", log)
    if killed:
        return f"a training process was {_killed_by(int(killed[1]))}"
    return exceptions[0] if exceptions else f"the processes ended with exit code {returncode} and no message."


class DeadRanks:
    """Notices in torchrun's log that a process died, once for each. One that wants to start again did not."""

    def __init__(self, log: Path, position: int, restarts: int) -> None:
        self._log, self._position, self._restarts, self._seen = log, position, restarts, 0

    def new(self) -> Iterator[Event]:
        with self._log.open("rb") as stream:
            stream.seek(self._position)
            data = stream.read()
        end = data.rfind(b"\n") + 1
        self._position += end
        for code, rank, pid in _FAILED.findall(data[:end]):
            number = int(code)
            if number == START_AGAIN:
                continue
            self._seen += 1
            how = _killed_by(-number) if number < 0 else f"ended with exit code {number}."
            left = self._restarts - self._seen
            then = f" All start again from the last checkpoint; {left} restarts are left." if left >= 0 else ""
            sentence = (
                f"Training process {int(rank)} (pid {int(pid)}) was {how}"
                if number < 0
                else (f"Training process {int(rank)} (pid {int(pid)}) {how}")
            )
            yield Event("dead_rank", sentence + then, level="warning", details={"rank": int(rank), "exit_code": number})


def _killed_by(number: int) -> str:
    name = signal.Signals(number).name
    return f"killed by {name}" + (", perhaps for lack of memory." if name == "SIGKILL" else ".")
