"""Where the files of a snapshot come from: another site's object store, or an archive. Nothing is believed unread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from sluice.infra.errors import IntegrityError, SluiceError
from sluice.infra.object_store import ObjectInfo, ObjectMissing
from sluice.infra.transfer import Moved, ignore_moved
from sluice.provenance.canonical import digest_bytes
from sluice.registry.transfer.companions import pointers
from sluice.registry.transfer.snapshot import Snapshot

KEPT_BYTES = 1 << 20
"""Files up to this size are kept in memory once read: they are read for the verification and again for the copy."""
_READERS = 16


class Source(Protocol):
    """Bytes by path. `S3ObjectStore` is one, an archive another."""

    def stream(self, key: str, start: int = 0) -> Iterator[bytes]:
        """The object's bytes from `start` on, in pieces of bounded size. Raises `ObjectMissing`."""


class ReadOnlyObjects:
    """The half of an `ObjectStore` that writes, refused: what comes from elsewhere is looked at only."""

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        raise PermissionError(f"{key} came from elsewhere and is read only.")

    def put_file(self, key: str, path: Path, *, if_absent: bool = False, moved: Moved = ignore_moved) -> None:
        raise PermissionError(f"{key} came from elsewhere and is read only.")

    def delete(self, key: str) -> None:
        raise PermissionError(f"{key} came from elsewhere and is read only.")


class ListedObjects(ReadOnlyObjects):
    """The files that a snapshot lists, as an `ObjectStore` that can only be read; each one's digest is checked."""

    def __init__(self, snapshot: Snapshot, source: Source) -> None:
        self._source = source
        self._files = snapshot.by_path()
        # Pointers follow from the signed list itself: at the site that it is from they may have moved on since.
        made = [pair for one in snapshot.releases for pair in pointers(one.release, one.companions).items()]
        self._kept = {
            key: data for key, data in made if key in self._files and self._files[key].digest == digest_bytes(data)
        }
        self._lock = threading.Lock()

    def get(self, key: str) -> bytes:
        file = self._files.get(key)
        if file is None:
            raise ObjectMissing(f"The snapshot lists no {key!r}.")
        with self._lock:
            kept = self._kept.get(key)
        if kept is not None:
            return kept
        pieces, size = [], 0
        for piece in self._source.stream(key):
            pieces.append(piece)
            size += len(piece)
            if size > file.size:
                break
        data = b"".join(pieces)
        if digest_bytes(data) != file.digest:
            raise IntegrityError(f"{key} is not the file that the snapshot lists: {file.digest} was expected.")
        if len(data) <= KEPT_BYTES:
            with self._lock:
                self._kept[key] = data
        return data

    def prefetch(self, *folders: str) -> None:
        """Read the small files of some folders, many at once: one after another they would cost a round trip each."""
        small = [p for p, file in self._files.items() if p.startswith(folders) and file.size <= KEPT_BYTES]
        with ThreadPoolExecutor(max_workers=_READERS) as pool:
            list(pool.map(self._try, small))

    def _try(self, key: str) -> None:
        # Whoever needs the file reads it again, and tells what is wrong with it.
        with contextlib.suppress(SluiceError):
            self.get(key)

    def stream(self, key: str, start: int = 0) -> Iterator[bytes]:
        """As `Source.stream`; the receiver checks the digest of the whole."""
        with self._lock:
            kept = self._kept.get(key)
        return iter([kept[start:]]) if kept is not None else self._source.stream(key, start)

    def get_file(self, key: str, path: Path, *, moved: Moved = ignore_moved) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            for piece in self.stream(key):
                stream.write(piece)
                moved(len(piece))

    def head(self, key: str) -> ObjectInfo | None:
        file = self._files.get(key)
        return ObjectInfo(key, file.size, 0.0) if file else None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for path, file in self._files.items():
            if path.startswith(prefix):
                yield ObjectInfo(path, file.size, 0.0)
