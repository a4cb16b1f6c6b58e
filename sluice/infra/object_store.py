"""Objects by key, with the one write that everything else rests on: create only if absent.

The protocol is what S3 and its kin guarantee. `S3ObjectStore` speaks to Amazon S3 and to SeaweedFS alike.
Source of the conditional write: S3 `PutObject` with `If-None-Match: *` answers 412 when the key exists.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol
from urllib.parse import urlsplit

from sluice.infra.errors import ConflictError, SluiceError, UnavailableError
from sluice.infra.transfer import Moved, Transfers, abort_stale_uploads, download, ignore_moved, upload

if TYPE_CHECKING:
    from botocore.exceptions import ClientError
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.literals import BucketLocationConstraintType

    from sluice.infra.settings import ObjectStoreSettings

_CONDITIONAL_ATTEMPTS = 5
_PIECE = 1 << 18
_KEYS = "Check SLUICE_OBJECT_STORE__ACCESS_KEY and SLUICE_OBJECT_STORE__SECRET_KEY."


class ObjectMissing(SluiceError):
    """No object has this key."""


class ObjectExists(ConflictError):
    """A write that must create found the key taken."""


@dataclass(frozen=True)
class ObjectInfo:
    """One listed object: its key, size in bytes and time of last write (seconds since the epoch)."""

    key: str
    size: int
    modified: float


class ObjectStore(Protocol):
    """Keys are relative paths with `/`. Reads after a finished write see it (S3 has been strong since 2020)."""

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        """Write `data`. With `if_absent`, raise `ObjectExists` and write nothing when the key is taken."""

    def put_file(self, key: str, path: Path, *, if_absent: bool = False, moved: Moved = ignore_moved) -> None:
        """Upload a file in parts, in bounded memory; the object appears whole or not at all.

        With `if_absent`, raise `ObjectExists` when the key is taken. `moved` counts bytes as they get there.
        """

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises `ObjectMissing`."""

    def get_file(self, key: str, path: Path, *, moved: Moved = ignore_moved) -> None:
        """Download to `path` in bounded memory; the file gets its name when it is whole. Raises `ObjectMissing`."""

    def head(self, key: str) -> ObjectInfo | None:
        """Size and time of an object, or None."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects whose key starts with `prefix`, in key order."""

    def delete(self, key: str) -> None:
        """Remove an object; removing what is not there is success."""


class S3ObjectStore:
    """`ObjectStore` over the S3 API. Safe to share between threads."""

    def __init__(self, settings: ObjectStoreSettings, transfers: Transfers | None = None) -> None:
        self._settings = settings
        self._transfers = transfers or Transfers()
        self._lock = threading.Lock()
        self._client: S3Client | None = None

    @property
    def client(self) -> S3Client:
        with self._lock:
            if self._client is None:
                import boto3
                from botocore.config import Config

                secret = self._settings.secret_key
                self._client = boto3.session.Session().client(
                    "s3",
                    endpoint_url=self._settings.endpoint_url,
                    region_name=self._settings.region,
                    aws_access_key_id=self._settings.access_key,
                    aws_secret_access_key=secret.get_secret_value() if secret else None,
                    config=Config(
                        retries={"max_attempts": 5, "mode": "standard"},
                        connect_timeout=5,
                        read_timeout=60,
                        max_pool_connections=self._transfers.parallel + 8,
                        s3={"addressing_style": "path" if self._settings.endpoint_url else "auto"},
                        # A proxy of the user's environment cannot reach this machine's own loopback address.
                        proxies={} if _is_loopback(self._settings.endpoint_url) else None,
                    ),
                )
            return self._client

    @property
    def bucket(self) -> str:
        return self._settings.bucket

    def ensure_bucket(self) -> None:
        """Create the bucket where the caller may; one that exists is success."""
        from botocore.exceptions import ClientError

        with self._explained("create bucket"):
            try:
                self.client.head_bucket(Bucket=self.bucket)
            except ClientError as error:
                if _status(error) != 404:
                    raise
                self._create_bucket()

    def _create_bucket(self) -> None:
        from botocore.exceptions import ClientError

        try:
            if self._settings.endpoint_url or self._settings.region == "us-east-1":
                self.client.create_bucket(Bucket=self.bucket)
            else:
                # Amazon S3 wants the region spelt out everywhere but in its first one.
                where: BucketLocationConstraintType = self._settings.region  # type: ignore[assignment]
                self.client.create_bucket(Bucket=self.bucket, CreateBucketConfiguration={"LocationConstraint": where})
        except ClientError as error:
            # Two processes may come here at once; the name may also be somebody else's, which is a failure.
            if _code(error) != "BucketAlreadyOwnedByYou":
                raise

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        from botocore.exceptions import ClientError

        with self._explained(key):
            if not if_absent:
                self.client.put_object(Bucket=self.bucket, Key=key, Body=data)
                return
            for attempt in range(_CONDITIONAL_ATTEMPTS):
                try:
                    self.client.put_object(Bucket=self.bucket, Key=key, Body=data, IfNoneMatch="*")
                    return
                except ClientError as error:
                    if _status(error) == 412:
                        # The client repeats a request whose answer got lost; the object may be our own then.
                        if attempt + _retries(error) > 0 and self.get(key) == data:
                            return
                        raise ObjectExists(f"The object {key!r} exists already.") from error
                    # 409 is S3's answer when two conditional writes race: the other may win or fail, so look and
                    # try again, as its documentation asks.
                    if _status(error) != 409 or attempt == _CONDITIONAL_ATTEMPTS - 1:
                        raise
                    if self.head(key) is not None:
                        raise ObjectExists(f"The object {key!r} exists already.") from error
                time.sleep(0.1 * (attempt + 1))

    def put_file(self, key: str, path: Path, *, if_absent: bool = False, moved: Moved = ignore_moved) -> None:
        from botocore.exceptions import ClientError

        size = path.stat().st_size
        if size <= self._transfers.part_bytes:
            self.put(key, path.read_bytes(), if_absent=if_absent)
            moved(size)
            return
        with self._explained(key):
            if if_absent and self.head(key) is not None:
                raise ObjectExists(f"The object {key!r} exists already.")
            try:
                upload(self.client, self.bucket, key, path, self._transfers, if_absent=if_absent, moved=moved)
            except ClientError as error:
                # A lost answer to the last request, tried again, finds the upload completed: 404, or 412 on a
                # condition. 409 says that a conditional write won or fails at this moment.
                if _status(error) not in (404, 409, 412) or (found := self.head(key)) is None:
                    raise
                if if_absent:
                    raise ObjectExists(f"The object {key!r} exists already.") from error
                if found.size != size:
                    raise

    def get(self, key: str) -> bytes:
        with self._explained(key):
            return self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def stream(self, key: str, start: int = 0) -> Iterator[bytes]:
        """The object's bytes from `start` on, in pieces of at most 256 KiB. Raises `ObjectMissing`."""
        with self._explained(key):
            # S3 refuses a range that begins behind the last byte, which an empty object has none of.
            wanted = {"Range": f"bytes={start}-"} if start else {}
            answer = self.client.get_object(Bucket=self.bucket, Key=key, **wanted)  # type: ignore[arg-type]
            yield from answer["Body"].iter_chunks(_PIECE)

    def put_stream(self, key: str, stream: BinaryIO) -> None:
        """Upload what a stream gives, in parts, in bounded memory; the object appears whole or not at all."""
        with self._explained(key):
            self.client.upload_fileobj(stream, self.bucket, key)

    def get_file(self, key: str, path: Path, *, moved: Moved = ignore_moved) -> None:
        with self._explained(key):
            download(self.client, self.bucket, key, path, self._transfers, moved)

    def abort_stale_uploads(self, older_than_s: float, *, dry_run: bool = False) -> list[str]:
        """Keys of broken uploads that began longer ago than that; aborted unless it is a dry run."""
        with self._explained("uploads"):
            return abort_stale_uploads(self.client, self.bucket, older_than_s, dry_run=dry_run)

    def head(self, key: str) -> ObjectInfo | None:
        try:
            with self._explained(key):
                found = self.client.head_object(Bucket=self.bucket, Key=key)
        except ObjectMissing:
            return None
        return ObjectInfo(key, found["ContentLength"], found["LastModified"].timestamp())

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        found = []
        with self._explained(prefix):
            for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
                for entry in page.get("Contents", []):
                    found.append(ObjectInfo(entry["Key"], entry["Size"], entry["LastModified"].timestamp()))
        # SeaweedFS lists a folder's content before its neighbours: `b/1` before `b-1`, which is not key order.
        yield from sorted(found, key=lambda info: info.key)

    def delete(self, key: str) -> None:
        with self._explained(key):
            self.client.delete_object(Bucket=self.bucket, Key=key)

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """Turn the client's errors into ours, with the endpoint and the way out."""
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

        where = f"{self._settings.endpoint_url or 'Amazon S3'}/{self.bucket}"
        try:
            yield
        except ClientError as error:
            raise self._answered(error, key, where) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise UnavailableError(f"There are no credentials for the object store {where}.", hint=_KEYS) from error
        except BotoCoreError as error:
            raise UnavailableError(
                f"The object store {where} does not answer: {error}.",
                hint="Is it running? `sluice status` tells, `sluice up` mends the local one.",
            ) from error

    def _answered(self, error: ClientError, key: str, where: str) -> SluiceError:
        code = _code(error)
        if code == "NoSuchBucket":
            return UnavailableError(
                f"The object store {where} has no bucket {self.bucket!r}.",
                hint="Create it, or set SLUICE_OBJECT_STORE__BUCKET to one that exists.",
            )
        if _status(error) == 404:
            return ObjectMissing(f"There is no object {key!r} in {where}.")
        if _status(error) in (401, 403):
            return UnavailableError(f"The object store {where} refused {key!r}: {code}.", hint=_KEYS)
        return UnavailableError(f"The object store {where} failed on {key!r}: {code or error}.")


def _is_loopback(endpoint_url: str | None) -> bool:
    return endpoint_url is not None and urlsplit(endpoint_url).hostname in ("127.0.0.1", "localhost", "::1")


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _retries(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0))


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
