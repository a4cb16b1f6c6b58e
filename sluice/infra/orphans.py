"""Find and end the processes of one installation, by what they carry and never by their name.

Each part runs with two variables in its environment: `SLUICE_PART` and `SLUICE_HOME` (absolute). Children inherit
them, so a part is found whoever started it and whatever has died since. A process may write its title over its
environment (vLLM's engine does); such a one is found as a descendant, or, when its parent is dead, as a member of
supervisord's session whose group has lost its leader.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

PART_VARIABLE = "SLUICE_PART"
HOME_VARIABLE = "SLUICE_HOME"
SUPERVISORD = "supervisord"


def find_processes(home: Path, part: str | None = None) -> list[psutil.Process]:
    """Processes of `part`, or of every part and supervisord, in the installation at `home` (absolute).

    The calling process and its ancestors are never among them.
    """
    spared = _self_and_ancestors()
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        carried = part_of(process, home)
        if carried is not None and part in (None, carried):
            found[process.pid] = process
    for process in list(found.values()):
        # supervisord's children are parts of their own: asked for by name, it answers for itself only.
        if part == SUPERVISORD:
            break
        try:
            found.update((child.pid, child) for child in process.children(recursive=True))
        except psutil.Error:
            continue
    return [process for pid, process in sorted(found.items()) if pid not in spared]


def find_leaderless(session: int) -> list[psutil.Process]:
    """Members of `session` (the process id of its supervisord) that hide their environment and lost their leader."""
    spared = _self_and_ancestors()
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid in spared or os.getsid(process.pid) != session:
                continue
            leader = os.getpgid(process.pid)
            if leader == process.pid or psutil.pid_exists(leader) or "PATH" in process.environ():
                continue
        except (psutil.Error, OSError):
            continue
        found.append(process)
    return found


def part_of(process: psutil.Process, home: Path) -> str | None:
    """The part that this process carries in its environment, when it belongs to `home`."""
    try:
        environment = process.environ()
    except (psutil.Error, OSError):
        return None
    return environment.get(PART_VARIABLE) if environment.get(HOME_VARIABLE) == str(home) else None


def end_processes(processes: Iterable[psutil.Process], *, grace_s: float = 10.0) -> int:
    """SIGTERM, then SIGKILL to what is left after `grace_s`; returns when all are gone. The number ended.

    psutil compares a process's start time before it signals, so a reused process id is never hit.
    """
    left = [process for process in processes if _signal(process, signal.SIGTERM)]
    for process in left:
        # A stopped process does not see SIGTERM before it continues.
        _signal(process, signal.SIGCONT)
    count = len(left)
    left = _wait(left, grace_s)
    for process in left:
        _signal(process, signal.SIGKILL)
    _wait(left, 10.0)
    return count


def _signal(process: psutil.Process, number: signal.Signals) -> bool:
    try:
        process.send_signal(number)
    except psutil.Error:
        return False
    return True


def _wait(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    deadline = time.monotonic() + seconds
    left = processes
    while True:
        left = [process for process in left if _lives(process)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _self_and_ancestors() -> set[int]:
    me = psutil.Process()
    try:
        return {me.pid, *(parent.pid for parent in me.parents())}
    except psutil.Error:
        return {me.pid}
