"""What was asked once is not asked again: answers and judgements by the digest of all that they depend on.

One SQLite file, so that a killed process loses nothing that it had finished, and several may work with it at once. It
is a cache: removing it costs time, never a result.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sluice.infra.errors import UnavailableError
from sluice.provenance.canonical import Json


class Cache:
    """Values (JSON) by key (a digest). Used by one thread."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path

    def get(self, key: str) -> Json | None:
        """The value, or None when it is not there or cannot be read."""
        with _failing(self._path):
            row = self._connection.execute("SELECT value FROM entries WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        try:
            found: Json = json.loads(row[0])
        except ValueError:
            return None
        return found

    def put(self, key: str, value: Json) -> None:
        """Keep a value; a process that is killed then has not lost it."""
        with _failing(self._path), self._connection:
            self._connection.execute(
                "INSERT OR REPLACE INTO entries (key, value) VALUES (?, ?)", (key, json.dumps(value))
            )


@contextmanager
def open_cache(path: Path) -> Iterator[Cache]:
    """The cache in a file, made when it is new. Raises `UnavailableError` when the file is damaged or the disk full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _failing(path):
        # Killed writers leave a lock that SQLite frees; a living one is waited for.
        connection = sqlite3.connect(path, timeout=30)
    with closing(connection):
        with _failing(path):
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        yield Cache(connection, path)


@contextmanager
def _failing(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise UnavailableError(
            f"The evaluation cache {str(path)!r} cannot be used: {error}.",
            hint="It only saves time: remove it, and what it held is measured again.",
        ) from error
