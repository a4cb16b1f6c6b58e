"""Ports of the local parts: chosen once, kept in `ports.json`, so that addresses survive a restart.

A port that the user fixed in the settings is used or refused, never replaced. A port that we chose and that a foreign
process took since is replaced by a new one.
"""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from sluice.infra.errors import InputError, UnavailableError
from sluice.infra.home import write_private, writing
from sluice.infra.orphans import part_of

LOOPBACK = "127.0.0.1"
_FILE = "ports.json"
# Below the range from which Linux takes the ports of outgoing connections (32768 and up), or one of those could sit
# on a kept port at the moment a part restarts.
_RANGE = range(20000, 32000)


@dataclass(frozen=True)
class Holder:
    """Who listens on a port: process id and name where this user may see them, and whether it is a part of ours."""

    pid: int | None
    name: str | None
    ours: bool

    def __str__(self) -> str:
        return f"{self.name} (process {self.pid})" if self.pid else "a process of another user"


Inspect = Callable[[int], Holder | None]


class PortBook:
    """Named ports of the installation at `home`. `fixed` holds the settings' ports; 0 means that we choose."""

    def __init__(self, home: Path, fixed: Mapping[str, int], *, inspect: Inspect | None = None) -> None:
        self.home = home.expanduser().absolute()
        self.fixed = {name: port for name, port in fixed.items() if port}
        self._inspect = inspect or (lambda port: find_holder(port, self.home))

    def read(self) -> dict[str, int]:
        """The ports written last; empty before the first `allocate` or when the file is damaged."""
        try:
            found = json.loads((self.home / _FILE).read_text())
            return {str(name): int(port) for name, port in found.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def allocate(self, names: Iterable[str]) -> dict[str, int]:
        """A port for each name, free or held by our own part, written down for the next time.

        Raises `InputError` for a fixed port that a foreign process holds, or that two settings name;
        `UnavailableError` when home cannot be written or no port is free.
        """
        wanted = list(names)
        book = self.read() | self.fixed
        self._check_fixed(wanted)
        taken = set(self.fixed.values())
        for name in wanted:
            if name in self.fixed:
                continue
            kept = book.get(name)
            if kept is None or kept in taken or self._foreign(kept) is not None:
                book[name] = self._free(taken | set(book.values()))
            taken.add(book[name])
        with writing(self.home):
            self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_private(self.home / _FILE, json.dumps(book, indent=2, sort_keys=True))
        return {name: book[name] for name in wanted}

    def forget(self, names: Iterable[str]) -> None:
        """Give up the ports of parts that are no more. Raises `UnavailableError` when home cannot be written."""
        gone = set(names)
        book = {name: port for name, port in self.read().items() if name not in gone}
        with writing(self.home):
            write_private(self.home / _FILE, json.dumps(book, indent=2, sort_keys=True))

    def _check_fixed(self, wanted: list[str]) -> None:
        seen: dict[int, str] = {}
        for name in wanted:
            port = self.fixed.get(name)
            if port is None:
                continue
            if port in seen:
                raise InputError(
                    f"Settings ports.{seen[port]} and ports.{name} are both {port}.", hint="Give each part its own."
                )
            seen[port] = name
            if (holder := self._foreign(port)) is not None:
                raise InputError(
                    f"Setting ports.{name} = {port}: the port is held by {holder}.",
                    hint=f"End that process, choose another port, or set ports.{name} to 0 to have a free one chosen.",
                )

    def _foreign(self, port: int) -> Holder | None:
        holder = self._inspect(port)
        return holder if holder is not None and not holder.ours else None

    def _free(self, taken: set[int]) -> int:
        for port in random.sample(_RANGE, len(_RANGE)):
            if port not in taken and is_free(port):
                return port
        raise UnavailableError(f"No port between {_RANGE.start} and {_RANGE.stop} is free on {LOOPBACK}.")


def is_free(port: int) -> bool:
    """Can a server listen on this port of the loopback address now?"""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # Without this, connections of a server that just ended would make its port look taken for a minute.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def find_holder(port: int, home: Path) -> Holder | None:
    """Who listens on the port, or None when it is free. A part of the installation at `home` is `ours`."""
    if is_free(port):
        return None
    pids: set[int] = set()
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.Error:
        connections = []
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
            pids.add(connection.pid or 0)
    for pid in sorted(pids - {0}):
        try:
            process = psutil.Process(pid)
            lineage = [process, *process.parents()]
            ours = any(part_of(member, home) is not None for member in lineage)
            return Holder(pid, process.name(), ours)
        except psutil.Error:
            continue
    return Holder(None, None, False)
