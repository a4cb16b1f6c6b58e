"""Transfers over a real SeaweedFS: resumed after kill -9 in both directions, write-once for files in parts."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from sluice.infra.object_store import ObjectExists, S3ObjectStore
from sluice.infra.settings import ObjectStoreSettings
from sluice.infra.transfer import Transfers
from sluice.provenance.artifacts import ArtifactStore
from tests.integration.test_provenance_s3 import store as store

pytestmark = pytest.mark.integration

# The least that S3 takes.
PART = 5 * 2**20
PARTS = 12


def settings_of(folder: Path) -> Transfers:
    return Transfers(part_bytes=PART, parallel=4, journal=folder / "journal")


def large_file(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(PARTS * PART + 17))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def slowed(server: ObjectStoreSettings, folder: Path, moved: Any) -> S3ObjectStore:
    """A store whose every part takes a while, so that a kill hits the middle; it counts parts that were moved."""
    objects = S3ObjectStore(server, settings_of(folder))

    def slow(**_: Any) -> None:
        time.sleep(0.1)
        with moved.get_lock():
            moved.value += 1

    for operation in ("UploadPart", "GetObject"):
        objects.client.meta.events.register(f"before-call.s3.{operation}", slow)
    return objects


def put(server: ObjectStoreSettings, folder: Path, moved: Any) -> None:
    slowed(server, folder, moved).put_file("large", folder / "file", if_absent=True)


def fetch(server: ObjectStoreSettings, folder: Path, digest: str, moved: Any) -> None:
    ArtifactStore(slowed(server, folder, moved), folder / "cache").fetch(digest)


def kill_in_the_middle(work: Any, *arguments: Any) -> int:
    """Run `work` in a process, kill it after a third of the parts; how many it had begun."""
    context = multiprocessing.get_context("spawn")
    moved = context.Value("i", 0)
    process = context.Process(target=work, args=(*arguments, moved))
    process.start()
    deadline = time.monotonic() + 60
    while moved.value < PARTS // 3:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    return int(moved.value)


def test_an_upload_goes_on_after_kill_9(store: ObjectStoreSettings, tmp_path: Path) -> None:
    digest = large_file(tmp_path / "file")
    begun = kill_in_the_middle(put, store, tmp_path)
    plain = S3ObjectStore(store, settings_of(tmp_path))
    assert plain.head("large") is None, "whole or not at all"
    rest = multiprocessing.Value("i", 0)
    put(store, tmp_path, rest)
    assert rest.value <= PARTS + 1 - begun + 4, "at most the parts that were on their way are sent again"
    assert hashlib.sha256(plain.get("large")).hexdigest() == digest
    with pytest.raises(ObjectExists):
        put(store, tmp_path, rest)
    assert plain.abort_stale_uploads(0) == []


def test_the_server_refuses_a_second_completion(
    store: ObjectStoreSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What SeaweedFS does with `If-None-Match` on CompleteMultipartUpload: as Amazon S3, it refuses."""
    objects = S3ObjectStore(store, settings_of(tmp_path))
    large_file(tmp_path / "file")
    objects.put("taken", b"first")
    head = objects.head
    answers = iter([None])
    # The look before the upload comes too early, as in a race.
    monkeypatch.setattr(objects, "head", lambda key: next(answers, head(key)))
    with pytest.raises(ObjectExists):
        objects.put_file("taken", tmp_path / "file", if_absent=True)
    assert objects.get("taken") == b"first"
    assert objects.abort_stale_uploads(0) == [], "its parts are gone"


def test_a_fetch_goes_on_after_kill_9(store: ObjectStoreSettings, tmp_path: Path) -> None:
    large_file(tmp_path / "model" / "weights")
    objects = S3ObjectStore(store, settings_of(tmp_path))
    manifest = ArtifactStore(objects, tmp_path / "other").put_directory(tmp_path / "model", "base-model")
    begun = kill_in_the_middle(fetch, store, tmp_path, manifest.digest)
    rest = multiprocessing.Value("i", 0)
    fetch(store, tmp_path, manifest.digest, rest)
    # One more request reads the manifest.
    assert rest.value <= PARTS + 2 - begun + 5
    fetched = tmp_path / "cache" / manifest.digest.removeprefix("sha256:")
    assert [path.name for path in fetched.iterdir()] == ["weights"]


def test_stale_uploads_are_listed_and_aborted(store: ObjectStoreSettings, tmp_path: Path) -> None:
    objects = S3ObjectStore(store, settings_of(tmp_path))
    begun = objects.client.create_multipart_upload(Bucket=objects.bucket, Key="broken")
    assert begun["UploadId"]
    assert objects.abort_stale_uploads(3600) == []
    assert objects.abort_stale_uploads(0, dry_run=True) == ["broken"]
    assert objects.abort_stale_uploads(0) == ["broken"]
    assert objects.abort_stale_uploads(0) == []
