"""Parts over a bad network: every file arrives whole, what was moved is not moved again, versions never mix."""

from __future__ import annotations

import hashlib
import io
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.infra.transfer import ObjectChanged, Transfers, download, is_transient, upload

PART = 64


def refusal(code: str, status: int) -> ClientError:
    answer: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, "operation")


class Bucket:
    """The part of S3's client that transfers use, in memory; `cut` says before each request whether it fails."""

    def __init__(self) -> None:
        self.meta = SimpleNamespace(endpoint_url="memory")
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []
        self.cut: Any = lambda _: False
        self.before_get: Any = lambda: None

    def _request(self, operation: str) -> None:
        self.requests.append(operation)
        if self.cut(operation):
            raise EndpointConnectionError(endpoint_url="memory")

    def create_multipart_upload(self, **_: Any) -> dict[str, Any]:
        self._request("create")
        name = f"upload-{len(self.uploads)}"
        self.uploads[name] = {}
        return {"UploadId": name}

    def upload_part(self, *, UploadId: str, PartNumber: int, Body: bytes, **_: Any) -> dict[str, Any]:
        self._request("part")
        self.uploads[UploadId][PartNumber] = Body
        return {"ETag": hashlib.md5(Body).hexdigest()}

    def get_paginator(self, _: str) -> Any:
        def pages(*, UploadId: str, **_: Any) -> list[dict[str, Any]]:
            if UploadId not in self.uploads:
                raise refusal("NoSuchUpload", 404)
            found = self.uploads[UploadId].items()
            return [
                {"Parts": [{"PartNumber": n, "Size": len(d), "ETag": f'"{hashlib.md5(d).hexdigest()}"'}]}
                for n, d in found
            ]

        return SimpleNamespace(paginate=pages)

    def complete_multipart_upload(self, *, Key: str, UploadId: str, MultipartUpload: Any, **more: Any) -> None:
        self._request("complete")
        if UploadId not in self.uploads:
            raise refusal("NoSuchUpload", 404)
        if more.get("IfNoneMatch") and Key in self.objects:
            raise refusal("PreconditionFailed", 412)
        parts = self.uploads.pop(UploadId)
        self.objects[Key] = b"".join(parts[one["PartNumber"]] for one in MultipartUpload["Parts"])

    def abort_multipart_upload(self, *, UploadId: str, **_: Any) -> None:
        del self.uploads[UploadId]

    def head_object(self, *, Key: str, **_: Any) -> dict[str, Any]:
        self._request("head")
        return {"ContentLength": len(self.objects[Key]), "ETag": hashlib.md5(self.objects[Key]).hexdigest()}

    def get_object(self, *, Key: str, Range: str, IfMatch: str, **_: Any) -> dict[str, Any]:
        self.before_get()
        self._request("get")
        data = self.objects[Key]
        if hashlib.md5(data).hexdigest() != IfMatch:
            raise refusal("PreconditionFailed", 412)
        first, last = (int(one) for one in Range.removeprefix("bytes=").split("-"))
        short = 1 if self.cut("body") else 0
        return {"Body": io.BytesIO(data[first : last + 1 - short])}


@pytest.fixture
def transfers(tmp_path: Path) -> Transfers:
    return Transfers(part_bytes=PART, parallel=4, attempts=3, pause_s=0, journal=tmp_path / "journal")


def send(bucket: Any, path: Path, transfers: Transfers, *, if_absent: bool = False) -> int:
    moved: list[int] = []
    upload(bucket, "b", "k", path, transfers, if_absent=if_absent, moved=moved.append)
    return sum(moved)


def fetch(bucket: Any, path: Path, transfers: Transfers) -> int:
    moved: list[int] = []
    download(bucket, "b", "k", path, transfers, moved.append)
    return sum(moved)


@settings(max_examples=40, deadline=None)
@given(size=st.integers(PART + 1, 12 * PART), seed=st.integers(0, 1000), losses=st.floats(0, 0.5))
def test_any_losses_end_in_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, size: int, seed: int, losses: float
) -> None:
    folder, chance = tmp_path_factory.mktemp("transfer"), random.Random(seed)
    content = chance.randbytes(size)
    (folder / "file").write_bytes(content)
    bucket: Any = Bucket()
    bucket.cut = lambda _: chance.random() < losses
    # One attempt a part: every loss breaks the transfer off, and the next call goes on.
    transfers = Transfers(part_bytes=PART, parallel=3, attempts=1, journal=folder / "journal")

    def until_done(work: Any) -> int:
        for _ in range(1000):
            try:
                return int(work())
            except EndpointConnectionError:
                continue
            except Exception as error:
                if not is_transient(error):
                    raise
        raise AssertionError("it never ends")

    assert until_done(lambda: send(bucket, folder / "file", transfers)) == size
    assert bucket.objects["k"] == content
    assert until_done(lambda: fetch(bucket, folder / "back", transfers)) == size
    assert (folder / "back").read_bytes() == content
    assert {path.name for path in folder.iterdir()} == {"file", "back", "journal"}, "no partial file stays"


def test_what_was_sent_is_not_sent_again(tmp_path: Path, transfers: Transfers) -> None:
    path = tmp_path / "file"
    path.write_bytes(random.Random(1).randbytes(10 * PART))
    bucket: Any = Bucket()
    bucket.cut = lambda operation: operation == "complete"
    with pytest.raises(EndpointConnectionError):
        send(bucket, path, transfers)
    assert bucket.requests.count("part") == 10
    bucket.cut = lambda _: False
    # One part of the file is another by now: that one is sent, its old bytes are not kept.
    changed = bytearray(path.read_bytes())
    changed[3 * PART] ^= 1
    path.write_bytes(changed)
    send(bucket, path, transfers)
    assert bucket.requests.count("part") == 11
    assert bucket.requests.count("create") == 1
    assert bucket.objects["k"] == bytes(changed)


def test_an_upload_that_the_server_forgot_starts_anew(tmp_path: Path, transfers: Transfers) -> None:
    path = tmp_path / "file"
    path.write_bytes(random.Random(1).randbytes(3 * PART))
    bucket: Any = Bucket()
    bucket.cut = lambda operation: operation == "complete"
    with pytest.raises(EndpointConnectionError):
        send(bucket, path, transfers)
    bucket.cut = lambda _: False
    bucket.uploads.clear()
    send(bucket, path, transfers)
    assert bucket.objects["k"] == path.read_bytes()


def test_a_taken_key_is_not_written_and_leaves_no_parts(tmp_path: Path, transfers: Transfers) -> None:
    path = tmp_path / "file"
    path.write_bytes(random.Random(1).randbytes(3 * PART))
    bucket: Any = Bucket()
    bucket.objects["k"] = b"first"
    with pytest.raises(ClientError, match="PreconditionFailed"):
        send(bucket, path, transfers, if_absent=True)
    assert (bucket.objects["k"], bucket.uploads) == (b"first", {})


def test_two_versions_never_mix(tmp_path: Path, transfers: Transfers) -> None:
    old, new = (random.Random(seed).randbytes(6 * PART) for seed in (1, 2))
    bucket: Any = Bucket()
    bucket.objects["k"] = old
    fetched: list[int] = []

    def replace_once() -> None:
        fetched.append(1)
        if len(fetched) == 4:
            bucket.objects["k"] = new

    bucket.before_get = replace_once
    assert fetch(bucket, tmp_path / "file", transfers) == 6 * PART
    assert (tmp_path / "file").read_bytes() == new

    def replace_always() -> None:
        bucket.objects["k"] = random.randbytes(6 * PART)

    bucket.before_get = replace_always
    with pytest.raises(ObjectChanged, match="changed twice"):
        fetch(bucket, tmp_path / "other", transfers)


def test_ranges_of_another_version_are_not_used(tmp_path: Path, transfers: Transfers) -> None:
    bucket: Any = Bucket()
    bucket.objects["k"] = random.Random(1).randbytes(6 * PART)
    bucket.cut = lambda operation: operation == "get" and bucket.requests.count("get") > 3
    with pytest.raises(EndpointConnectionError):
        fetch(bucket, tmp_path / "file", transfers)
    bucket.cut = lambda _: False
    bucket.objects["k"] = random.Random(2).randbytes(6 * PART)
    fetch(bucket, tmp_path / "file", transfers)
    assert (tmp_path / "file").read_bytes() == bucket.objects["k"]


def test_a_part_is_tried_again_and_what_cannot_help_is_not(tmp_path: Path, transfers: Transfers) -> None:
    path = tmp_path / "file"
    path.write_bytes(random.Random(1).randbytes(3 * PART))
    bucket: Any = Bucket()
    bucket.cut = lambda operation: operation == "part" and bucket.requests.count("part") <= 2
    send(bucket, path, transfers)
    assert bucket.requests.count("part") == 5
    for code, status, helps in (("SlowDown", 503, True), ("BadDigest", 400, True), ("AccessDenied", 403, False)):
        assert is_transient(refusal(code, status)) is helps
    assert not is_transient(KeyError("a defect"))


def test_a_file_of_any_size_has_at_most_ten_thousand_parts() -> None:
    transfers = Transfers()
    assert transfers.part_size(50 * 10**9) == 16 * 2**20
    size = 5 * 10**12
    assert -(-size // transfers.part_size(size)) <= 10_000
