"""The manifest: what an artifact is, in canonical bytes whose digest is the artifact's identity."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from sluice.infra.errors import InputError, IntegrityError
from sluice.provenance.canonical import Json, canonical_json, digest_file, digest_json, require_digest

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
            require_safe(entry.path)
            require_digest(entry.digest, entry.path)
        manifest = Manifest(raw["kind"], files, raw["metadata"])
        # Whatever this form does not keep (a field too many, another order) would be a second name for the content.
        if canonical_json(manifest.to_json()) != data:
            raise ValueError("they are not in canonical form")
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError, InputError) as error:
        raise IntegrityError(f"These bytes are not an artifact manifest: {error}.") from error


def describe_directory(folder: Path, kind: str, metadata: Mapping[str, Json] | None = None) -> Manifest:
    """The manifest of a folder's files, in path order.

    Raises `InputError` for a link, a device or a pipe (they have no bytes to verify), a name that is no safe path, a
    folder without files, and metadata that JSON cannot hold.
    """
    canonical_json(dict(metadata or {}))
    files = []
    for path in _walk(folder):
        relative = require_safe(path.relative_to(folder).as_posix())
        files.append(FileEntry(relative, path.stat().st_size, digest_file(path)))
    if not files:
        raise InputError(f"The folder {folder} holds no files; an artifact of kind {kind!r} needs at least one.")
    return Manifest(kind, tuple(sorted(files, key=lambda f: f.path)), dict(metadata or {}))


def require_safe(path: str) -> str:
    """`path` itself when it is a plain relative POSIX path; else `InputError` naming it."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\\" in path or "\0" in path or str(pure) != path:
        raise InputError(f"{path!r} is not a path inside an artifact.")
    return path


def _walk(folder: Path) -> Iterable[Path]:
    """The plain files below a folder, in path order. Raises `InputError` for anything that is no file or folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise InputError(f"{path} is a link; an artifact holds plain files only.")
        if path.is_file():
            yield path
        elif not path.is_dir():
            raise InputError(f"{path} is a device, a pipe or a socket; an artifact holds plain files only.")
