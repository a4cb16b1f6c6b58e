"""An `ObjectStore` in a folder: for unit tests, with the same conditional write as S3 (exclusive link)."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from sluice.infra.object_store import ObjectExists, ObjectInfo, ObjectMissing
from sluice.infra.transfer import Moved, ignore_moved


class DirectoryStore:
    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def _path(self, key: str) -> Path:
        return self.root / key

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        target = self._path(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, staging = tempfile.mkstemp(dir=self.root, prefix=".put-")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        try:
            if if_absent:
                try:
                    os.link(staging, target)
                except FileExistsError as error:
                    raise ObjectExists(f"The object {key!r} exists already.") from error
            else:
                os.replace(staging, target)
        finally:
            if os.path.exists(staging):
                os.unlink(staging)

    def put_file(self, key: str, path: Path, *, if_absent: bool = False, moved: Moved = ignore_moved) -> None:
        self.put(key, path.read_bytes(), if_absent=if_absent)
        moved(path.stat().st_size)

    def get(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError as error:
            raise ObjectMissing(f"There is no object {key!r}.") from error

    def stream(self, key: str, start: int = 0) -> Iterator[bytes]:
        yield self.get(key)[start:]

    def put_stream(self, key: str, stream: BinaryIO) -> None:
        self.put(key, stream.read())

    def get_file(self, key: str, path: Path, *, moved: Moved = ignore_moved) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(self._path(key), path)
        except FileNotFoundError as error:
            raise ObjectMissing(f"There is no object {key!r}.") from error
        moved(path.stat().st_size)

    def head(self, key: str) -> ObjectInfo | None:
        try:
            found = self._path(key).stat()
        except FileNotFoundError:
            return None
        return ObjectInfo(key, found.st_size, found.st_mtime)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for path in sorted(p for p in self.root.rglob("*") if p.is_file() and not p.name.startswith(".put-")):
            key = path.relative_to(self.root).as_posix()
            if key.startswith(prefix):
                # Deleted by another thread while this one lists: a listing of S3 does not break of that.
                with suppress(FileNotFoundError):
                    found = path.stat()
                    yield ObjectInfo(key, found.st_size, found.st_mtime)

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)
