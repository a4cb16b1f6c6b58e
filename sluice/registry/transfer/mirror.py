"""Moving files into an object store: only those that are missing, each one verified before it is given its name.

A file is read into a staging file that a later run goes on with, whatever ended this one: a cut line, kill -9, a full
disk. Its digest is checked before anything is written at the destination, where an object appears whole or not at all.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from sluice.infra.errors import ConflictError, IntegrityError, UnavailableError
from sluice.infra.file_lock import held_if_free
from sluice.infra.home import writing
from sluice.infra.object_store import ObjectExists, ObjectStore
from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import digest_bytes, digest_file, hex_of
from sluice.provenance.collecting import is_aging, wait_for_collector
from sluice.registry.transfer.pace import Pace, PacedReader
from sluice.registry.transfer.snapshot import SnapshotFile
from sluice.registry.transfer.source import Source

T = TypeVar("T")

WORKERS = 4
SMALL = 1 << 20
"""Up to this size a file is moved through memory, without a staging file."""
PATIENCE = 5
"""Failures in a row without one byte of progress after which a transfer gives up."""


_COLLECTED = ("blobs/", "manifests/")
"""What garbage collection takes by its digest."""


class SiteStore(ObjectStore, Source, Protocol):
    """An object store that files can be streamed from and to."""

    def put_stream(self, key: str, stream: BinaryIO) -> None:
        """Write an object from a stream in bounded memory; it appears whole or not at all."""


@dataclass(frozen=True)
class Move:
    """One file and the key it gets. `once`: the key is not made of the content, and never gets another one."""

    file: SnapshotFile
    key: str
    once: bool = False


@dataclass(frozen=True)
class Moved:
    """What a transfer did: files and bytes that were missing, and all that were asked for."""

    files: int
    size: int
    all_files: int
    all_size: int


class Mirror:
    """Moves files from `source` to `destination`. `staging` is a folder of this machine, kept between runs."""

    def __init__(
        self,
        source: Source,
        destination: SiteStore,
        staging: Path,
        *,
        limit: float | None = None,
        workers: int = WORKERS,
        report: Report = no_report,
    ) -> None:
        self._source = source
        self._destination = destination
        self._staging = staging
        self._down, self._up = Pace(limit), Pace(limit)
        self._workers = workers
        self._report = report
        self._lock = threading.Lock()
        self._done = self._total = 0

    def move(self, *rounds: Sequence[Move]) -> Moved:
        """Move what is missing, a few files at a time, each round only when the one before has all arrived. Reports
        bytes, of which those that were there already count.

        Raises `IntegrityError` naming a file that is not what was listed or a key that holds something else,
        `UnavailableError` when a line stays cut: then running again goes on.
        """
        total = sum(move.file.size for wanted in rounds for move in wanted)
        content = [move.file.digest for wanted in rounds for move in wanted if move.key.startswith(_COLLECTED)]
        moved: dict[str, int] = {}
        while True:
            self._done, self._total = 0, total
            moved |= {file.path: file.size for wanted in rounds for file in self._round(wanted)}
            # As whoever stores an artifact: a collector that had begun before these came may have taken a part.
            if not _patiently(lambda: wait_for_collector(self._destination, content)):
                return Moved(len(moved), sum(moved.values()), sum(map(len, rounds)), total)

    def _round(self, wanted: Sequence[Move]) -> list[SnapshotFile]:
        """The files that were missing."""
        with ThreadPoolExecutor(max_workers=self._workers) as pool:
            running = [pool.submit(self._move, move) for move in wanted]
            try:
                return [move.file for move, future in zip(wanted, running, strict=True) if future.result()]
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _move(self, move: Move) -> bool:
        """Whether the file was missing."""
        file = move.file
        found = _patiently(lambda: self._destination.head(move.key))
        # Content under its own digest was verified when it was written; one of another size is damaged and mended, and
        # one that the collector may take soon is written again.
        aging = found is not None and move.key.startswith(_COLLECTED) and is_aging(found.modified)
        if found is not None and found.size == file.size and not move.once and not aging:
            self._advance(file.size, f"{move.key} is there")
            return False
        if found is not None and move.once:
            self._require_same(move)
            self._advance(file.size, f"{move.key} is there")
            return False
        if file.size <= SMALL:
            self._put(move, self._read_small(file))
        else:
            path = self._staging / f"{hex_of(file.digest)}.part"
            with writing(self._staging), _held(path):
                self._fetch(file, path)
                _patiently(lambda: self._send(move.key, path))
                path.unlink()
        return True

    def _put(self, move: Move, data: bytes) -> None:
        self._up.take(len(data))
        try:
            _patiently(lambda: self._destination.put(move.key, data, if_absent=move.once))
        except ObjectExists:
            self._require_same(move)

    def _require_same(self, move: Move) -> None:
        known = digest_bytes(_patiently(lambda: self._destination.get(move.key)))
        if known != move.file.digest:
            raise IntegrityError(
                f"{move.key} is {known} here, and {move.file.digest} in the snapshot: that site changed its history.",
                hint="Nothing was overwritten. Find out from its people which one is true.",
            )

    def _read_small(self, file: SnapshotFile) -> bytes:
        def read() -> bytes:
            pieces = []
            for piece in self._source.stream(file.path):
                self._down.take(len(piece))
                pieces.append(piece)
            return b"".join(pieces)

        data = _patiently(read)
        if digest_bytes(data) != file.digest:
            raise _damaged(file, digest_bytes(data))
        self._advance(file.size, file.path)
        return data

    def _fetch(self, file: SnapshotFile, path: Path) -> None:
        """Read a large file into `path`, on from what an earlier run left there."""
        failures = 0
        start = path.stat().st_size
        if start > file.size:
            os.truncate(path, 0)
            start = 0
        self._advance(start, file.path)
        with path.open("r+b") as stream:
            stream.seek(start)
            while stream.tell() < file.size:
                before = stream.tell()
                try:
                    for piece in self._source.stream(file.path, before):
                        self._down.take(len(piece))
                        stream.write(piece)
                        self._advance(len(piece), file.path)
                    if stream.tell() == before:
                        raise UnavailableError(f"{file.path} ends after {before} of {file.size} bytes.")
                except UnavailableError as error:
                    failures = 1 if stream.tell() > before else failures + 1
                    _wait(failures, error)
            stream.flush()
        found = digest_file(path)
        if found != file.digest:
            path.unlink()
            raise _damaged(file, found)

    def _send(self, key: str, path: Path) -> None:
        if self._up.rate is None:
            self._destination.put_file(key, path)
            return
        with PacedReader(path, self._up) as stream:
            self._destination.put_stream(key, stream)  # type: ignore[arg-type]

    def _advance(self, size: int, message: str) -> None:
        with self._lock:
            self._done += size
            self._report(min(self._done, self._total), self._total, message)


def _patiently(work: Callable[[], T]) -> T:
    failures = 0
    while True:
        try:
            return work()
        except UnavailableError as error:
            failures += 1
            _wait(failures, error)


def _wait(failures: int, error: UnavailableError) -> None:
    if failures >= PATIENCE:
        raise UnavailableError(error.message, hint="Run it again once the line is back: it goes on where it was.")
    time.sleep(0.1 * 2**failures)


def _damaged(file: SnapshotFile, found: str) -> IntegrityError:
    return IntegrityError(f"{file.path} is damaged where it comes from: its digest is {found}, not {file.digest}.")


@contextmanager
def _held(path: Path) -> Iterator[None]:
    with held_if_free(path) as free:
        if not free:
            raise ConflictError(f"Another transfer on this machine is moving {path.stem[:12]}.", hint="Wait for it.")
        yield
