"""The bundle as a file: a tar whose every byte follows from the snapshot, written once and checked byte for byte.

Members lie in a fixed order (`bundle.json`, then the listed files in path order) with fixed headers: mode 0644, no
owner, one time for all. So the signed list decides the whole archive, padding and end included, and there is no byte
that could be changed without being seen. Any tar program unpacks it.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from sluice.infra.errors import ConflictError, InputError, IntegrityError, UnavailableError
from sluice.infra.object_store import ObjectMissing
from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import digest_bytes
from sluice.registry.transfer.snapshot import Snapshot, SnapshotFile
from sluice.registry.transfer.source import Source

SNAPSHOT_FILE = "bundle.json"
CHUNK = 1 << 20
MODIFIED = 315532800
"""1980-01-01: every member's time. Some programs warn of a file from 1970."""
_LONGEST_SNAPSHOT = 1 << 30
_BLOCK = tarfile.BLOCKSIZE


class Archive:
    """A bundle on disk, opened to read. Members are found by the snapshot's list, not by what headers say."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._size = path.stat().st_size
            with path.open("rb") as stream:
                self.envelope = _read_first(stream)
        except OSError as error:
            raise InputError(f"The bundle {str(path)!r} cannot be read: {error.strerror}.") from error
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0

    def arrange(self, snapshot: Snapshot) -> None:
        """Say which member lies where, once the snapshot's signature was verified."""
        offset = _member_size(len(self.envelope))
        for file in snapshot.files:
            self._places[file.path] = (offset + _BLOCK, file.size)
            offset += _member_size(file.size)
        self._end = offset

    def damages(self, snapshot: Snapshot, report: Report = no_report) -> list[str]:
        """A sentence for each file that is not what the snapshot lists, empty when every byte is. Reports bytes."""
        self.arrange(snapshot)
        found: list[str] = []
        with self.path.open("rb") as stream:
            first = SnapshotFile(path=SNAPSHOT_FILE, size=len(self.envelope), digest=digest_bytes(self.envelope))
            done = 0
            for file in (first, *snapshot.files):
                problem = _member_problem(stream, file)
                if problem:
                    found.append(f"{file.path}: {problem}")
                    if self._size <= stream.tell() < self._end:
                        return [*found, f"{self.path.name}: it ends there, {self._end - self._size} bytes too early"]
                done += file.size
                report(done, len(self.envelope) + snapshot.size, file.path)
            if stream.read() != _trailer(self._end):
                found.append(f"{self.path.name}: its end (after the last file, {file.path}) is damaged")
        return found

    def stream(self, key: str, start: int = 0) -> Iterator[bytes]:
        """As `Source.stream`."""
        if key not in self._places:
            raise ObjectMissing(f"The bundle holds no {key!r}.")
        offset, size = self._places[key]
        with self.path.open("rb") as stream:
            stream.seek(offset + start)
            left = size - start
            while left > 0:
                piece = stream.read(min(CHUNK, left))
                if not piece:
                    return
                left -= len(piece)
                yield piece


def write_archive(path: Path, envelope: bytes, snapshot: Snapshot, source: Source, report: Report = no_report) -> None:
    """Write the bundle in bounded memory; it appears under its name when it is whole. Reports bytes.

    What an interrupted run has written already is checked and kept. Raises `InputError` when `path` holds something
    else, `IntegrityError` when the source gives other bytes than the snapshot lists, `UnavailableError` when the disk
    is full or refuses, `ConflictError` while another process writes it.
    """
    if path.exists():
        known = Archive(path)
        if known.envelope == envelope and not known.damages(snapshot):
            return
        raise InputError(f"The file {str(path)!r} exists already, and it is another bundle.", hint="Remove it first.")
    staging = path.with_name(f".{path.name}.part")
    try:
        with os.fdopen(os.open(staging, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as stream:
            _hold(stream, path)
            _write_members(stream, envelope, snapshot, source, report)
            os.fsync(stream.fileno())
            os.rename(staging, path)
    except OSError as error:
        raise UnavailableError(
            f"The bundle {str(path)!r} cannot be written: {error.strerror}.",
            hint="What was written is kept: the same command goes on with it.",
        ) from error


def _hold(stream: io.BufferedRandom, path: Path) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConflictError(f"Another process is writing {str(path)!r}.", hint="Wait for it.") from error


def _write_members(
    stream: io.BufferedRandom, envelope: bytes, snapshot: Snapshot, source: Source, report: Report
) -> None:
    first = SnapshotFile(path=SNAPSHOT_FILE, size=len(envelope), digest=digest_bytes(envelope))
    done = 0
    for file in (first, *snapshot.files):
        start = stream.tell()
        if _member_problem(stream, file):
            stream.seek(start)
            stream.truncate()
            _write_member(stream, file, iter([envelope]) if file is first else source.stream(file.path))
        done += file.size
        report(done, len(envelope) + snapshot.size, file.path)
    end = stream.tell()
    stream.truncate()
    stream.write(_trailer(end))
    stream.flush()


def _write_member(stream: io.BufferedRandom, file: SnapshotFile, pieces: Iterator[bytes]) -> None:
    stream.write(_header(file.path, file.size))
    digest, size = hashlib.sha256(), 0
    for piece in pieces:
        digest.update(piece)
        size += len(piece)
        stream.write(piece)
    if f"sha256:{digest.hexdigest()}" != file.digest:
        raise IntegrityError(f"{file.path} is damaged in the object store: it is not {file.digest}.")
    stream.write(b"\0" * (-size % _BLOCK))


def _member_problem(stream: io.BufferedReader | io.BufferedRandom, file: SnapshotFile) -> str:
    """What is wrong with the member that starts here, in words; the stream stands behind it afterwards."""
    start = stream.tell()
    header = stream.read(_BLOCK)
    digest, left = hashlib.sha256(), file.size
    while left > 0 and (piece := stream.read(min(CHUNK, left))):
        digest.update(piece)
        left -= len(piece)
    padding = stream.read(-file.size % _BLOCK)
    if len(header) < _BLOCK or left or len(padding) < -file.size % _BLOCK:
        return "it is cut off"
    stream.seek(start + _member_size(file.size))
    if f"sha256:{digest.hexdigest()}" != file.digest:
        return f"its bytes were changed (sha256:{digest.hexdigest()[:12]}…, not {file.digest[:19]}…)"
    if header != _header(file.path, file.size):
        return "its header in the archive was changed"
    if padding.strip(b"\0"):
        return "the padding behind it was changed"
    return ""


def _read_first(stream: io.BufferedReader) -> bytes:
    """The bytes of the snapshot at the start of an archive. Raises `IntegrityError` naming it."""
    header = stream.read(_BLOCK)
    try:
        size = tarfile.TarInfo.frombuf(header, "utf-8", "strict").size
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{SNAPSHOT_FILE}: its header in the archive is damaged, or this is no bundle.") from error
    if header != _header(SNAPSHOT_FILE, size) or size > _LONGEST_SNAPSHOT:
        raise IntegrityError(f"{SNAPSHOT_FILE}: its header in the archive is damaged, or this is no bundle.")
    data = stream.read(size)
    if len(data) < size:
        raise IntegrityError(f"{SNAPSHOT_FILE}: it is cut off.")
    return data


def _header(path: str, size: int) -> bytes:
    member = tarfile.TarInfo(path)
    member.size, member.mode, member.mtime = size, 0o644, MODIFIED
    return member.tobuf(tarfile.GNU_FORMAT)


def _member_size(size: int) -> int:
    return _BLOCK + size + -size % _BLOCK


def _trailer(end: int) -> bytes:
    """Two empty blocks, and zeros up to a full record: how a tar ends."""
    return b"\0" * (2 * _BLOCK + -(end + 2 * _BLOCK) % tarfile.RECORDSIZE)
