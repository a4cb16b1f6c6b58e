"""Artifacts: any flipped byte is found and named, unsafe content is refused, nothing moves twice."""

from __future__ import annotations

import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.infra.errors import InputError, IntegrityError, UnavailableError
from sluice.infra.object_store import ObjectMissing
from sluice.infra.transfer import Moved, ignore_moved
from sluice.provenance.artifacts import ArtifactStore, describe_directory, parse_manifest
from sluice.provenance.canonical import canonical_json, digest_bytes
from tests.support.directory_store import DirectoryStore


class CountingStore(DirectoryStore):
    """Counts what is written, so that a test can say that nothing was."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.uploads: list[str] = []

    def put_file(self, key: str, path: Path, *, if_absent: bool = False, moved: Moved = ignore_moved) -> None:
        self.uploads.append(key)
        super().put_file(key, path, if_absent=if_absent, moved=moved)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    (folder / "nested").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 8)
    (folder / "nested" / "config.json").write_text('{"r": 8}')
    return folder


def test_round_trip_keeps_bytes_and_metadata(artifacts: ArtifactStore, folder: Path) -> None:
    manifest = artifacts.put_directory(folder, "adapter", {"seed": 7})
    fetched = artifacts.fetch(manifest.digest)
    assert (fetched / "weights.bin").read_bytes() == (folder / "weights.bin").read_bytes()
    assert artifacts.read_file(manifest.digest, "nested/config.json") == b'{"r": 8}'
    assert artifacts.manifest(manifest.digest) == manifest
    assert manifest.size == 2048 + 8


def test_the_digest_depends_on_names_content_kind_and_metadata_only(folder: Path) -> None:
    first = describe_directory(folder, "adapter", {"seed": 7}).digest
    os.utime(folder / "weights.bin", (1, 1))
    assert describe_directory(folder, "adapter", {"seed": 7}).digest == first
    assert describe_directory(folder, "adapter", {"seed": 8}).digest != first
    assert describe_directory(folder, "model", {"seed": 7}).digest != first
    (folder / "weights.bin").rename(folder / "weights2.bin")
    assert describe_directory(folder, "adapter", {"seed": 7}).digest != first


def test_the_same_content_twice_moves_nothing(tmp_path: Path, folder: Path) -> None:
    objects = CountingStore(tmp_path / "counted")
    store = ArtifactStore(objects, tmp_path / "cache")
    (folder / "copy.bin").write_bytes((folder / "weights.bin").read_bytes())
    first = store.put_directory(folder, "adapter")
    assert len(objects.uploads) == 2, "three files, two contents"
    assert store.put_directory(folder, "adapter").digest == first.digest
    store.put_directory(folder, "adapter", {"another": "manifest"})
    assert len(objects.uploads) == 2


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_found_and_named(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as place:
        objects = DirectoryStore(Path(place) / "objects")
        manifest = ArtifactStore(objects, Path(place) / "a").put_files({"one.txt": b"first", "two.txt": b"second"}, "x")
        stored = sorted(info.key for info in objects.list(""))
        assert len(stored) == 3
        key = data.draw(st.sampled_from(stored))
        content = bytearray(objects.get(key))
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << (bit % 8)
        objects.put(key, bytes(content))
        with pytest.raises(IntegrityError) as raised:
            ArtifactStore(objects, Path(place) / "b").fetch(manifest.digest)
        hexadecimal = key.rsplit("/", 1)[1]
        damaged = next((e.path for e in manifest.files if e.digest.endswith(hexadecimal)), manifest.digest)
        assert damaged in str(raised.value)


def test_read_file_verifies_and_names_what_is_damaged_or_gone(
    artifacts: ArtifactStore, object_store: DirectoryStore
) -> None:
    manifest = artifacts.put_files({"card.json": b"{}"}, "dataset")
    key = f"blobs/sha256/{manifest.files[0].digest.removeprefix('sha256:')}"
    object_store.put(key, b"[]")
    with pytest.raises(IntegrityError, match=r"card\.json of artifact sha256:"):
        artifacts.read_file(manifest.digest, "card.json")
    object_store.delete(key)
    with pytest.raises(ObjectMissing, match=r"card\.json of artifact sha256:"):
        artifacts.read_file(manifest.digest, "card.json")
    with pytest.raises(ObjectMissing, match=r"card\.json of artifact sha256:"):
        artifacts.fetch(manifest.digest)
    with pytest.raises(InputError, match=r"no file 'other\.json'"):
        artifacts.read_file(manifest.digest, "other.json")
    assert not list((object_store.root.parent / "artifact-cache").glob(".fetch-*")), "a failed fetch leaves nothing"


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../up", "a/../../up", "", ".", "./a", "a//b", "a/", "back\\slash", "zero\0byte"]
)
def test_unsafe_paths_are_refused(artifacts: ArtifactStore, path: str) -> None:
    with pytest.raises(InputError, match="is not a path inside an artifact"):
        artifacts.put_files({path: b"x"}, "dataset")
    entry = {"path": path, "size": 1, "digest": digest_bytes(b"x")}
    manifest = canonical_json({"version": 1, "kind": "dataset", "files": [entry], "metadata": {}})
    with pytest.raises(IntegrityError, match="not an artifact manifest"):
        parse_manifest(manifest)


def test_a_file_inside_a_file_is_refused(artifacts: ArtifactStore) -> None:
    with pytest.raises(InputError, match=r"'a/b' lies inside another file"):
        artifacts.put_files({"a": b"x", "a/b": b"y"}, "dataset")


def test_links_pipes_and_empty_folders_are_refused(artifacts: ArtifactStore, folder: Path, tmp_path: Path) -> None:
    (folder / "link").symlink_to(folder / "weights.bin")
    with pytest.raises(InputError, match="link is a link"):
        artifacts.put_directory(folder, "adapter")
    (folder / "link").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(InputError, match="pipe is a device, a pipe or a socket"):
        artifacts.put_directory(folder, "adapter")
    (tmp_path / "empty" / "below").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no files"):
        artifacts.put_directory(tmp_path / "empty", "adapter")


def test_metadata_without_a_json_form_is_refused_before_anything_is_stored(
    artifacts: ArtifactStore, object_store: DirectoryStore
) -> None:
    with pytest.raises(InputError, match="no canonical JSON form"):
        artifacts.put_files({"a": b"x"}, "dataset", {"loss": float("nan")})
    assert list(object_store.list("")) == []


def test_a_file_that_changes_while_it_is_stored_is_refused_and_leaves_no_false_blob(
    tmp_path: Path, folder: Path
) -> None:
    class SlowStore(DirectoryStore):
        def put_file(self, key: str, path: Path, *, if_absent: bool = False, moved: Moved = ignore_moved) -> None:
            if path.name == "weights.bin" and path.stat().st_size == 2048:
                path.write_bytes(b"written too late")
            super().put_file(key, path, if_absent=if_absent, moved=moved)

    objects = SlowStore(tmp_path / "slow")
    original = digest_bytes((folder / "weights.bin").read_bytes())
    with pytest.raises(InputError, match=r"weights\.bin changed while it was being stored"):
        ArtifactStore(objects, tmp_path / "cache").put_directory(folder, "adapter")
    assert objects.head(f"blobs/sha256/{original.removeprefix('sha256:')}") is None
    assert list(objects.list("manifests/")) == []


@pytest.mark.parametrize("damage", ["changed", "missing", "added", "link"])
def test_a_damaged_cache_is_mended(artifacts: ArtifactStore, folder: Path, damage: str) -> None:
    manifest = artifacts.put_directory(folder, "adapter")
    cached = artifacts.fetch(manifest.digest)
    if damage == "changed":
        (cached / "weights.bin").write_bytes(b"other")
    elif damage == "added":
        (cached / "nested" / "extra.py").write_text("import os")
    else:
        (cached / "weights.bin").unlink()
        if damage == "link":
            (cached / "weights.bin").symlink_to(folder / "weights.bin")
    again = artifacts.fetch(manifest.digest)
    assert {p.relative_to(again).as_posix() for p in again.rglob("*")} == {
        "nested",
        "nested/config.json",
        "weights.bin",
    }
    assert describe_directory(again, "adapter").digest == manifest.digest


def test_a_truncated_blob_is_stored_again_from_its_source(
    artifacts: ArtifactStore, object_store: DirectoryStore, folder: Path
) -> None:
    manifest = artifacts.put_directory(folder, "adapter")
    weights = next(e for e in manifest.files if e.path == "weights.bin")
    object_store.put(f"blobs/sha256/{weights.digest.removeprefix('sha256:')}", b"short")
    artifacts.put_directory(folder, "adapter")
    assert artifacts.fetch(manifest.digest).is_dir()


def test_what_a_killed_fetch_left_is_swept_after_a_day(artifacts: ArtifactStore, folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "artifact-cache"
    old, fresh = cache / ".fetch-old", cache / ".fetch-fresh"
    for left in (old, fresh):
        left.mkdir(parents=True)
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    artifacts.fetch(artifacts.put_directory(folder, "adapter").digest)
    assert not old.exists()
    assert fresh.exists(), "another process may still be fetching into it"


class CutOff(DirectoryStore):
    """Breaks off after so many files, as a cut of the network or a kill does."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.left = 10**9
        self.fetched: list[str] = []

    def get_file(self, key: str, path: Path, *, moved: Moved = ignore_moved) -> None:
        if self.left == 0:
            raise UnavailableError("The cable was pulled.")
        self.left -= 1
        self.fetched.append(key)
        super().get_file(key, path, moved=moved)


def test_a_fetch_that_broke_off_goes_on_where_it_was(tmp_path: Path, folder: Path) -> None:
    objects = CutOff(tmp_path / "objects")
    digest = ArtifactStore(objects, tmp_path / "cache").put_directory(folder, "adapter").digest
    objects.left = 1
    with pytest.raises(UnavailableError, match="cable"):
        ArtifactStore(objects, tmp_path / "cache").fetch(digest)
    objects.left = 10**9
    fetched = ArtifactStore(objects, tmp_path / "cache").fetch(digest)
    assert describe_directory(fetched, "adapter").digest == digest
    assert len(objects.fetched) == len(set(objects.fetched)) == 2, "no file is moved twice"
    assert not list((tmp_path / "cache").glob(".fetch-*"))


def test_a_fetch_of_one_artifact_at_a_time(tmp_path: Path, folder: Path) -> None:
    objects = CutOff(tmp_path / "objects")
    digest = ArtifactStore(objects, tmp_path / "cache").put_directory(folder, "adapter").digest
    with ThreadPoolExecutor(6) as pool:
        stores = [ArtifactStore(objects, tmp_path / "cache") for _ in range(6)]
        places = set(pool.map(lambda store: store.fetch(digest), stores))
    assert len(places) == 1
    assert len(objects.fetched) == 2, "the others waited and used what it fetched"


def test_a_disk_without_room_is_told_before_anything_moves(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = CutOff(tmp_path / "objects")
    store = ArtifactStore(objects, tmp_path / "cache")
    digest = store.put_directory(folder, "adapter").digest
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=50 * 2**20))
    with pytest.raises(UnavailableError, match=r"adapter [0-9a-f]{12} needs 0\.00 GB more in .* has 0\.05 GB free"):
        store.fetch(digest)
    assert objects.fetched == []


def test_a_blob_that_may_be_collected_soon_is_written_again(tmp_path: Path, folder: Path) -> None:
    objects = CountingStore(tmp_path / "counted")
    store = ArtifactStore(objects, tmp_path / "cache")
    store.put_directory(folder, "adapter")
    for info in list(objects.list("")):
        os.utime(objects.root / info.key, (time.time() - 4 * 86400,) * 2)
    store.put_directory(folder, "adapter", {"new": 1})
    assert len(objects.uploads) == 4
    assert all(time.time() - info.modified < 60 for info in objects.list("blobs/"))


def test_a_manifest_in_another_form_than_the_canonical_is_refused(artifacts: ArtifactStore) -> None:
    manifest = artifacts.put_files({"a": b"x"}, "dataset")
    assert parse_manifest(canonical_json(manifest.to_json())) == manifest
    for changed in (
        json.dumps(manifest.to_json(), indent=1).encode(),
        canonical_json({**manifest.to_json(), "more": 1}),
        canonical_json({**manifest.to_json(), "version": 2}),
        b"[]",
        b"\xff",
    ):
        with pytest.raises(IntegrityError, match="not an artifact manifest"):
            parse_manifest(changed)


def test_progress_is_reported_in_bytes(artifacts: ArtifactStore, folder: Path) -> None:
    seen: list[tuple[float, float]] = []
    artifacts.put_directory(folder, "adapter", report=lambda done, total, _: seen.append((done, total)))
    completed, totals = zip(*seen, strict=True)
    assert completed[-1] == totals[-1] == 2056
    assert list(completed) == sorted(completed)


def test_a_blob_that_others_rely_on_survives_a_file_that_changes_while_it_is_stored(
    artifacts: ArtifactStore, object_store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "weights").write_bytes(b"weights")
    first = artifacts.put_directory(source, "adapter")
    # Old enough to be written again; and somebody writes to the file meanwhile.
    monkeypatch.setattr("sluice.provenance.artifacts.is_aging", lambda _: True)
    described = describe_directory

    def changing(folder: Path, kind: str, metadata: Any = None) -> Any:
        manifest = described(folder, kind, metadata)
        (folder / "weights").write_bytes(b"changed")
        return manifest

    monkeypatch.setattr("sluice.provenance.artifacts.describe_directory", changing)
    with pytest.raises(InputError, match="changed while it was being stored"):
        artifacts.put_directory(source, "adapter")
    assert artifacts.read_file(first.digest, "weights") == b"weights"
