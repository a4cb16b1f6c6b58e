"""The audit log: who asked for what that destroys or promotes, and whether it was allowed.

One JSON line for each in `<home>/audit.jsonl`, written before the action is done. Where the object store is reached the
lines are copied to `audit/<date>/<id>.json`, each once, so that they outlive this machine; `ship` may run at any time.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from sluice.infra.errors import IntegrityError
from sluice.infra.home import writing
from sluice.infra.object_store import ObjectExists, ObjectStore

AUDIT_FILE = "audit.jsonl"
PREFIX = "audit/"
_SHIPPED = "audit.shipped"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True)
class AuditLine:
    """One action. `outcome`: allowed, refused, emergency (allowed because nobody could be asked), or repaired."""

    identity: str
    verb: str
    subject: str
    outcome: str
    reason: str = ""
    role: str = ""
    time: str = field(default_factory=_now)
    host: str = field(default_factory=socket.gethostname)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


def append(home: Path, line: AuditLine) -> None:
    """Add a line, for its owner's eyes only, and on the disk when this returns. Raises `UnavailableError`."""
    with writing(home):
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        # One write in append mode: lines of two processes never mix.
        handle = os.open(home / AUDIT_FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            # A command line may hold bytes that are no text.
            text = json.dumps(asdict(line), ensure_ascii=False).encode(errors="replace")
            os.write(handle, text + b"\n")
            os.fsync(handle)
        finally:
            os.close(handle)


def read(home: Path) -> list[AuditLine]:
    """All lines of this home, oldest first; a line that a crash cut off is passed over."""
    try:
        text = (home / AUDIT_FILE).read_text()
    except FileNotFoundError:
        return []
    return [line for line in map(_parse, text.splitlines()) if line is not None]


def ship(home: Path, objects: ObjectStore) -> int:
    """Copy the lines that the object store does not have yet; how many. Raises `UnavailableError`.

    A crash in between sends some again, which changes nothing: a line's object is written once, under its id.
    """
    marker = home / _SHIPPED
    lines = read(home)
    try:
        known = int(marker.read_text())
    except (OSError, ValueError):
        known = 0
    waiting = lines[known:] if known <= len(lines) else lines
    for line in waiting:
        data = json.dumps(asdict(line), ensure_ascii=False, sort_keys=True).encode()
        try:
            objects.put(f"{PREFIX}{line.time[:10]}/{line.id}.json", data, if_absent=True)
        except ObjectExists:
            pass
    if waiting:
        with writing(home):
            staging = marker.with_name(f".{_SHIPPED}.{uuid.uuid4().hex}")
            staging.write_text(str(len(lines)))
            staging.replace(marker)
    return len(waiting)


def read_shipped(objects: ObjectStore) -> list[AuditLine]:
    """The lines of every home that shares the object store. Raises `IntegrityError` for an object that is no line."""
    found = []
    for info in objects.list(PREFIX):
        line = _parse(objects.get(info.key).decode(errors="replace"))
        if line is None:
            raise IntegrityError(f"The object {info.key!r} is no line of an audit log.")
        found.append(line)
    return found


def merge(*logs: Iterable[AuditLine]) -> list[AuditLine]:
    """Lines of several logs, each once, oldest first."""
    by_id = {line.id: line for log in logs for line in log}
    return sorted(by_id.values(), key=lambda line: (line.time, line.id))


def _parse(text: str) -> AuditLine | None:
    try:
        return AuditLine(**json.loads(text))
    except (ValueError, TypeError):
        return None
