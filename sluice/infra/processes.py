"""Supervision of the local parts: bring them up, keep them up, take them down, say how they are.

supervisord (the library `supervisor`) starts, restarts and stops; this file decides what should run and waits until
it serves. Whatever was killed, parts or supervisord itself, the next `up` converges: it ends what a dead supervisord
left behind, starts what is missing, restarts what hangs, and leaves alone what runs unchanged.
"""

from __future__ import annotations

import fcntl
import shutil
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO, cast

import psutil

from sluice.infra.errors import ConflictError, UnavailableError
from sluice.infra.health import probe
from sluice.infra.home import require_free_disk, writing
from sluice.infra.orphans import SUPERVISORD, end_processes, find_leaderless, find_processes, part_of
from sluice.infra.progress import Report, no_report
from sluice.infra.readiness import Startup
from sluice.infra.roster import Roster
from sluice.infra.services import HealthCheck, ServiceSpec, ServiceStatus, State
from sluice.infra.supervisord import PIDFILE, Fault, SupervisordClient, Unreachable

__all__ = ["HealthCheck", "ServiceSpec", "ServiceStatus", "Supervisor"]

_LOCK = "supervision.lock"


class Supervisor:
    """The local parts of the installation at `home`. One process at a time changes them; any number may look."""

    def __init__(self, home: Path, *, lock_timeout_s: float = 600.0) -> None:
        self.home = home.expanduser().absolute()
        self.lock_timeout_s = lock_timeout_s
        self.roster = Roster(self.home)
        self.client = SupervisordClient(self.home)
        self._holder: int | None = None

    def up(
        self, specs: Sequence[ServiceSpec], report: Report = no_report, *, others: Literal["stop", "keep"] = "stop"
    ) -> list[ServiceStatus]:
        """Make exactly `specs` run and serve; with `others="keep"`, parts of an earlier `up` stay as they are.

        Running it again changes nothing that is well. Parts start side by side, each after what it depends on.
        Raises `UnavailableError` with the end of the log of the part that failed (the others stay up, the next `up`
        goes on from there), `InputError` on parts that contradict each other, `ConflictError` when another `up` holds
        the lock for longer than `lock_timeout_s`.
        """
        require_free_disk(self.home)
        with self.exclusive(report):
            wanted = list(specs)
            if others == "keep":
                names = {spec.name for spec in specs}
                wanted += [spec for spec in self.roster.read() if spec.name not in names]
            _require_commands(specs)
            self.roster.write(wanted)
            # A supervisord that is alive but does not answer (stopped, or its socket removed) is of no use to anybody.
            if self.client.answers():
                self._apply(wanted)
            else:
                self._end_everything(_read_pid(self.home / PIDFILE))
                self.client.start()
            self.roster.forget_others()
            Startup(self.client, specs, report).run()
            return self._status(specs)

    def remove(self, names: Collection[str], report: Report = no_report) -> None:
        """Stop these parts, each in its own time, and know them no more; the others run on untouched.

        A name that is no part is passed over. Raises `InputError` when a part that stays depends on one of them,
        `UnavailableError` when supervisord does not follow, `ConflictError` as `up` does.
        """
        with self.exclusive(report):
            kept = [spec for spec in self.roster.read() if spec.name not in names]
            self.roster.write(kept)
            if self.client.answers():
                report(0, 0, f"stopping {', '.join(sorted(names))}")
                self._apply(kept)
            else:
                for name in names:
                    end_processes(find_processes(self.home, name))
            self.roster.forget_others()

    def down(self, report: Report = no_report) -> int:
        """Stop every part and supervisord, dependents first; the number of processes that had to be ended besides."""
        if not self.home.exists():
            return 0
        with self.exclusive(report):
            waits = [spec.stop_wait_s for spec in self.roster.read()]
            supervisors = find_processes(self.home, SUPERVISORD)
            session = _read_pid(self.home / PIDFILE)
            report(0, 0, "stopping")
            try:
                self.client.call("shutdown")
                _wait_gone(supervisors, sum(waits) + 15.0)
            except (Unreachable, Fault):
                pass
            return self._end_everything(session)

    def status(self) -> list[ServiceStatus]:
        """Every part of the last `up`, as it is now; also when supervisord is dead. Changes nothing."""
        return self._status(self.roster.read())

    def _apply(self, wanted: Sequence[ServiceSpec]) -> None:
        """Hand the new configuration to a running supervisord and touch only the parts that it says differ."""
        waits = {spec.name: spec.stop_wait_s for spec in wanted}
        try:
            [[added, changed, removed]] = self.client.call("reloadConfig")
            for name in (*changed, *removed):
                self.client.call("stopProcessGroup", name, timeout_s=waits.get(name, 60) + 30.0)
                self.client.call("removeProcessGroup", name)
            for name in (*added, *changed):
                self.client.call("addProcessGroup", name)
        except (Unreachable, Fault) as error:
            raise UnavailableError(
                f"supervisord did not take the new configuration: {error}.", hint="Run `sluice up` again."
            ) from error
        for name in removed:
            end_processes(find_processes(self.home, name))

    def _end_everything(self, session: int | None) -> int:
        """End supervisord and all parts without it; `session` is the process id that supervisord had.

        supervisord goes first, or it would start the parts again.
        """
        supervisors = find_processes(self.home, SUPERVISORD)
        ended = end_processes(supervisors, grace_s=0.0)
        left = find_processes(self.home)
        ended += end_processes(left)
        # The id is a session of ours only as long as no other process has it.
        if session is not None and not psutil.pid_exists(session):
            ended += end_processes(find_leaderless(session))
        return ended

    def _status(self, specs: Sequence[ServiceSpec]) -> list[ServiceStatus]:
        try:
            known: Mapping[str, Any] = {info["name"]: info for info in self.client.call("getAllProcessInfo")}
        except (Unreachable, Fault):
            known = self._without_supervisord()
        with ThreadPoolExecutor(max_workers=max(1, len(specs))) as pool:
            return list(pool.map(lambda spec: _one_status(spec, known.get(spec.name)), specs))

    def _without_supervisord(self) -> dict[str, Any]:
        """What supervisord would say about the parts that outlived it."""
        found: dict[str, Any] = {}
        for process in find_processes(self.home):
            name = part_of(process, self.home)
            if name is not None and name not in found:
                started = process.create_time()
                found[name] = {"statename": "LOST", "pid": process.pid, "start": started, "now": time.time()}
        return found

    @contextmanager
    def exclusive(self, report: Report = no_report) -> Iterator[None]:
        """Hold the installation while ports, databases and parts are prepared and brought up as one change.

        `up` and `down` take it themselves; inside a `with` of the same thread they use the one that is held.
        Raises `ConflictError` after `lock_timeout_s`, `UnavailableError` when home cannot be written.
        """
        if self._holder == threading.get_ident():
            yield
            return
        with writing(self.home):
            self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
            stream = (self.home / _LOCK).open("a")
        # The lock ends with the open file: also when this process is killed.
        with stream:
            deadline = time.monotonic() + self.lock_timeout_s
            while not _try_lock(stream):
                if time.monotonic() > deadline:
                    raise ConflictError(
                        f"Another process changes the parts of home = {str(self.home)!r}.",
                        hint="Wait for the other `sluice up` or `sluice down`, or end it.",
                    )
                report(0, 0, "waiting for another `sluice up` or `sluice down`")
                time.sleep(0.2)
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None


def _try_lock(stream: TextIO) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _one_status(spec: ServiceSpec, info: Mapping[str, Any] | None) -> ServiceStatus:
    if info is None:
        return ServiceStatus(spec.name, "stopped", None, None, spec.url, False, "not started")
    state = cast(State, str(info["statename"]).lower())
    if not info["pid"]:
        detail = str(info.get("spawnerr") or info.get("description") or "")
        return ServiceStatus(spec.name, state, None, None, spec.url, False, detail)
    sick = probe(spec.health)
    detail = sick or ("runs without its supervisor; `sluice up` mends that" if state == "lost" else "")
    uptime = max(0.0, info["now"] - info["start"])
    return ServiceStatus(spec.name, state, info["pid"], uptime, spec.url, sick is None, detail)


def _require_commands(specs: Sequence[ServiceSpec]) -> None:
    for spec in specs:
        if shutil.which(spec.command[0]) is None:
            raise UnavailableError(
                f"The part {spec.name!r} cannot start: there is no program {spec.command[0]!r}.",
                hint="Install the locked environments again (`make setup`); `sluice doctor` lists what is missing.",
            )


def _wait_gone(processes: Sequence[psutil.Process], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and any(
        process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes
    ):
        time.sleep(0.1)


def _read_pid(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
