"""Exactly one controller moves an application's weights: it holds this lease, and its token grows with each holder.

The token fences what a lease alone cannot: a controller that was stopped, lost its lease without knowing and goes on,
still carries the smaller token, and the router and the store refuse it.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Protocol

from sluice.infra.errors import IntegrityError
from sluice.infra.file_lock import held
from sluice.infra.progress import Report, no_report
from sluice.serving.durable import replace_file

_POLL_S = 0.1


class Held(Protocol):
    """The lease while it is held."""

    token: int
    """Larger than that of every holder before."""

    def lost(self) -> bool:
        """Whether another controller may be at work by now. Answers at once."""

    def release(self) -> None:
        """Let the next one go on. Never raises; safe to repeat."""


class ControllerLease(Protocol):
    """The right to move one application's weights."""

    def acquire(self, report: Report = no_report) -> Held:
        """Wait for the lease, in order of arrival, saying through `report` what for."""


class FileLease:
    """`ControllerLease` on one machine: a locked file, which the system frees when its holder ends, however it ends.

    Who waits has a numbered ticket, a file that it keeps locked; the smallest living one is next. `holder` is what the
    others are told they wait for.
    """

    def __init__(self, folder: Path, holder: str) -> None:
        self._folder = folder
        self._holder = holder

    def acquire(self, report: Report = no_report) -> Held:
        ticket, handle = self._take_ticket()
        told = ""
        try:
            while True:
                ahead = self._ahead(ticket)
                if ahead is None:
                    lock = _try_lock(self._folder / "controller.lock")
                    if lock is not None:
                        return _FileHeld(self._folder / "controller.lock", lock, self._next_token())
                    ahead = self._holder_in("controller.json")
                if ahead != told:
                    report(0, 0, f"waiting for {ahead}")
                    told = ahead
                time.sleep(_POLL_S)
        finally:
            ticket.unlink(missing_ok=True)
            os.close(handle)

    def _take_ticket(self) -> tuple[Path, int]:
        queue = self._folder / "queue"
        queue.mkdir(parents=True, exist_ok=True)
        with held(self._folder / "queue.lock"):
            numbers = [int(path.stem) for path in queue.glob("*.json") if path.stem.isdigit()]
            ticket = queue / f"{max(numbers, default=0) + 1:08d}.json"
            handle = os.open(ticket, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(handle, json.dumps({"holder": self._holder}).encode())
        return ticket, handle

    def _ahead(self, mine: Path) -> str | None:
        """Who waits before us; the tickets of those that died are taken away."""
        with held(self._folder / "queue.lock"):
            for ticket in sorted(mine.parent.glob("*.json")):
                if ticket >= mine:
                    return None
                handle = _try_lock(ticket)
                if handle is None:
                    return self._holder_in(f"queue/{ticket.name}")
                ticket.unlink(missing_ok=True)
                os.close(handle)
        return None

    def _holder_in(self, name: str) -> str:
        return str(self._read(name).get("holder", "another controller"))

    def _next_token(self) -> int:
        """Written before it is used: two holders never have the same."""
        before = self._read("controller.json").get("token", 0)
        if not isinstance(before, int):
            raise IntegrityError(f"The file {str(self._folder / 'controller.json')!r} holds no token.")
        replace_file(self._folder / "controller.json", json.dumps({"token": before + 1, "holder": self._holder}))
        return before + 1

    def _read(self, name: str) -> dict[str, object]:
        try:
            found = json.loads((self._folder / name).read_text() or "{}")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise IntegrityError(f"The file {str(self._folder / name)!r} is damaged: {error}.") from error
        return found if isinstance(found, dict) else {}


class _FileHeld:
    def __init__(self, path: Path, handle: int, token: int) -> None:
        self.token = token
        self._path = path
        self._handle: int | None = handle

    def lost(self) -> bool:
        """Whether the locked file is no longer the one that others would lock."""
        if self._handle is None:
            return True
        try:
            return not os.path.samestat(os.fstat(self._handle), self._path.stat())
        except OSError:
            return True

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _try_lock(path: Path) -> int | None:
    """An open, locked file; None when somebody else has it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle
