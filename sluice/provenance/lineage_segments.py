"""Where the lineage index lies: Parquet segments, written once under their digest, in the object store and here.

`lineage/v1/sha256/<hex>.parquet` holds facts (`lineage_facts`), sorted by relation and by 64 bits of the subject's
digest (the column `place`): a question about one subject reads a few row groups only, one about thousands of them
compares numbers instead of texts. Two processes may write the same facts at once: a fact read twice is still one fact.
Merging puts the merged segment first and removes its parts after, so a kill in between leaves facts doubled, never
lost; and the index can always be made anew from the records and manifests that it is made of.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sluice.infra.errors import IntegrityError
from sluice.infra.object_store import ObjectInfo, ObjectMissing, ObjectStore
from sluice.provenance.canonical import digest_file, hex_of

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

PREFIX = "lineage/v1/sha256/"
"""Another layout of facts gets another number, and so an index of its own, made anew."""
MERGE_AT = 8
"""Small segments that are merged into one."""
ROW_GROUP = 20_000
"""Rows of a row group: what one lookup reads."""
_KEPT_S = 3600.0
_ATTEMPTS = 10


class Segments:
    """The segments of one object store, with copies in a local folder."""

    def __init__(self, objects: ObjectStore, folder: Path) -> None:
        self._objects = objects
        self._folder = folder

    def fetch(self) -> list[Path]:
        """Local copies of all segments, verified when they were fetched."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for _ in range(_ATTEMPTS):
            listed = list(self._objects.list(PREFIX))
            try:
                paths = [self._fetch(info) for info in listed]
            except ObjectMissing:
                # Merged into another one since it was listed.
                continue
            self._sweep({path.name for path in paths})
            return paths
        raise IntegrityError("The segments of the lineage index change faster than they can be read.")

    def write(self, connection: DuckDBPyConnection, query: str) -> Path:
        """Store the rows of a query as a segment; its local copy."""
        self._folder.mkdir(parents=True, exist_ok=True)
        staging = self._folder / f".write-{os.getpid()}-{time.monotonic_ns()}"
        try:
            connection.execute(
                "COPY (SELECT DISTINCT relation, md5_number_lower(subject) AS place, subject, object, detail "
                f"FROM ({query}) ORDER BY relation, place, subject, object, detail) "
                f"TO '{_quoted(staging)}' (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {ROW_GROUP})"
            )
            digest = digest_file(staging)
            path = self._folder / f"{hex_of(digest)}.parquet"
            self._objects.put_file(_key(path), staging)
            os.replace(staging, path)
        finally:
            staging.unlink(missing_ok=True)
        return path

    def merge(self, connection: DuckDBPyConnection, paths: Sequence[Path]) -> list[Path]:
        """The segments after the small ones were merged, once there are enough of them."""
        small = _small(paths)
        if len(small) < MERGE_AT:
            return list(paths)
        merged = self.write(connection, f"SELECT * FROM {read(small)}")
        for path in small:
            if path != merged:
                self._objects.delete(_key(path))
        return [*(path for path in paths if path not in small), merged]

    def drop(self) -> None:
        """Remove all segments; the next query makes them anew."""
        for info in list(self._objects.list(PREFIX)):
            self._objects.delete(info.key)

    def _fetch(self, info: ObjectInfo) -> Path:
        path = self._folder / info.key.removeprefix(PREFIX)
        if path.is_file() and path.stat().st_size == info.size:
            return path
        staging = self._folder / f".fetch-{os.getpid()}-{path.name}"
        try:
            self._objects.get_file(info.key, staging)
            found = digest_file(staging)
            if hex_of(found) != path.stem:
                raise IntegrityError(
                    f"The segment {info.key!r} of the lineage index has the digest {found}.",
                    hint="`sluice lineage SUBJECT --rebuild` makes the index anew from what it was made of.",
                )
            os.replace(staging, path)
        finally:
            staging.unlink(missing_ok=True)
        return path

    def _sweep(self, names: set[str]) -> None:
        """Remove local copies of what was merged, and what a killed process left, once nobody can be reading it."""
        for path in self._folder.iterdir():
            try:
                if path.name not in names and path.is_file() and time.time() - path.stat().st_mtime > _KEPT_S:
                    path.unlink()
            except FileNotFoundError:
                continue


def place_of(subject: str) -> int:
    """Where the facts about a subject lie: what DuckDB calls md5_number_lower."""
    return int.from_bytes(hashlib.md5(subject.encode(), usedforsecurity=False).digest()[8:], "little")


def read(paths: Sequence[Path]) -> str:
    """The table expression over these segments."""
    listed = ", ".join(f"'{_quoted(path)}'" for path in paths)
    return f"read_parquet([{listed}])"


def _small(paths: Sequence[Path]) -> list[Path]:
    """The smallest segments, each at most as large as those before it together: a row is merged a few times only."""
    chosen: list[Path] = []
    total = 0
    for size, path in sorted((path.stat().st_size, path) for path in paths):
        if len(chosen) >= MERGE_AT and size > total:
            break
        chosen.append(path)
        total += size
    return chosen if len(chosen) >= MERGE_AT else []


def _key(path: Path) -> str:
    return f"{PREFIX}{path.name}"


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
