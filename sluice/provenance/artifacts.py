"""Artifacts: folders of files, stored write-once under the digest of their manifest and verified on every read.

Layout in the object store: `blobs/sha256/<hex>` holds a file's bytes, `manifests/sha256/<hex>` the canonical manifest.
A file that two artifacts share is stored once. A manifest is written after all its blobs, so one that can be read
is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from sluice.infra.errors import InputError, IntegrityError
from sluice.infra.object_store import ObjectExists, ObjectMissing, ObjectStore
from sluice.provenance.canonical import Json, canonical_json, digest_bytes, digest_file, digest_json, hex_of

MANIFEST_VERSION = 1


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: relative POSIX path, size in bytes, digest of its bytes."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What an artifact is: its kind (a noun, as `dataset`), its files in path order, and metadata (JSON)."""

    kind: str
    files: tuple[FileEntry, ...]
    metadata: Mapping[str, Json] = field(default_factory=dict)

    def to_json(self) -> Json:
        return {
            "version": MANIFEST_VERSION,
            "kind": self.kind,
            "files": [{"path": f.path, "size": f.size, "digest": f.digest} for f in self.files],
            "metadata": dict(self.metadata),
        }

    @property
    def digest(self) -> str:
        """The artifact's identity: digest of the canonical manifest."""
        return digest_json(self.to_json())

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files)


def parse_manifest(data: bytes) -> Manifest:
    """The manifest in canonical bytes. Raises `IntegrityError` when it is not one."""
    try:
        raw = json.loads(data)
        if raw["version"] != MANIFEST_VERSION:
            raise ValueError(f"unknown manifest version {raw['version']!r}")
        files = tuple(FileEntry(f["path"], f["size"], f["digest"]) for f in raw["files"])
        for entry in files:
            _require_safe(entry.path)
        return Manifest(raw["kind"], files, raw["metadata"])
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"These bytes are not an artifact manifest: {error}.") from error


def describe_directory(folder: Path, kind: str, metadata: Mapping[str, Json] | None = None) -> Manifest:
    """The manifest of a folder's files. Links and empty folders are refused: they have no bytes to verify."""
    files = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise InputError(f"{path} is a link; an artifact holds plain files only.")
        if path.is_file():
            relative = path.relative_to(folder).as_posix()
            files.append(FileEntry(relative, path.stat().st_size, digest_file(path)))
    if not files:
        raise InputError(f"The folder {folder} holds no files; an artifact of kind {kind!r} needs at least one.")
    return Manifest(kind, tuple(sorted(files, key=lambda f: f.path)), dict(metadata or {}))


class ArtifactStore:
    """Puts and fetches artifacts. `cache` is a local folder that holds fetched artifacts by digest."""

    def __init__(self, objects: ObjectStore, cache: Path) -> None:
        self._objects = objects
        self._cache = cache

    def put_directory(self, folder: Path, kind: str, metadata: Mapping[str, Json] | None = None) -> Manifest:
        """Store a folder. The same content twice is success and moves nothing."""
        manifest = describe_directory(folder, kind, metadata)
        for entry in manifest.files:
            key = _blob_key(entry.digest)
            # A blob's key is its content, so a second writer writes the same bytes: no condition is needed, and an
            # upload that broke off left nothing visible.
            if self._objects.head(key) is None:
                self._objects.put_file(key, folder / entry.path)
        self._put_manifest(manifest)
        return manifest

    def put_files(self, files: Mapping[str, bytes], kind: str, metadata: Mapping[str, Json] | None = None) -> Manifest:
        """Store small files given as bytes by relative path."""
        with tempfile.TemporaryDirectory() as folder:
            for name, data in files.items():
                target = Path(folder) / _require_safe(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
            return self.put_directory(Path(folder), kind, metadata)

    def exists(self, digest: str) -> bool:
        """Whether the artifact's manifest is stored."""
        return self._objects.head(_manifest_key(digest)) is not None

    def manifest(self, digest: str) -> Manifest:
        """The verified manifest. Raises `ObjectMissing` or `IntegrityError`."""
        try:
            data = self._objects.get(_manifest_key(digest))
        except ObjectMissing as error:
            raise ObjectMissing(
                f"There is no artifact {digest}.", hint="Was it made in another object store, or collected?"
            ) from error
        if digest_bytes(data) != digest:
            raise IntegrityError(f"The manifest stored for {digest} has the digest {digest_bytes(data)}.")
        return parse_manifest(data)

    def fetch(self, digest: str) -> Path:
        """A local folder with the artifact's files, every byte verified, cached by digest. Do not write into it.

        Raises `IntegrityError` naming the first file that is not what the manifest says.
        """
        manifest = self.manifest(digest)
        target = self._cache / hex_of(digest)
        if target.is_dir():
            try:
                _verify(target, manifest)
                return target
            except IntegrityError:
                # The cache is only a copy: drop the damaged one and fetch it again.
                shutil.rmtree(target, ignore_errors=True)
        self._cache.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".fetch-", dir=self._cache))
        try:
            for entry in manifest.files:
                self._objects.get_file(_blob_key(entry.digest), staging / entry.path)
            _verify(staging, manifest)
            try:
                os.rename(staging, target)
            except OSError:
                # Another process fetched the same digest first; its copy was verified the same way.
                if not target.is_dir():
                    raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return target

    def read_file(self, digest: str, path: str) -> bytes:
        """The verified bytes of one file of an artifact."""
        for entry in self.manifest(digest).files:
            if entry.path == path:
                data = self._objects.get(_blob_key(entry.digest))
                if digest_bytes(data) != entry.digest:
                    raise IntegrityError(f"{path} of artifact {digest} is damaged: {digest_bytes(data)}.")
                return data
        raise InputError(f"The artifact {digest} holds no file {path!r}.")

    def _put_manifest(self, manifest: Manifest) -> None:
        # ObjectExists is success: the key is the content's digest.
        try:
            self._objects.put(_manifest_key(manifest.digest), canonical_json(manifest.to_json()), if_absent=True)
        except ObjectExists:
            pass


def _verify(folder: Path, manifest: Manifest) -> None:
    for entry in manifest.files:
        path = folder / entry.path
        if not path.is_file():
            raise IntegrityError(f"{entry.path} of artifact {manifest.digest} is missing in {folder}.")
        found = digest_file(path)
        if found != entry.digest:
            raise IntegrityError(f"{entry.path} of artifact {manifest.digest} is damaged: its digest is {found}.")


def _require_safe(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\\" in path:
        raise InputError(f"{path!r} is not a path inside an artifact.")
    return path


def _blob_key(digest: str) -> str:
    return f"blobs/sha256/{hex_of(digest)}"


def _manifest_key(digest: str) -> str:
    return f"manifests/sha256/{hex_of(digest)}"
