"""A checkpoint as files: what it holds, how it is verified, and the sentences for what may be wrong with it."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from sluice.infra.errors import IntegrityError, SluiceError
from sluice.provenance.canonical import Json, canonical_json, digest_bytes, digest_file, digest_json
from sluice.provenance.manifest import FileEntry, parse_manifest

MANIFEST = "MANIFEST.json"
MARKER = "COMPLETE"
_NAME = re.compile(r"^step_(\d{8,})$")
_HASHING_THREADS = min(16, os.cpu_count() or 1)


class CheckpointFailed(SluiceError):
    """A checkpoint could not be saved; the older ones are untouched. `needed` and `free` are bytes, 0 for unknown."""

    exit_code = 3

    def __init__(self, message: str, *, path: str = "", needed: int = 0, free: int = 0, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.path, self.needed, self.free = path, needed, free


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint. `created` in seconds since the epoch; `digest` is its manifest's."""

    step: int
    folder: Path
    created: float
    world_size: int
    validation_loss: float | None
    details: dict[str, Json]
    files: tuple[FileEntry, ...]
    digest: str

    @property
    def size(self) -> int:
        """Bytes of all files but manifest and marker."""
        return sum(entry.size for entry in self.files)


def write_failure(error: OSError, path: Path, needed: int, free: int) -> CheckpointFailed:
    """The sentence for a write that the system refused. `needed` and `free` in bytes."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    cause = "the disk is full" if full else (error.strerror or str(error)).lower()
    room = f" ({in_words(needed)} needed, {in_words(free)} free)" if full else ""
    return CheckpointFailed(
        f"{str(path)!r} cannot be written: {cause}{room}.",
        path=str(path),
        needed=needed,
        free=free,
        hint="Free some space, or keep fewer checkpoints (checkpoints.keep_last)."
        if full
        else "Is the folder's disk still there, and writable?",
    )


def verified(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, every byte verified. Raises `IntegrityError` naming the file and what is wrong."""
    checkpoint = read_checkpoint(folder)
    require_bytes(checkpoint)
    return checkpoint


def manifest_of(checkpoint: Checkpoint) -> bytes:
    """The manifest's bytes as they were published. Raises `IntegrityError`."""
    data = _content(checkpoint.folder / MANIFEST)
    _require_named(data, checkpoint.digest)
    return data


def marker_of(digest: str, validation_loss: float | None) -> bytes:
    """A marker's bytes: the manifest's digest, the loss (None unless finite), and a digest of the two."""
    loss = validation_loss if validation_loss is not None and math.isfinite(validation_loss) else None
    content: dict[str, Json] = {"manifest": digest, "validation_loss": loss}
    return canonical_json({**content, "digest": digest_json(content)})


def read_marker(data: bytes) -> tuple[str, float | None]:
    """The manifest's digest and the validation loss in a marker. Raises `IntegrityError`."""
    try:
        content = json.loads(data)
        if content.pop("digest") != digest_json(content):
            raise ValueError("wrong digest")
        return content["manifest"], content["validation_loss"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{MARKER} cannot be read: {error}.") from error


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint that marker and manifest describe. Raises `IntegrityError`."""
    if not (folder / MARKER).exists():
        raise IntegrityError(f"It has no file {MARKER}: its save was interrupted, or the file is lost.")
    digest, loss = read_marker(_content(folder / MARKER))
    data = _content(folder / MANIFEST)
    _require_named(data, digest)
    checkpoint = described(folder, data, loss)
    if folder.name != folder_name(checkpoint.step):
        raise IntegrityError(f"{MANIFEST} is of step {checkpoint.step}.")
    return checkpoint


def described(folder: Path, manifest: bytes, validation_loss: float | None) -> Checkpoint:
    """The checkpoint of a manifest's bytes, its files in `folder`. Raises `IntegrityError`."""
    read = parse_manifest(manifest)
    facts = read.metadata
    try:
        return Checkpoint(
            step=int(facts["step"]),
            folder=folder,
            created=float(facts["created"]),
            world_size=int(facts["world_size"]),
            validation_loss=validation_loss,
            details=json.loads(facts["details"]),
            files=read.files,
            digest=digest_bytes(manifest),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{MANIFEST} is not of a checkpoint: {error}.") from error


def require_sizes(checkpoint: Checkpoint) -> None:
    """Raise `IntegrityError` naming a file that is missing or of another size."""
    for entry in checkpoint.files:
        path = checkpoint.folder / entry.path
        if not path.is_file():
            raise IntegrityError(f"{entry.path} is missing.")
        if (size := path.stat().st_size) != entry.size:
            raise IntegrityError(f"{entry.path} has {size} bytes where {entry.size} were written.")


def require_bytes(checkpoint: Checkpoint) -> None:
    """Raise `IntegrityError` naming a file that is missing, other than was written, or one too many."""
    require_sizes(checkpoint)
    known = {entry.path for entry in checkpoint.files} | {MANIFEST, MARKER}
    if extra := sorted(path.name for path in checkpoint.folder.iterdir() if path.name not in known):
        raise IntegrityError(f"{extra[0]} does not belong to it.")
    for entry, digest in zip(checkpoint.files, digests_of(checkpoint.folder, checkpoint.files), strict=True):
        if digest != entry.digest:
            raise IntegrityError(f"{entry.path} does not hold the bytes that were written.")


def entries_of(folder: Path) -> tuple[FileEntry, ...]:
    """Size and digest of each file in a folder, by name."""
    paths = sorted(folder.iterdir())
    bare = [FileEntry(path.name, path.stat().st_size, "") for path in paths]
    return tuple(replace(entry, digest=digest) for entry, digest in zip(bare, digests_of(folder, bare), strict=True))


def digests_of(folder: Path, entries: Sequence[FileEntry]) -> list[str]:
    """The files' digests as they are now, several read at once. Raises `IntegrityError` for one that cannot be read."""

    def digest(entry: FileEntry) -> str:
        try:
            return digest_file(folder / entry.path)
        except OSError as error:
            raise IntegrityError(f"{entry.path} cannot be read: {error.strerror}.") from error

    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        return list(pool.map(digest, entries))


def write_flushed(path: Path, data: bytes) -> None:
    """Write a file and bring it to the disk."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def flush(path: Path, *, forget: bool = False) -> None:
    """Bring a file or a folder to the disk; with `forget` the next read comes from there and not from memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if forget:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as that is possible."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def folder_name(step: int) -> str:
    """`step_00000010`."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name; -1 for another name."""
    found = _NAME.match(folder.name)
    return int(found[1]) if found else -1


def in_words(count: float) -> str:
    """A number of bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _require_named(manifest: bytes, digest: str) -> None:
    if digest_bytes(manifest) != digest:
        raise IntegrityError(f"{MANIFEST} is not the one that {MARKER} names.")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"{path.name} cannot be read: {error.strerror}.") from error
