"""Garbage collection on a real SeaweedFS: its listing, its times and its deletions are what the collector counts on."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from sluice.infra.object_store import S3ObjectStore
from sluice.infra.settings import ObjectStoreSettings
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.attestation import Signer
from sluice.provenance.canonical import digest_bytes
from sluice.provenance.collect import Collector
from sluice.provenance.roots import Roots
from sluice.provenance.steps import StepKey, StepOutput, StepRunner
from tests.integration.test_provenance_s3 import store as store

pytestmark = pytest.mark.integration


def test_what_is_unreachable_goes_and_the_rest_can_be_read(
    store: ObjectStoreSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seven days are long for a test.
    for module in ("collect", "collecting"):
        monkeypatch.setattr(f"sluice.provenance.{module}.GRACE_S", 2.0)
    objects = S3ObjectStore(store)
    artifacts = ArtifactStore(objects, tmp_path / "cache")
    runner = StepRunner(objects, artifacts, Signer.load_or_create(tmp_path / "key.pem"), tmp_path / "work")
    dataset = artifacts.put_files({"data": b"1", "shared": b"s"}, "dataset").digest
    key = StepKey("train", digest_bytes(b"code"), {}, {"dataset": dataset})
    record, _ = runner.run(key, lambda _: StepOutput({"adapter": artifacts.put_files({"w": b"2"}, "adapter").digest}))
    adapter = record.output.artifacts["adapter"]
    unwanted = artifacts.put_files({"data": b"3", "shared": b"s"}, "dataset").digest
    used_again = artifacts.put_files({"data": b"4"}, "dataset").digest
    time.sleep(4)
    collector = Collector(objects, artifacts, lambda: Roots({adapter: "live"}), grace_s=2.0)
    plan = collector.plan()
    assert {one.digest for one in plan.artifacts} == {unwanted, used_again}
    assert artifacts.put_files({"data": b"4"}, "dataset").digest == used_again
    done = collector.delete(plan.digest)
    assert (done.artifacts, done.blobs) == (1, 1)
    assert done.spared["written within the grace"] == 1
    assert not artifacts.exists(unwanted)
    for digest in (dataset, adapter, used_again):
        artifacts.fetch(digest)
    assert list(objects.list("collecting/")) == []
    assert list(objects.list("leases/")) == []
