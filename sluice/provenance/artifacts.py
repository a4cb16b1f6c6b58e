"""Artifacts: folders of files, stored write-once under the digest of their manifest and verified on every read.

Layout in the object store: `blobs/sha256/<hex>` holds a file's bytes, `manifests/sha256/<hex>` the canonical manifest.
A file that two artifacts share is stored once. A manifest is written after all its blobs, so one that can be read
is complete.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath

from sluice.infra.errors import InputError, IntegrityError, UnavailableError
from sluice.infra.file_lock import held, held_if_free
from sluice.infra.object_store import ObjectExists, ObjectMissing, ObjectStore
from sluice.infra.progress import Report, no_report
from sluice.infra.transfer import Moved
from sluice.provenance.canonical import Json, canonical_json, digest_bytes, digest_file, hex_of, short
from sluice.provenance.collecting import is_aging, wait_for_collector
from sluice.provenance.manifest import FileEntry, Manifest, describe_directory, parse_manifest, require_safe

__all__ = ["ArtifactStore", "FileEntry", "Manifest", "describe_directory", "parse_manifest"]

TRANSFERS = 4
"""Files moved at once. A large file is moved in parallel parts besides, so a few are enough."""
ABANDONED_S = 24 * 3600.0
"""Age in seconds after which a half-fetched folder that nobody goes on with is removed."""
FREE_BYTES = 64 * 2**20
"""What a fetch leaves free on the disk."""


class ArtifactStore:
    """Puts and fetches artifacts. `cache` is a local folder that holds fetched artifacts by digest."""

    def __init__(self, objects: ObjectStore, cache: Path) -> None:
        self._objects = objects
        self._cache = cache

    def put_directory(
        self, folder: Path, kind: str, metadata: Mapping[str, Json] | None = None, report: Report = no_report
    ) -> Manifest:
        """Store a folder. The same content twice is success and moves nothing. Reports bytes.

        Raises `InputError` when a file changes while it is being stored.
        """
        manifest = describe_directory(folder, kind, metadata)
        # One blob for each content: two equal files are one upload.
        entries = {entry.digest: entry for entry in manifest.files}.values()
        while True:
            _transfer(partial(self._put_blob, folder), entries, report)
            self._put_manifest(manifest)
            # After the manifest: from here on a collector sees it. One that had begun before may have taken a part.
            if not wait_for_collector(self._objects, (manifest.digest, *(entry.digest for entry in entries))):
                return manifest

    def put_files(self, files: Mapping[str, bytes], kind: str, metadata: Mapping[str, Json] | None = None) -> Manifest:
        """Store small files given as bytes by relative path."""
        with tempfile.TemporaryDirectory() as folder:
            for name, data in sorted(files.items()):
                target = Path(folder) / require_safe(name)
                if any((Path(folder) / parent).is_file() for parent in PurePosixPath(name).parents):
                    raise InputError(f"{name!r} lies inside another file of the same artifact.")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
            return self.put_directory(Path(folder), kind, metadata)

    def exists(self, digest: str) -> bool:
        """Whether the artifact's manifest is stored."""
        return self._objects.head(manifest_key(digest)) is not None

    def manifest(self, digest: str) -> Manifest:
        """The verified manifest. Raises `ObjectMissing` or `IntegrityError`."""
        try:
            data = self._objects.get(manifest_key(digest))
        except ObjectMissing as error:
            raise ObjectMissing(
                f"There is no artifact {digest}.", hint="Was it made in another object store, or collected?"
            ) from error
        if digest_bytes(data) != digest:
            raise IntegrityError(f"The manifest stored for {digest} has the digest {digest_bytes(data)}.")
        return parse_manifest(data)

    def fetch(self, digest: str, report: Report = no_report) -> Path:
        """A local folder with the artifact's files, every byte verified, cached by digest. Do not write into it.

        Reports bytes. A fetch that broke off, by a kill too, goes on where it was, in this process or another one.
        Raises `ObjectMissing` when the artifact or a file of it is gone, `IntegrityError` naming the file that is not
        what the manifest says, `UnavailableError` when the disk has not enough room.
        """
        manifest = self.manifest(digest)
        target = self._cache / hex_of(digest)
        self._cache.mkdir(parents=True, exist_ok=True)
        if self._cached(target, manifest):
            return target
        with held(self._lock(target.name), lambda: report(0, 0, "waiting for another process that fetches the same")):
            if self._cached(target, manifest):
                return target
            self._sweep()
            staging = self._cache / f".fetch-{target.name}"
            staging.mkdir(exist_ok=True)
            # The sweeper goes by this time; a fetch may have been broken off yesterday and go on today.
            os.utime(staging)
            try:
                self._require_room(manifest, staging)
                _transfer(partial(self._get_blob, digest, staging), manifest.files, report)
                _verify(staging, manifest)
            except (ObjectMissing, IntegrityError):
                shutil.rmtree(staging, ignore_errors=True)
                raise
            os.rename(staging, target)
        return target

    def read_file(self, digest: str, path: str) -> bytes:
        """The verified bytes of one file of an artifact."""
        for entry in self.manifest(digest).files:
            if entry.path == path:
                try:
                    data = self._objects.get(blob_key(entry.digest))
                except ObjectMissing as error:
                    raise _file_gone(digest, entry) from error
                if digest_bytes(data) != entry.digest:
                    raise IntegrityError(f"{path} of artifact {digest} is damaged: its digest is {digest_bytes(data)}.")
                return data
        raise InputError(f"The artifact {digest} holds no file {path!r}.")

    def _put_blob(self, folder: Path, entry: FileEntry, moved: Moved) -> None:
        # A blob's key is its content, so an upload that broke off leaves nothing visible, and one that is there is
        # the same. One of another size is damaged for certain, and mended here; one that the collector may take soon
        # is written again, so that it is young when the manifest that names it appears.
        key, path = blob_key(entry.digest), folder / entry.path
        found = self._objects.head(key)
        if found is not None and found.size == entry.size and not is_aging(found.modified):
            moved(entry.size)
            return
        if found is not None:
            # Others may rely on what lies there: it is replaced only by bytes that cannot change any more.
            with tempfile.TemporaryDirectory() as scratch:
                copy = Path(scratch) / "blob"
                shutil.copyfile(path, copy)
                if digest_file(copy) != entry.digest:
                    raise _changed(path)
                self._objects.put_file(key, copy, moved=moved)
            return
        try:
            self._objects.put_file(key, path, if_absent=True, moved=moved)
        except ObjectExists:
            # Somebody stored the same at this moment.
            return
        # The file was read twice, once for its digest and once for the upload. Had it changed between, the blob would
        # lie for good under a digest that is not its own, in the way of the content that is.
        if digest_file(path) != entry.digest:
            self._objects.delete(key)
            raise _changed(path)

    def _get_blob(self, digest: str, staging: Path, entry: FileEntry, moved: Moved) -> None:
        path = staging / entry.path
        if path.is_file() and path.stat().st_size == entry.size:
            # An earlier fetch got this far; what it holds is verified with everything else.
            moved(entry.size)
            return
        try:
            self._objects.get_file(blob_key(entry.digest), path, moved=moved)
        except ObjectMissing as error:
            raise _file_gone(digest, entry) from error

    def _cached(self, target: Path, manifest: Manifest) -> bool:
        if not target.is_dir():
            return False
        try:
            _verify(target, manifest)
            return True
        except IntegrityError:
            # The cache is only a copy: drop the damaged one and fetch it again.
            self._drop(target)
            return False

    def _require_room(self, manifest: Manifest, staging: Path) -> None:
        # Blocks, not sizes: a file under way has its full size from the start, with holes in it.
        have = sum(path.stat().st_blocks * 512 for path in staging.rglob("*") if path.is_file())
        needed = max(0, manifest.size - have)
        free = shutil.disk_usage(self._cache).free
        if needed and needed + FREE_BYTES > free:
            raise UnavailableError(
                f"Fetching the {manifest.kind} {short(manifest.digest)} needs {needed / 1e9:.2f} GB more in "
                f"{str(self._cache)!r}, and its disk has {free / 1e9:.2f} GB free.",
                hint="Free some space there, or set SLUICE_HOME to another disk.",
            )

    def _lock(self, name: str) -> Path:
        return self._cache / ".locks" / name

    def _drop(self, target: Path) -> None:
        # Renamed first: a process that fetches meanwhile sees the whole folder or none.
        aside = Path(tempfile.mkdtemp(prefix=".fetch-", dir=self._cache))
        try:
            os.rename(target, aside / "damaged")
        except FileNotFoundError:
            pass
        shutil.rmtree(aside, ignore_errors=True)

    def _sweep(self) -> None:
        for left in self._cache.glob(".fetch-*"):
            try:
                abandoned = time.time() - left.stat().st_mtime > ABANDONED_S
            except FileNotFoundError:
                continue
            if abandoned:
                # Whoever is at work there holds its lock, however long it takes.
                with held_if_free(self._lock(left.name.removeprefix(".fetch-"))) as free:
                    if free:
                        shutil.rmtree(left, ignore_errors=True)

    def _put_manifest(self, manifest: Manifest) -> None:
        key, data = manifest_key(manifest.digest), canonical_json(manifest.to_json())
        try:
            self._objects.put(key, data, if_absent=True)
        except ObjectExists:
            # Success: the key is the content's digest. Only, as with blobs, it must not be old.
            found = self._objects.head(key)
            if found is None or is_aging(found.modified):
                self._objects.put(key, data)


def _transfer(move: Callable[[FileEntry, Moved], None], entries: Iterable[FileEntry], report: Report) -> None:
    """Move files a few at a time; the first failure is raised after those under way have ended."""
    wanted = list(entries)
    total, moved, counting = sum(entry.size for entry in wanted), 0, threading.Lock()

    def one(entry: FileEntry) -> None:
        def count(size: int) -> None:
            nonlocal moved
            with counting:
                moved += size
                report(moved, total, entry.path)

        move(entry, count)

    with ThreadPoolExecutor(max_workers=TRANSFERS) as pool:
        running = [pool.submit(one, entry) for entry in wanted]
        try:
            for future in running:
                future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _verify(folder: Path, manifest: Manifest) -> None:
    for entry in manifest.files:
        path = folder / entry.path
        if path.is_symlink() or not path.is_file():
            raise IntegrityError(f"{entry.path} of artifact {manifest.digest} is missing in {folder}.")
        found = digest_file(path)
        if found != entry.digest:
            raise IntegrityError(f"{entry.path} of artifact {manifest.digest} is damaged: its digest is {found}.")
    # A file too many can change what a reader of the folder loads, just as a changed one can.
    known = {entry.path for entry in manifest.files}
    for path in folder.rglob("*"):
        relative = path.relative_to(folder).as_posix()
        if relative not in known and not (path.is_dir() and not path.is_symlink()):
            raise IntegrityError(f"{relative} is not a file of artifact {manifest.digest}, but lies in {folder}.")


def _changed(path: Path) -> InputError:
    return InputError(
        f"{path} changed while it was being stored.", hint="Store a folder only after its writer has finished."
    )


def _file_gone(digest: str, entry: FileEntry) -> ObjectMissing:
    return ObjectMissing(
        f"{entry.path} of artifact {digest} is gone from the object store.",
        hint="Store the artifact again from its source; its manifest is still there.",
    )


def blob_key(digest: str) -> str:
    """Where a file's bytes lie."""
    return f"blobs/sha256/{hex_of(digest)}"


def manifest_key(digest: str) -> str:
    """Where an artifact's manifest lies."""
    return f"manifests/sha256/{hex_of(digest)}"
