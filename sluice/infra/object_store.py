"""Objects by key, with the one write that everything else rests on: create only if absent.

The protocol is what S3 and its kin guarantee. `S3ObjectStore` speaks to Amazon S3 and to SeaweedFS alike.
Source of the conditional write: S3 `PutObject` with `If-None-Match: *` answers 412 when the key exists.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sluice.infra.errors import ConflictError, SluiceError, UnavailableError

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

    from sluice.infra.settings import ObjectStoreSettings


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

    def put_file(self, key: str, path: Path) -> None:
        """Upload a file in parts, in bounded memory; the object appears whole or not at all."""

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises `ObjectMissing`."""

    def get_file(self, key: str, path: Path) -> None:
        """Download to `path` in bounded memory. Raises `ObjectMissing`."""

    def head(self, key: str) -> ObjectInfo | None:
        """Size and time of an object, or None."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects whose key starts with `prefix`, in key order."""

    def delete(self, key: str) -> None:
        """Remove an object; removing what is not there is success."""


class S3ObjectStore:
    """`ObjectStore` over the S3 API. Safe to share between threads."""

    def __init__(self, settings: ObjectStoreSettings) -> None:
        self._settings = settings
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
                        s3={"addressing_style": "path" if self._settings.endpoint_url else "auto"},
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
                self.client.create_bucket(Bucket=self.bucket)

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        from botocore.exceptions import ClientError

        with self._explained(key):
            try:
                if if_absent:
                    self.client.put_object(Bucket=self.bucket, Key=key, Body=data, IfNoneMatch="*")
                else:
                    self.client.put_object(Bucket=self.bucket, Key=key, Body=data)
            except ClientError as error:
                # 409 is S3's answer when two conditional writes race: the other one may still win or fail, so look.
                if if_absent and _status(error) == 412:
                    raise ObjectExists(f"The object {key!r} exists already.") from error
                if if_absent and _status(error) == 409 and self.head(key) is not None:
                    raise ObjectExists(f"The object {key!r} exists already.") from error
                raise

    def put_file(self, key: str, path: Path) -> None:
        with self._explained(key):
            self.client.upload_file(str(path), self.bucket, key)

    def get(self, key: str) -> bytes:
        with self._explained(key):
            return self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def get_file(self, key: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._explained(key):
            self.client.download_file(self.bucket, key, str(path))

    def head(self, key: str) -> ObjectInfo | None:
        try:
            with self._explained(key):
                found = self.client.head_object(Bucket=self.bucket, Key=key)
        except ObjectMissing:
            return None
        return ObjectInfo(key, found["ContentLength"], found["LastModified"].timestamp())

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        with self._explained(prefix):
            for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
                for entry in page.get("Contents", []):
                    yield ObjectInfo(entry["Key"], entry["Size"], entry["LastModified"].timestamp())

    def delete(self, key: str) -> None:
        with self._explained(key):
            self.client.delete_object(Bucket=self.bucket, Key=key)

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """Turn the client's errors into ours, with the endpoint and the way out."""
        from botocore.exceptions import BotoCoreError, ClientError

        where = f"{self._settings.endpoint_url or 'Amazon S3'}/{self.bucket}"
        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if _status(error) == 404:
                raise ObjectMissing(f"There is no object {key!r} in {where}.") from error
            if _status(error) in (401, 403):
                raise UnavailableError(
                    f"The object store {where} refused {key!r}: {code}.",
                    hint="Check SLUICE_OBJECT_STORE__ACCESS_KEY and SLUICE_OBJECT_STORE__SECRET_KEY.",
                ) from error
            raise UnavailableError(f"The object store {where} failed on {key!r}: {code or error}.") from error
        except BotoCoreError as error:
            raise UnavailableError(
                f"The object store {where} does not answer: {error}.",
                hint="Is it running? `sluice status` tells, `sluice up` mends the local one.",
            ) from error


def _status(error: object) -> int:
    response = getattr(error, "response", None) or {}
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
