"""Copies of checkpoints in a real SeaweedFS: an uploading process killed with -9, run again, fetched elsewhere."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from sluice.infra.object_store import S3ObjectStore
from sluice.infra.settings import ObjectStoreSettings
from sluice.infra.transfer import Transfers
from sluice.training.checkpoint_mirror import CheckpointMirror
from sluice.training.checkpoint_store import CheckpointStore
from sluice.training.recipe_sections import CheckpointSection
from tests.integration.test_provenance_s3 import store as store

pytestmark = pytest.mark.integration
PART = 5 * 2**20
PREFIX = "training/run/checkpoints"


def mirror_of(server: ObjectStoreSettings, folder: Path, counted: Any = None) -> CheckpointMirror:
    """A mirror whose uploads go on after a kill; with `counted` each request takes a while and is counted."""
    objects = S3ObjectStore(server, Transfers(part_bytes=PART, parallel=2, journal=folder / "journal"))

    def slow(**_: Any) -> None:
        time.sleep(0.05)
        with counted.get_lock():
            counted.value += 1

    if counted is not None:
        for operation in ("UploadPart", "PutObject"):
            objects.client.meta.events.register(f"before-call.s3.{operation}", slow)
    return CheckpointMirror(objects, PREFIX)


def upload(server: ObjectStoreSettings, folder: Path, counted: Any) -> None:
    checkpoints = CheckpointStore(folder / "checkpoints", CheckpointSection(), print)
    mirror_of(server, folder, counted).upload(checkpoints.complete()[-1])


def test_a_killed_upload_goes_on_and_is_the_same_elsewhere(store: ObjectStoreSettings, tmp_path: Path) -> None:
    here = CheckpointStore(tmp_path / "checkpoints", CheckpointSection(), print)
    staging = here.staging(10)
    for name in ("__0_0.distcp", "__1_0.distcp"):
        (staging / name).write_bytes(os.urandom(4 * PART + 17))
    (staging / ".metadata").write_bytes(b"index")
    saved = here.publish(10, details={"step": 10}, validation_loss=0.5, world_size=2)

    # Two files of five parts, a small one, the manifest, the marker.
    requests = 2 * 5 + 3
    context = multiprocessing.get_context("spawn")
    begun = context.Value("i", 0)
    process = context.Process(target=upload, args=(store, tmp_path, begun))
    process.start()
    deadline = time.monotonic() + 60
    while begun.value < 6:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    there = CheckpointStore(tmp_path / "there", CheckpointSection(), print)
    assert mirror_of(store, tmp_path).restore(there) is None, "whole or not at all"

    rest = context.Value("i", 0)
    upload(store, tmp_path, rest)
    assert rest.value <= requests - begun.value + 4, "what was on its way is sent again, and no more"
    fetched = mirror_of(store, tmp_path / "elsewhere").restore(there)
    assert fetched is not None
    assert (fetched.digest, fetched.details, fetched.validation_loss) == (saved.digest, {"step": 10}, 0.5)
    for path in saved.folder.iterdir():
        assert (fetched.folder / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in there.folder.iterdir()) == ["step_00000010"]
