"""Leases: of all machines that want the same work, one does it; the others wait, and take over when it dies.

A lease is a row of editions, `leases/<name>/<number:08d>.json`, each written only by conditional create, the one
primitive that every store has. Taking and renewing both create the next number, so of two who try, one wins. Whoever
created an edition looks at the row again before it acts, and steps back when somebody else's edition lives: the
later of two always sees the earlier, whatever was cleaned away in between.

A waiter measures a holder's silence on its own clock, so clocks need not agree; only for a lease that was left long
ago does it trust the written time, with `SKEW_S` to spare. A holder on the same machine whose process is gone is
followed at once. A lease saves work and is no lock: a holder that was stopped for longer than its lease may come
back. What must be written once is written by conditional put besides.
"""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from sluice.infra.errors import IntegrityError, SluiceError
from sluice.infra.object_store import ObjectExists, ObjectMissing, ObjectStore
from sluice.infra.progress import Report, no_report
from sluice.provenance.attestation import host_name
from sluice.provenance.canonical import canonical_json

DURATION_S = 60.0
"""Seconds of silence after which a holder counts as gone. It renews three times as often."""
SKEW_S = 300.0
"""How far two machines' clocks may be apart before one takes the other's lease for expired too early."""
_LONGEST_PAUSE_S = 3.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Process:
    """Who holds a lease: `machine` tells machines (and containers) apart, `started` a reused process id."""

    host: str
    machine: str
    pid: int
    started: str

    def is_gone(self) -> bool:
        """Whether it is known to have ended: True only for a process of this machine that runs no more."""
        return bool(self.machine) and self.machine == _machine() and _start_of(self.pid) != self.started


@dataclass(frozen=True)
class Edition:
    """One stored edition. `since` and `expires` are seconds since the epoch by the holder's clock."""

    number: int
    holder: str
    process: Process
    since: float
    expires: float

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"process {self.process.pid} on {self.process.host}, since {since}"


class Lease:
    """A lease that is held. `lost` says that another holder may be at work by now."""

    def __init__(self, leases: Leases, name: str, edition: Edition) -> None:
        self._leases = leases
        self._name = name
        self._edition = edition
        self._deadline = time.monotonic() + leases.duration_s
        self._end = threading.Event()
        self._lost = threading.Event()
        self._beat = threading.Thread(target=self._renew, name=f"lease {name[:12]}", daemon=True)
        self._beat.start()

    @property
    def lost(self) -> bool:
        """Whether the lease could not be kept: the time ran out, or somebody else took it."""
        return self._lost.is_set() or time.monotonic() > self._deadline

    def release(self) -> None:
        """Stop renewing and clean up, whatever happens: what cannot be removed expires."""
        self._end.set()
        self._beat.join()
        try:
            self._leases.remove(self._name, lambda edition: edition.holder == self._edition.holder)
        except SluiceError as error:
            _log.warning("The lease %s stays until it expires: %s", self._name, error)

    def _renew(self) -> None:
        while not self._end.wait(self._leases.duration_s / 3):
            asked = time.monotonic()
            if asked > self._deadline:
                # Somebody may have taken it, finished and cleaned up meanwhile: a renewal would prove nothing.
                self._lost.set()
                return
            try:
                self._edition = self._leases.renew(self._name, self._edition)
                self._deadline = asked + self._leases.duration_s
            except ObjectExists:
                self._lost.set()
                return
            except SluiceError as error:
                _log.warning("The lease %s could not be renewed, trying again: %s", self._name, error)


class Leases:
    """The leases of an object store. Safe to share between threads: each `hold` is a holder of its own."""

    def __init__(self, objects: ObjectStore, *, duration_s: float = DURATION_S, skew_s: float = SKEW_S) -> None:
        self._objects = objects
        self.duration_s = duration_s
        self._skew_s = skew_s

    @contextmanager
    def hold(
        self, name: str, *, until: Callable[[], bool] = lambda: False, report: Report = no_report
    ) -> Iterator[Lease | None]:
        """Wait for the lease `name` and hold it; None when `until` became true first (the work is done elsewhere)."""
        lease = self._wait(name, until, report)
        try:
            yield lease
        finally:
            if lease is not None:
                lease.release()

    def holder(self, name: str) -> Edition | None:
        """Who holds a lease, as far as its editions tell; None when nobody does."""
        alive = [edition for edition in self._editions(name) if not self._expired(edition)]
        return alive[-1] if alive else None

    def _wait(self, name: str, until: Callable[[], bool], report: Report) -> Lease | None:
        pause, told = min(0.05, self.duration_s / 10), ""
        # When this process first saw each edition: its holder's silence since then is measured here.
        seen: dict[tuple[str, int], float] = {}
        while True:
            taken = self._try(name, seen)
            if isinstance(taken, Lease):
                return taken
            if taken is not None and taken.holder != told:
                told = taken.holder
                report(0, 0, f"waiting: it is computed by {taken}")
            if until():
                return None
            # At random, or two who stepped back for each other would meet again.
            time.sleep(random.uniform(0.5, 1) * pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE_S, self.duration_s / 5)

    def _try(self, name: str, seen: dict[tuple[str, int], float]) -> Lease | Edition | None:
        """The lease; or the edition that is in the way; or None when somebody was faster just now."""
        found = self._editions(name)
        alive = [edition for edition in found if not self._silent(edition, seen)]
        if alive:
            return alive[-1]
        number = found[-1].number + 1 if found else 1
        now = time.time()
        mine = Edition(number, uuid.uuid4().hex, this_process(), now, now + self.duration_s)
        try:
            self._create(name, mine)
        except ObjectExists:
            return None
        # Whoever creates second sees the first: so of all who get here with living editions, one goes on.
        others = [e for e in self._editions(name) if e.holder != mine.holder and not self._silent(e, seen)]
        if others:
            self._objects.delete(_key(name, mine.number))
            return others[-1]
        lease = Lease(self, name, mine)
        self.remove(name, lambda edition: edition.number < mine.number)
        return lease

    def renew(self, name: str, edition: Edition) -> Edition:
        """The next edition of the same holder. Raises `ObjectExists` when another one was first."""
        following = Edition(
            edition.number + 1, edition.holder, edition.process, edition.since, time.time() + self.duration_s
        )
        self._create(name, following)
        self._objects.delete(_key(name, edition.number))
        return following

    def remove(self, name: str, which: Callable[[Edition], bool]) -> None:
        """Delete the editions for which `which` is true."""
        for edition in self._editions(name):
            if which(edition):
                self._objects.delete(_key(name, edition.number))

    def _create(self, name: str, edition: Edition) -> None:
        body = {key: value for key, value in asdict(edition).items() if key != "number"}
        self._objects.put(_key(name, edition.number), canonical_json(body), if_absent=True)

    def _expired(self, edition: Edition) -> bool:
        return edition.process.is_gone() or time.time() > edition.expires + self._skew_s

    def _silent(self, edition: Edition, seen: dict[tuple[str, int], float]) -> bool:
        first = seen.setdefault((edition.holder, edition.number), time.monotonic())
        return self._expired(edition) or time.monotonic() - first > self.duration_s

    def _editions(self, name: str) -> list[Edition]:
        """The stored editions, oldest first."""
        found = []
        for info in self._objects.list(f"leases/{name}/"):
            try:
                raw = json.loads(self._objects.get(info.key))
                found.append(
                    Edition(
                        int(Path(info.key).stem),
                        raw["holder"],
                        Process(**raw["process"]),
                        float(raw["since"]),
                        float(raw["expires"]),
                    )
                )
            except ObjectMissing:
                continue
            except (ValueError, KeyError, TypeError) as error:
                raise IntegrityError(
                    f"The object {info.key!r} is not a lease: {error!r}.", hint="Remove it; a lease holds no result."
                ) from error
        return sorted(found, key=lambda edition: edition.number)


def this_process() -> Process:
    """The running process."""
    return Process(host_name(), _machine(), os.getpid(), _start_of(os.getpid()))


def _key(name: str, number: int) -> str:
    return f"leases/{name}/{number:08d}.json"


def _machine() -> str:
    """This boot of this machine and its process ids (a container has its own); empty where the system does not say."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_of(pid: int) -> str:
    """When a process of this machine started, in clock ticks since its boot; empty when there is none that runs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    # Field 3 is the state (Z is a process that ended and was not waited for), field 22 the time of its start.
    return "" if fields[0] in "ZX" else fields[19]
