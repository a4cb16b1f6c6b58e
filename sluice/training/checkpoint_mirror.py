"""Checkpoints in the object store, uploaded beside training and fetched where the disk is another one.

    <prefix>/step_00000010/<sha256>     the bytes of one file, under their own digest
    <prefix>/step_00000010/COMPLETE     the marker, written last: manifest's digest and validation loss

The manifest is one of the files. A key that names its bytes needs no comparison: what a killed upload has sent stays,
and the next one sends the rest; a step saved again with other bytes mixes with nothing, its marker replaces the old
one whole. Without a marker there is no copy.
"""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sluice.infra.errors import IntegrityError, SluiceError
from sluice.infra.object_store import ObjectExists, ObjectMissing, ObjectStore
from sluice.provenance.canonical import canonical_json, digest_bytes, digest_file, hex_of
from sluice.provenance.manifest import FileEntry, Manifest, parse_manifest
from sluice.training.checkpoint_files import (
    MANIFEST,
    MARKER,
    Checkpoint,
    described,
    folder_name,
    in_words,
    manifest_of,
    marker_of,
    read_marker,
    step_of,
)
from sluice.training.checkpoint_store import CheckpointStore, lowest_loss, steps_to_keep
from sluice.training.job import CHECKPOINTS, Job
from sluice.training.journal import Event, Journal
from sluice.training.recipe_sections import CheckpointSection

TRANSFERS = 4
"""Files moved at once; a large one is moved in parallel parts besides."""
LOOK_EVERY_S = 2.0
LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True)
class MirrorCopy:
    """A whole copy in the object store: what its marker and manifest say."""

    step: int
    created: float
    validation_loss: float | None
    digest: str
    size: int


class CheckpointMirror:
    """The copies of one run's checkpoints under `prefix`. One process uploads; any may fetch."""

    def __init__(self, objects: ObjectStore, prefix: str) -> None:
        self._objects = objects
        self._prefix = prefix.rstrip("/")

    @property
    def prefix(self) -> str:
        return self._prefix

    def upload(self, checkpoint: Checkpoint) -> int:
        """Copy a published checkpoint; bytes that were sent, 0 where the copy was whole already.

        Raises `IntegrityError` when the checkpoint is not what its manifest says, `UnavailableError` when the object
        store fails, and `ObjectMissing` when it was pruned meanwhile: then there is nothing to copy.
        """
        manifest = manifest_of(checkpoint)
        marker = marker_of(checkpoint.digest, checkpoint.validation_loss)
        key = self._key(checkpoint.step, MARKER)
        if self._marker(key) == marker:
            return 0
        sizes = self._sizes(checkpoint.step)
        missing = [entry for entry in checkpoint.files if sizes.get(hex_of(entry.digest)) != entry.size]

        def send(entry: FileEntry) -> int:
            path = checkpoint.folder / entry.path
            if digest_file(path) != entry.digest:
                raise IntegrityError(f"{path} does not hold the bytes that were written: it is not uploaded.")
            self._create(self._key(checkpoint.step, hex_of(entry.digest)), path)
            return entry.size

        try:
            with ThreadPoolExecutor(TRANSFERS) as pool:
                sent = sum(pool.map(send, missing))
        except FileNotFoundError as error:
            raise ObjectMissing(
                f"The checkpoint of step {checkpoint.step} was removed while it was uploaded."
            ) from error
        self._objects.put(self._key(checkpoint.step, hex_of(checkpoint.digest)), manifest)
        self._objects.put(key, marker)
        return sent + len(manifest) + len(marker)

    def copies(self) -> tuple[MirrorCopy, ...]:
        """The whole copies in the order of steps. A copy whose marker or manifest is damaged is not one."""
        found = []
        for info in self._objects.list(f"{self._prefix}/"):
            folder, _, name = info.key.rpartition("/")
            step = step_of(Path(folder))
            if name == MARKER and step >= 0:
                try:
                    manifest, loss = self._manifest(step)
                except (IntegrityError, ObjectMissing):
                    continue
                one = described(Path(folder), canonical_json(manifest.to_json()), loss)
                found.append(MirrorCopy(step, one.created, loss, one.digest, one.size))
        return tuple(sorted(found, key=lambda copy: copy.step))

    def newest(self) -> MirrorCopy | None:
        """The newest whole copy, not yet verified: `fetch` does that."""
        return max(self.copies(), key=lambda copy: copy.step, default=None)

    def fetch(self, step: int, into: CheckpointStore) -> Checkpoint:
        """Download the copy of `step`, verify every byte and publish it.

        Raises `ObjectMissing` without a whole copy, `IntegrityError` naming a file that is not what the manifest
        says, `CheckpointFailed` without room on the disk. Nothing is published then.
        """
        manifest, loss = self._manifest(step)
        staging = into.staging(step, manifest.size)

        def get(entry: FileEntry) -> None:
            self._objects.get_file(self._key(step, hex_of(entry.digest)), staging / entry.path)

        try:
            with ThreadPoolExecutor(TRANSFERS) as pool:
                list(pool.map(get, manifest.files))
            return into.adopt(manifest, loss)
        except (SluiceError, OSError):
            shutil.rmtree(staging, ignore_errors=True)
            raise

    def restore(self, into: CheckpointStore) -> Checkpoint | None:
        """Fetch the newest copy that is good and newer than what `into` has; also the best one, if it is another.

        For the start of a run on another machine, while nobody saves. A copy that cannot be used is told and the next
        older one is tried. None when `into` is up to date already, or nothing could be fetched. What a roll-back took
        back here is not fetched: who was killed then may have left the copy.
        """
        discarded = into.discarded()
        copies = tuple(copy for copy in self.copies() if copy.digest not in discarded)
        here = {checkpoint.step for checkpoint in into.complete()}
        fetched: Checkpoint | None = None
        for copy in reversed(copies):
            if copy.step <= max(here, default=0):
                break
            if (fetched := self._fetched(copy, into)) is not None:
                break
        best = lowest_loss(copies)
        if isinstance(best, MirrorCopy) and best.step not in here and (fetched is None or best.step < fetched.step):
            self._fetched(best, into)
        return fetched

    def prune(self, policy: CheckpointSection) -> None:
        """Remove the copies that the policy does not keep, and what killed uploads left of steps before the newest."""
        copies = self.copies()
        keep = {copy.step: copy for copy in copies if copy.step in steps_to_keep(copies, policy)}
        newest = max(keep, default=-1)
        used = {step: self._used(copy) for step, copy in keep.items()}
        # The marker first: a copy that loses its files one by one is none from the first one on.
        stored = sorted(self._objects.list(f"{self._prefix}/"), key=lambda info: not info.key.endswith(f"/{MARKER}"))
        for info in stored:
            folder, _, name = info.key.rpartition("/")
            step = step_of(Path(folder))
            if 0 <= step <= newest and name not in used.get(step, set()):
                self._objects.delete(info.key)

    def clear(self) -> None:
        """Remove everything: the run has ended and its result is stored."""
        stored = sorted(self._objects.list(f"{self._prefix}/"), key=lambda info: not info.key.endswith(f"/{MARKER}"))
        for info in stored:
            self._objects.delete(info.key)

    def discard(self, digests: tuple[str, ...]) -> None:
        """Remove the copies of checkpoints that a roll-back took back, by their manifests' digests."""
        for copy in self.copies():
            if copy.digest in digests:
                self._objects.delete(self._key(copy.step, MARKER))

    def _fetched(self, copy: MirrorCopy, into: CheckpointStore) -> Checkpoint | None:
        begun = time.monotonic()
        try:
            checkpoint = self.fetch(copy.step, into)
        except (IntegrityError, ObjectMissing) as error:
            sentence = f"The copy of step {copy.step} in the object store is damaged and is not used: {error}"
            into.tell(Event("checkpoint_damaged", sentence, copy.step, "warning", {"reason": str(error)}))
            return None
        seconds = time.monotonic() - begun
        sentence = f"Checkpoint of step {copy.step} fetched from the object store and verified ({in_words(copy.size)})."
        into.tell(Event("checkpoint", sentence, copy.step, details={"bytes": copy.size, "seconds": round(seconds, 3)}))
        return checkpoint

    def _manifest(self, step: int) -> tuple[Manifest, float | None]:
        digest, loss = read_marker(self._objects.get(self._key(step, MARKER)))
        data = self._objects.get(self._key(step, hex_of(digest)))
        if digest_bytes(data) != digest:
            raise IntegrityError(f"{MANIFEST} is not the one that {MARKER} names.")
        return parse_manifest(data), loss

    def _used(self, copy: MirrorCopy) -> set[str]:
        manifest, _ = self._manifest(copy.step)
        return {MARKER, hex_of(copy.digest), *(hex_of(entry.digest) for entry in manifest.files)}

    def _marker(self, key: str) -> bytes | None:
        try:
            return self._objects.get(key)
        except ObjectMissing:
            return None

    def _sizes(self, step: int) -> dict[str, int]:
        prefix = self._key(step, "")
        return {info.key.removeprefix(prefix): info.size for info in self._objects.list(prefix)}

    def _create(self, key: str, path: Path) -> None:
        try:
            self._objects.put_file(key, path, if_absent=True)
        except ObjectExists:
            # Somebody's copy of the same name but another size: damaged, as the name is the digest of the bytes.
            found = self._objects.head(key)
            if found is None or found.size != path.stat().st_size:
                self._objects.delete(key)
                self._objects.put_file(key, path, if_absent=True)

    def _key(self, step: int, name: str) -> str:
        return f"{self._prefix}/{folder_name(step)}/{name}"


@contextmanager
def mirrored(job: Job, mirror: CheckpointMirror | None) -> Iterator[None]:
    """Copy checkpoints beside training; first bring back what is newer there than here. None: do neither."""
    if mirror is None or not job.recipe.checkpoints.upload:
        yield
        return
    tell = Journal(job.work_dir).write
    # Told afterwards: a journal that has begun would not take the earlier attempts' lines over.
    told: list[Event] = []
    if fetched := mirror.restore(CheckpointStore(job.work_dir / CHECKPOINTS, job.recipe.checkpoints, told.append)):
        Journal(job.work_dir).restore(fetched.folder)
    for event in told:
        tell(event)
    store = CheckpointStore(job.work_dir / CHECKPOINTS, job.recipe.checkpoints, tell)
    thread = MirrorThread(store, mirror, tell).start()
    try:
        yield
    finally:
        thread.close(job.recipe.budget.notice_s)


class MirrorThread:
    """Follows a store from the launcher's process and keeps the mirror like it. Never in training's way.

    Uploads the newest checkpoint and the best, then prunes; a failure is told and tried again with growing pauses.
    `close` looks once more.
    """

    def __init__(
        self,
        store: CheckpointStore,
        mirror: CheckpointMirror,
        tell: Callable[[Event], None],
        *,
        look_every_s: float = LOOK_EVERY_S,
    ) -> None:
        self._store = store
        self._mirror = mirror
        self._tell = tell
        self._look_every_s = look_every_s
        self._closing = threading.Event()
        self._uploaded: set[tuple[str, float | None]] = set()
        self._discarded: tuple[str, ...] = ()
        self._failures = 0
        self._thread = threading.Thread(target=self._follow, name="checkpoint-mirror", daemon=True)

    def start(self) -> MirrorThread:
        self._thread.start()
        return self

    def close(self, limit_s: float) -> bool:
        """Stop, after one more look at the store; whether its newest checkpoint is in the mirror within `limit_s`.

        A transfer that hangs keeps the interpreter from ending until its own time-outs; `os._exit` does not wait.
        """
        self._closing.set()
        self._thread.join(limit_s)
        if self._thread.is_alive():
            sentence = f"The newest checkpoint was not uploaded within {limit_s:g} s; it is on this machine's disk."
            self._tell(Event("upload_failed", sentence, level="warning", details={"seconds": limit_s}))
            return False
        return all((one.digest, one.validation_loss) in self._uploaded for one in self._wanted())

    def _follow(self) -> None:
        while not self._closing.wait(self._pause()):
            self.look()
        self.look()

    def _pause(self) -> float:
        if not self._failures:
            return self._look_every_s
        return float(min(LONGEST_PAUSE_S, self._look_every_s * 2**self._failures) * random.uniform(0.5, 1))

    def look(self) -> None:
        """One look at the store: upload what is new, take back what a roll-back took back, prune."""
        wanted = self._wanted()
        try:
            if (discarded := self._store.discarded()) != self._discarded:
                self._mirror.discard(discarded)
                self._discarded = discarded
            for checkpoint in wanted:
                if (checkpoint.digest, checkpoint.validation_loss) not in self._uploaded:
                    self._upload(checkpoint)
            self._failures = 0
        except ObjectMissing:
            # Pruned while it was read: the next look finds a newer one.
            pass
        except (SluiceError, OSError) as error:
            self._failures += 1
            if wanted and self._failures == 1:
                sentence = f"The checkpoint of step {wanted[0].step} could not be uploaded, it is tried again: {error}"
                self._tell(Event("upload_failed", sentence, wanted[0].step, "warning"))

    def _wanted(self) -> list[Checkpoint]:
        """What should be in the mirror now: the newest, and the best where that is another one."""
        found = self._store.complete()
        best = lowest_loss(found)
        return [one for one in reversed(found) if one is found[-1] or one is best]

    def _upload(self, checkpoint: Checkpoint) -> None:
        begun = time.monotonic()
        sent = self._mirror.upload(checkpoint)
        self._uploaded.add((checkpoint.digest, checkpoint.validation_loss))
        seconds = round(time.monotonic() - begun, 3)
        if sent:
            sentence = f"Checkpoint of step {checkpoint.step} uploaded ({in_words(sent)} in {seconds:.1f} s)."
            details = {"bytes": sent, "seconds": seconds, "attempts": self._failures + 1}
            self._tell(Event("uploaded", sentence, checkpoint.step, details=details))
        self._mirror.prune(self._store.policy)
