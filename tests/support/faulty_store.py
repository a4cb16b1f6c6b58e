"""An object store that fails on purpose: a process that dies at a write, a lost answer, somebody else in between."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from sluice.infra.errors import UnavailableError
from sluice.infra.object_store import ObjectInfo
from tests.support.directory_store import DirectoryStore

FaultKind = Literal["dies before", "dies after", "unheard", "answer lost", "repeated", "race"]
FAULTS: tuple[FaultKind, ...] = ("dies before", "dies after", "unheard", "answer lost", "repeated")


class ProcessDied(BaseException):
    """The process ended here: nothing after this line of the product ran."""


class FaultyStore(DirectoryStore):
    """Fails at the `nth` write from now, once.

    `dies before` and `dies after` end the process around the write; `unheard` and `answer lost` are errors of the
    network before and after it; `repeated` sends the request twice, as an S3 client does whose first answer was lost;
    `race` lets `intruder` do all its work between the reads before the write and the write itself.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._left = 0
        self._kind: FaultKind = "dies before"
        self._intruder: Callable[[], None] = lambda: None

    def arm(self, kind: FaultKind, nth: int, intruder: Callable[[], None] = lambda: None) -> None:
        self._left, self._kind, self._intruder = nth, kind, intruder

    def disarm(self) -> bool:
        """No fault from here on; whether the one that was armed came to pass."""
        armed, self._left = self._left, 0
        return armed <= 0

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        self._write(lambda: super(FaultyStore, self).put(key, data, if_absent=if_absent))

    def delete(self, key: str) -> None:
        self._write(lambda: super(FaultyStore, self).delete(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        # Only the folder that is asked for: thousands of histories list a ledger over and over.
        start = self.root / prefix.rpartition("/")[0]
        for folder, _, names in sorted(os.walk(start)):
            for name in sorted(names):
                path = Path(folder, name)
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix) and not name.startswith(".put-"):
                    found = path.stat()
                    yield ObjectInfo(key, found.st_size, found.st_mtime)

    def _write(self, write: Callable[[], None]) -> None:
        self._left -= 1
        if self._left != 0:
            return write()
        if self._kind == "dies before":
            raise ProcessDied
        if self._kind == "unheard":
            raise UnavailableError("The object store does not answer.")
        if self._kind == "race":
            self._intruder()
        write()
        if self._kind == "dies after":
            raise ProcessDied
        if self._kind == "answer lost":
            raise UnavailableError("The object store does not answer.")
        if self._kind == "repeated":
            # With a condition the second request is told `ObjectExists`, although the first one wrote it.
            write()
        return None
