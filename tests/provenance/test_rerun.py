"""Computing a recorded step again: nothing of the originals is touched, and what differs is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice.infra.errors import InputError
from sluice.infra.object_store import ObjectExists, ObjectMissing
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import digest_bytes
from sluice.provenance.rerun import Overlay, Rerunner
from sluice.provenance.step_records import StepKey, StepOutput
from sluice.provenance.steps import StepRunner
from tests.support.directory_store import DirectoryStore

CODE, OTHER_CODE = digest_bytes(b"code"), digest_bytes(b"other code")
INPUT, OTHER_INPUT = digest_bytes(b"input"), digest_bytes(b"other input")


def contents(store: DirectoryStore) -> dict[str, bytes]:
    return {info.key: store.get(info.key) for info in store.list("")}


def test_overlay_reads_below_and_writes_beside(object_store: DirectoryStore, tmp_path: Path) -> None:
    object_store.put("a/1", b"one")
    object_store.put("secret/1", b"hidden")
    before = contents(object_store)
    overlay = Overlay(object_store, tmp_path / "over", hidden=("secret/",))
    overlay.put("a/2", b"two", if_absent=True)
    overlay.put("a/1", b"changed")
    (tmp_path / "file").write_bytes(b"three")
    overlay.put_file("a/3", tmp_path / "file")
    assert [overlay.get(f"a/{n}") for n in (1, 2, 3)] == [b"changed", b"two", b"three"]
    assert [info.key for info in overlay.list("")] == ["a/1", "a/2", "a/3"]
    assert overlay.head("secret/1") is None
    with pytest.raises(ObjectMissing):
        overlay.get("secret/1")
    with pytest.raises(ObjectExists):
        overlay.put("a/2", b"again", if_absent=True)
    overlay.get_file("a/1", tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == b"changed"
    overlay.delete("a/1")
    assert overlay.get("a/1") == b"one"
    assert contents(object_store) == before


def test_rerun_computes_what_was_recorded_and_records_nothing(
    runner: StepRunner, artifacts: ArtifactStore, object_store: DirectoryStore, tmp_path: Path
) -> None:
    key = StepKey("make", CODE, {"seed": 1}, {"in": INPUT})
    record, _ = runner.run(key, lambda _: StepOutput({"out": artifacts.put_files({"a": b"1"}, "thing").digest}))
    before = contents(object_store)
    scratch = ArtifactStore(Overlay(object_store, tmp_path / "over"), tmp_path / "cache")
    for content, same in ((b"1", True), (b"2", False)):
        again = Rerunner(record, tmp_path / "again")

        def make(_: Path, content: bytes = content) -> StepOutput:
            return StepOutput({"out": scratch.put_files({"a": content}, "thing").digest})

        found, hit = again.run(StepKey("make", OTHER_CODE, {"seed": 1}, {"in": INPUT}), make)
        assert not hit
        assert again.rerun is not None
        assert again.rerun.key.code == OTHER_CODE
        assert (found.output.artifacts == record.output.artifacts) is same
        assert scratch.read_file(found.output.artifacts["out"], "a") == content
    assert contents(object_store) == before


def test_a_step_that_is_another_one_by_now_is_not_run(runner: StepRunner, tmp_path: Path) -> None:
    record, _ = runner.run(StepKey("make", CODE, {"settle_s": 5}, {"in": INPUT}), lambda _: StepOutput({}, {"n": 1}))
    ran: list[Path] = []

    def make(folder: Path) -> StepOutput:
        ran.append(folder)
        return StepOutput()

    with pytest.raises(InputError, match="settle_s was 5, is 10"):
        Rerunner(record, tmp_path).run(StepKey("make", CODE, {"settle_s": 10}, {"in": INPUT}), make)
    with pytest.raises(InputError, match="input in was"):
        Rerunner(record, tmp_path).run(StepKey("make", CODE, {"settle_s": 5}, {"in": OTHER_INPUT}), make)
    assert ran == []
    instead = Rerunner(record, tmp_path, {INPUT: OTHER_INPUT})
    instead.run(StepKey("make", CODE, {"settle_s": 5}, {"in": OTHER_INPUT}), make)
    assert len(ran) == 1
