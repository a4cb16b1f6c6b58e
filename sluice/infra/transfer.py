"""Large files to and from S3: in parallel parts, in bounded memory, and resumed after a kill or a cut.

Upload: a multipart upload whose id is kept in a small journal on this machine. Whoever sends the same file to the same
key again goes on with it: of the parts that the server lists, those of the right size and checksum are passed over.
Another machine never joins an upload that may be running elsewhere; what nobody goes on with is aborted by `sluice gc`.

Download: ranges of one version of the object (`If-Match`) are written into a partial file beside the
file, and the finished ones into a journal. The file gets its name when it is whole.

Each part is sent with its SHA-256, tried again with growing pauses, and has a time-out. What arrives is not checked
here beyond its length: who knows the content's digest checks that (`ArtifactStore` does).
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sluice.infra.errors import InputError, UnavailableError

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

MIB = 2**20
MOST_PARTS = 10_000
"""S3's own limit."""
PARTIAL = ".sluice-partial"
"""Ends the name of a file that is being fetched."""
_CHUNK = MIB
_TRANSIENT_CODES = frozenset({"RequestTimeout", "SlowDown", "BadDigest", "RequestTimeTooSkewed", "InternalError"})
_T = TypeVar("_T")

Moved = Callable[[int], None]
"""`moved(count)`: so many more bytes are where they should be."""


def ignore_moved(count: int) -> None:
    """A `Moved` that does nothing."""


@dataclass(frozen=True)
class Transfers:
    """How files are moved: at most `parallel` parts of `part_bytes` at once (both files and parts share them).

    A part is tried `attempts` times, after `pause_s` seconds at first and twice as long each time, and may take
    `timeout_s` seconds (an upload: 60 without a byte). `journal` is the folder that remembers broken uploads; without
    one an upload that broke off starts anew. S3 takes no part under 5 MiB but the last.
    """

    part_bytes: int = 16 * MIB
    parallel: int = 8
    attempts: int = 8
    pause_s: float = 0.2
    timeout_s: float = 300.0
    journal: Path | None = None
    _slots: threading.BoundedSemaphore = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.part_bytes < 1 or self.parallel < 1 or self.attempts < 1:
            raise InputError("part_bytes, parallel and attempts of a transfer must be at least 1.")
        object.__setattr__(self, "_slots", threading.BoundedSemaphore(self.parallel))

    def part_size(self, size: int) -> int:
        """Bytes of each part but the last: more than `part_bytes` only where S3's 10,000 parts would not do."""
        return max(self.part_bytes, -(-size // MOST_PARTS))

    def each(self, work: Callable[[int], None], numbers: Iterable[int]) -> None:
        """`work(number)` for each, a few at once; the first failure stops the rest and is raised."""
        stop = threading.Event()

        def one(number: int) -> None:
            with self._slots:
                if not stop.is_set():
                    self._persist(lambda: work(number), stop)

        with ThreadPoolExecutor(max_workers=self.parallel) as pool:
            running = [pool.submit(one, number) for number in numbers]
            try:
                for future in running:
                    future.result()
            finally:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)

    def _persist(self, work: Callable[[], None], stop: threading.Event) -> None:
        for attempt in range(self.attempts):
            try:
                return work()
            except Exception as error:
                if stop.is_set() or attempt + 1 == self.attempts or not is_transient(error):
                    raise
            stop.wait(random.uniform(0.5, 1) * min(30.0, self.pause_s * 2**attempt))


def is_transient(error: Exception) -> bool:
    """Whether trying again may help: the network, a busy server, bytes damaged on their way."""
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError, IncompleteReadError

    if isinstance(error, ClientError):
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return status >= 500 or status == 429 or _code(error) in _TRANSIENT_CODES
    return isinstance(error, ConnectionError | HTTPClientError | IncompleteReadError | PartTimedOut)


class PartTimedOut(UnavailableError):
    """A part took longer than its time-out, although bytes kept coming."""


class ObjectChanged(UnavailableError):
    """The object was replaced by another while it was read."""


def upload(
    client: S3Client, bucket: str, key: str, path: Path, transfers: Transfers, *, if_absent: bool, moved: Moved
) -> None:
    """Send a file of more than one part. Raises botocore's errors; with `if_absent` 412 when the key is taken."""
    with _journal(transfers, f"{client.meta.endpoint_url}/{bucket}/{key}") as journal:
        for fresh in (False, True):
            upload_id = "" if fresh else journal.read()
            known = _listed(client, bucket, key, upload_id) if upload_id else {}
            if known is None or not upload_id:
                known = {}
                upload_id = client.create_multipart_upload(Bucket=bucket, Key=key, ChecksumAlgorithm="SHA256")[
                    "UploadId"
                ]
                journal.write(upload_id)
                fresh = True
            try:
                parts = _send_parts(client, bucket, key, upload_id, path, transfers, known, moved)
                _complete(client, bucket, key, upload_id, parts, if_absent=if_absent)
            except Exception as error:
                if _code(error) == "PreconditionFailed":
                    with suppress(Exception):
                        client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
                    journal.clear()
                if _code(error) == "NoSuchUpload":
                    journal.clear()
                    if not fresh:
                        moved = ignore_moved
                        continue
                raise
            journal.clear()
            return


def _send_parts(
    client: S3Client,
    bucket: str,
    key: str,
    upload_id: str,
    path: Path,
    transfers: Transfers,
    known: dict[int, dict[str, Any]],
    moved: Moved,
) -> list[dict[str, Any]]:
    size = path.stat().st_size
    part_size = transfers.part_size(size)
    sent: dict[int, dict[str, Any]] = {}
    with path.open("rb") as stream:
        handle = stream.fileno()

        def send(number: int) -> None:
            data = os.pread(handle, part_size, (number - 1) * part_size)
            checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
            etag = _same_part(known.get(number), data, checksum)
            if etag is None:
                etag = client.upload_part(
                    Bucket=bucket, Key=key, UploadId=upload_id, PartNumber=number, Body=data, ChecksumSHA256=checksum
                )["ETag"]
            sent[number] = {"PartNumber": number, "ETag": etag, "ChecksumSHA256": checksum}
            moved(len(data))

        transfers.each(send, range(1, -(-size // part_size) + 1))
    return [sent[number] for number in sorted(sent)]


def _same_part(known: dict[str, Any] | None, data: bytes, checksum: str) -> str | None:
    """The ETag of a part that the server has already with these very bytes; else None.

    The ETag of a part is its MD5, but not where the server encrypts with a key of its own: those list the checksum.
    """
    if known is None or known["Size"] != len(data):
        return None
    if "ChecksumSHA256" in known:
        same = known["ChecksumSHA256"] == checksum
    else:
        same = known["ETag"].strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest()
    return str(known["ETag"]) if same else None


def _listed(client: S3Client, bucket: str, key: str, upload_id: str) -> dict[int, dict[str, Any]] | None:
    """The parts that an upload has, by number; None when the server knows it no more."""
    from botocore.exceptions import ClientError

    try:
        pages = client.get_paginator("list_parts").paginate(Bucket=bucket, Key=key, UploadId=upload_id)
        return {part["PartNumber"]: dict(part) for page in pages for part in page.get("Parts", [])}
    except ClientError as error:
        if _code(error) == "NoSuchUpload":
            return None
        raise


def _complete(
    client: S3Client, bucket: str, key: str, upload_id: str, parts: list[dict[str, Any]], *, if_absent: bool
) -> None:
    condition: dict[str, Any] = {"IfNoneMatch": "*"} if if_absent else {}
    client.complete_multipart_upload(
        Bucket=bucket,
        Key=key,
        UploadId=upload_id,
        MultipartUpload={"Parts": parts},  # type: ignore[typeddict-item]
        **condition,
    )


@dataclass(frozen=True)
class _UploadJournal:
    path: Path | None

    def read(self) -> str:
        try:
            return self.path.read_text().strip() if self.path else ""
        except FileNotFoundError:
            return ""

    def write(self, upload_id: str) -> None:
        if self.path:
            self.path.write_text(upload_id)

    def clear(self) -> None:
        if self.path:
            self.path.write_text("")


@contextmanager
def _journal(transfers: Transfers, place: str) -> Iterator[_UploadJournal]:
    """The journal of one upload, held while it runs: a second process that sends the same starts one of its own."""
    if transfers.journal is None:
        yield _UploadJournal(None)
        return
    transfers.journal.mkdir(parents=True, exist_ok=True)
    path = transfers.journal / hashlib.sha256(place.encode()).hexdigest()
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield _UploadJournal(None)
            return
        yield _UploadJournal(path)


def download(client: S3Client, bucket: str, key: str, path: Path, transfers: Transfers, moved: Moved) -> None:
    """Fetch an object to `path`, going on where an earlier call broke off. One process at a time for one `path`.

    Raises botocore's errors, and `ObjectChanged` when the object would not stay the same.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    counted = 0

    def count(size: int) -> None:
        nonlocal counted
        counted += size
        moved(size)

    for last in (False, True):
        try:
            _download_version(client, bucket, key, path, transfers, count)
            return
        except Exception as error:
            if _code(error) != "PreconditionFailed":
                raise
            # Another version took its place. Ours is worth nothing, and what was counted is to be moved again.
            moved(-counted)
            counted = 0
            if last:
                raise ObjectChanged(f"The object {key!r} changed twice while it was read.") from error


def _download_version(client: S3Client, bucket: str, key: str, path: Path, transfers: Transfers, moved: Moved) -> None:
    head = client.head_object(Bucket=bucket, Key=key)
    size, etag = head["ContentLength"], head["ETag"]
    part_size = transfers.part_size(size)
    partial, journal = path.with_name(f".{path.name}{PARTIAL}"), path.with_name(f".{path.name}{PARTIAL}.done")
    version = json.dumps({"key": key, "etag": etag, "size": size, "part_size": part_size})
    done = _finished_ranges(partial, journal, version)
    with partial.open("r+b" if done else "wb") as stream, journal.open("a" if done else "w") as log:
        if not done:
            log.write(f"{version}\n")
            log.flush()
            stream.truncate(size)
        handle, writing = stream.fileno(), threading.Lock()

        def fetch(number: int) -> None:
            start = number * part_size
            end = min(start + part_size, size)
            if number not in done:
                _fetch_range(client, bucket, key, etag, handle, start, end, transfers.timeout_s)
                with writing:
                    # After its bytes: a process that is killed in between fetches the range again.
                    log.write(f"{number}\n")
                    log.flush()
            moved(end - start)

        transfers.each(fetch, range(-(-size // part_size)))
    os.replace(partial, path)
    journal.unlink()


def _finished_ranges(partial: Path, journal: Path, version: str) -> set[int]:
    """Numbers of the ranges that lie in the partial file, when it is one of this version; else an empty set."""
    try:
        lines = journal.read_text().split("\n")
        if not partial.is_file() or lines[0] != version:
            return set()
        # The last line is empty, or was being written.
        return {int(line) for line in lines[1:-1]}
    except (OSError, ValueError):
        return set()


def _fetch_range(
    client: S3Client, bucket: str, key: str, etag: str, handle: int, start: int, end: int, timeout_s: float
) -> None:
    from botocore.exceptions import IncompleteReadError

    begun, place = time.monotonic(), start
    body = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", IfMatch=etag)["Body"]
    with body:
        while chunk := body.read(_CHUNK):
            place += os.pwrite(handle, chunk[: end - place], place)
            if time.monotonic() - begun > timeout_s:
                raise PartTimedOut(f"{end - start} bytes of {key!r} took longer than {timeout_s:g} s.")
    if place != end:
        raise IncompleteReadError(actual_bytes=place - start, expected_bytes=end - start)


def abort_stale_uploads(client: S3Client, bucket: str, older_than_s: float, *, dry_run: bool = False) -> list[str]:
    """Keys of the multipart uploads that began longer ago than that; they are aborted unless it is a dry run."""
    stale = []
    for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket):
        for one in page.get("Uploads", []):
            if time.time() - one["Initiated"].timestamp() > older_than_s:
                stale.append(one["Key"])
                if not dry_run:
                    client.abort_multipart_upload(Bucket=bucket, Key=one["Key"], UploadId=one["UploadId"])
    return stale


def _code(error: Exception) -> str:
    response = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))
