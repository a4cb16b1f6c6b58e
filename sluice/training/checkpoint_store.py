"""Checkpoints on a disk: published whole, verified on write and on read, pruned by the recipe. No torch in here.

    checkpoints/step_00000010/          what the training processes wrote, and
        MANIFEST.json                   step, time, processes, details; size and sha256 of each file
        COMPLETE                        the marker, written last: the manifest's digest and the validation loss
    checkpoints/.staging-step_00000020  a save on its way, or what a killed one left
    checkpoints/.removing-step_...      a checkpoint on its way out
    checkpoints/.damaged-step_...       found damaged and set aside for people; the newest `KEEP_DAMAGED` stay
    checkpoints/.discarded.json         manifests that a roll-back took back, for the mirror to follow

Each change of state is one rename, so kill -9 between any two instructions leaves the older checkpoints as they were;
files and folders are flushed before the rename that names them, so a power cut does too. One process saves at a time.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from sluice.infra.errors import IntegrityError, SluiceError
from sluice.provenance.canonical import Json, canonical_json, digest_bytes
from sluice.provenance.manifest import Manifest
from sluice.training.checkpoint_files import (
    MANIFEST,
    MARKER,
    Checkpoint,
    CheckpointFailed,
    described,
    entries_of,
    flush,
    folder_name,
    in_words,
    marker_of,
    read_checkpoint,
    remove,
    require_bytes,
    require_sizes,
    step_of,
    verified,
    write_failure,
    write_flushed,
)
from sluice.training.journal import Event
from sluice.training.recipe_sections import CheckpointSection

KEEP_DAMAGED = 2
FREE_BYTES = 64 * 2**20
"""What a save leaves free on the disk."""
_DISCARDED = ".discarded.json"
_STAGING, _REMOVING, _DAMAGED = ".staging-", ".removing-", ".damaged-"


class Kept(Protocol):
    """What the policy looks at: a checkpoint here, or a copy of one elsewhere."""

    @property
    def step(self) -> int: ...
    @property
    def created(self) -> float: ...
    @property
    def validation_loss(self) -> float | None: ...


def steps_to_keep(found: Sequence[Kept], policy: CheckpointSection) -> set[int]:
    """The last `keep_last`, the one with the lowest validation loss, and one for each `keep_every_hours`.

    Of those for the hours the oldest is the first, and each next one is at least so many hours younger: so one that
    was kept once is kept for good.
    """
    ordered = sorted(found, key=lambda one: one.step)
    keep = {one.step for one in ordered[-policy.keep_last :]}
    if (best := lowest_loss(ordered)) is not None:
        keep.add(best.step)
    if policy.keep_every_hours is not None:
        last = -math.inf
        for one in ordered:
            if one.created - last >= policy.keep_every_hours * 3600:
                keep.add(one.step)
                last = one.created
    return keep


def lowest_loss(found: Sequence[Kept]) -> Kept | None:
    """The one with the lowest validation loss (the earlier of two equal ones), or None when none has any."""
    measured = [(one.validation_loss, one.step, one) for one in found if one.validation_loss is not None]
    return min(measured, key=lambda entry: entry[:2])[2] if measured else None


class CheckpointStore:
    """The checkpoints of one run. One process writes (process 0 of training); any may read `complete` and `best`."""

    def __init__(
        self,
        folder: Path,
        policy: CheckpointSection,
        tell: Callable[[Event], None],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder = folder
        self.policy = policy
        self.tell = tell
        self._clock = clock
        self._lock = threading.Lock()
        self._losses: dict[int, float] = {}

    def staging(self, step: int, needed: int = 0) -> Path:
        """An empty folder to write the checkpoint of `step` into. Removes what killed saves left.

        Raises `CheckpointFailed` when the disk has no room for `needed` bytes.
        """
        target = self.folder / f"{_STAGING}{folder_name(step)}"
        with self._disk(target, needed):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.sweep()
            free = shutil.disk_usage(self.folder).free
            if needed + FREE_BYTES > free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            target.mkdir()
        return target

    def publish(
        self, step: int, *, details: dict[str, Json], validation_loss: float | None = None, world_size: int = 1
    ) -> Checkpoint:
        """Make the files in the staging folder of `step` the checkpoint of that step, and prune the older ones.

        A complete checkpoint of that step stays as it is; an incomplete one is replaced. Raises `CheckpointFailed`,
        and frees the staging folder's space, when the disk refuses or gives back other bytes than were written.
        """
        begun = time.monotonic()
        staging = self.folder / f"{_STAGING}{folder_name(step)}"
        if (there := self._already(step)) is not None:
            remove(staging)
            # The one that published it may have been killed before it pruned.
            self.prune()
            return there
        with self._disk(staging):
            # Read from memory, where the writing left them; `_seal` reads them again from the disk.
            files = entries_of(staging)
            metadata = {
                "step": step,
                "created": self._clock(),
                "world_size": world_size,
                # As text: guards remember losses that may be NaN, which canonical JSON has no word for.
                "details": json.dumps(details),
            }
            published = self._seal(staging, Manifest("checkpoint", files, metadata), validation_loss)
        seconds = time.monotonic() - begun
        self._told(f"Checkpoint of step {step} saved and verified ({in_words(published.size)}).", published, seconds)
        self.prune()
        return published

    def adopt(self, manifest: Manifest, validation_loss: float | None) -> Checkpoint:
        """Publish a staging folder that holds a copy made elsewhere, under the manifest it had there.

        Raises `IntegrityError` naming the file that is not what the manifest says.
        """
        step = int(manifest.metadata["step"])
        staging = self.folder / f"{_STAGING}{folder_name(step)}"
        if (there := self._already(step)) is not None:
            remove(staging)
            return there
        with self._disk(staging):
            return self._seal(staging, manifest, validation_loss)

    def complete(self) -> tuple[Checkpoint, ...]:
        """The published checkpoints in the order of steps. Cheap: looks at markers, manifests and sizes, not bytes."""
        found = []
        for folder in self._folders():
            with suppress(IntegrityError, OSError):
                checkpoint = read_checkpoint(folder)
                require_sizes(checkpoint)
                found.append(checkpoint)
        return tuple(found)

    def best(self) -> Checkpoint | None:
        """The one with the lowest validation loss whose every byte is as it was written, or None when none has any.

        Damaged ones are set aside, each with an event that names the file. Call it while nobody saves.
        """
        while isinstance(found := lowest_loss(self.complete()), Checkpoint):
            try:
                return verified(found.folder)
            except IntegrityError as error:
                after = lowest_loss([one for one in self.complete() if one.step != found.step])
                self._set_aside(found.folder, error.message, after.step if after else None)
        return None

    def newest_good(self) -> Checkpoint | None:
        """The newest checkpoint whose every byte is as it was written; None without any.

        Call it at a start, while nobody saves: it removes what killed saves left and sets damaged checkpoints aside,
        each with an event that names the file.
        """
        self.sweep()
        folders = list(reversed(self._folders()))
        for place, folder in enumerate(folders):
            try:
                return verified(folder)
            except IntegrityError as error:
                older = step_of(folders[place + 1]) if place + 1 < len(folders) else None
                self._set_aside(folder, error.message, older)
        return None

    def discard_after(self, step: int) -> None:
        """Take back every checkpoint newer than `step` (a roll-back). No save may be on its way."""
        for folder in reversed(self._folders()):
            if (newer := step_of(folder)) > step:
                with suppress(IntegrityError):
                    self._remember_discarded(read_checkpoint(folder).digest)
                self._losses.pop(newer, None)
                self._take_out(folder)

    def discarded(self) -> tuple[str, ...]:
        """Digests of the manifests that roll-backs took back, oldest first."""
        try:
            return tuple(str(digest) for digest in json.loads((self.folder / _DISCARDED).read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return ()

    def set_validation_loss(self, step: int, loss: float) -> None:
        """Write a loss that was measured after the save. A save on its way gets it when it is published."""
        if not math.isfinite(loss):
            return
        with self._lock:
            self._losses[step] = loss
            folder = self.folder / folder_name(step)
            with suppress(IntegrityError), self._disk(folder):
                checkpoint = read_checkpoint(folder)
                self._mark(folder, checkpoint.digest, loss)

    def prune(self) -> None:
        """Remove what the policy does not keep. One that cannot be removed is told of and tried again next time."""
        found = self.complete()
        keep = steps_to_keep(found, self.policy)
        for checkpoint in found:
            if checkpoint.step not in keep:
                try:
                    self._take_out(checkpoint.folder)
                except OSError as error:
                    sentence = f"The old checkpoint of step {checkpoint.step} cannot be removed: {error.strerror}."
                    self.tell(Event("checkpoint", sentence, checkpoint.step, "warning"))

    def sweep(self) -> None:
        """Remove what killed saves and removals left. Only while nobody saves."""
        for path in self._hidden(_STAGING, _REMOVING):
            remove(path)

    def abandon(self, step: int, error: SluiceError) -> None:
        """Free the space of a save that failed, and tell it."""
        remove(self.folder / f"{_STAGING}{folder_name(step)}")
        newest = max((checkpoint.step for checkpoint in self.complete()), default=0)
        so_far = f"The one of step {newest} is still good." if newest else "There is none before it."
        sentence = f"The checkpoint of step {step} was not saved: {error} {so_far}"
        details = {"needed": error.needed, "free": error.free} if isinstance(error, CheckpointFailed) else {}
        self.tell(Event("checkpoint_failed", sentence, step, "error", details))

    def _already(self, step: int) -> Checkpoint | None:
        """The good checkpoint of this step; a damaged or incomplete one is moved out of the way."""
        folder = self.folder / folder_name(step)
        if not folder.exists():
            return None
        try:
            return verified(folder)
        except IntegrityError:
            self._take_out(folder)
            return None

    def _seal(self, staging: Path, manifest: Manifest, validation_loss: float | None) -> Checkpoint:
        data = canonical_json(manifest.to_json())
        write_flushed(staging / MANIFEST, data)
        for entry in manifest.files:
            if (staging / entry.path).is_file():
                flush(staging / entry.path, forget=True)
        require_bytes(described(staging, data, None))
        flush(staging)
        step = int(manifest.metadata["step"])
        target = self.folder / folder_name(step)
        os.rename(staging, target)
        flush(self.folder)
        with self._lock:
            loss = self._losses.get(step, validation_loss)
            self._mark(target, digest_bytes(data), loss)
        return read_checkpoint(target)

    def _mark(self, folder: Path, digest: str, loss: float | None) -> None:
        # Written outside: a half-written marker would be a file too many in the checkpoint.
        beside = self.folder / f"{_STAGING}{folder.name}.marker"
        write_flushed(beside, marker_of(digest, loss))
        os.replace(beside, folder / MARKER)
        flush(folder)

    def _take_out(self, folder: Path) -> None:
        """Remove a checkpoint: the rename ends it, whatever happens to the removal of its files."""
        going = self.folder / f"{_REMOVING}{folder.name}"
        remove(going)
        os.rename(folder, going)
        remove(going)

    def _set_aside(self, folder: Path, reason: str, other: int | None) -> None:
        target = self.folder / f"{_DAMAGED}{folder.name}"
        remove(target)
        os.rename(folder, target)
        os.utime(target)
        for path in sorted(self._hidden(_DAMAGED), key=lambda path: path.stat().st_mtime)[:-KEEP_DAMAGED]:
            remove(path)
        then = f"The one of step {other} is tried next." if other is not None else "There is no older one."
        sentence = f"The checkpoint of step {step_of(folder)} is damaged and was set aside: {reason} {then}"
        details: dict[str, Json] = {"reason": reason, "kept_in": target.name}
        self.tell(Event("checkpoint_damaged", sentence, step_of(folder), "warning", details))

    def _remember_discarded(self, digest: str) -> None:
        known = [*self.discarded(), digest]
        beside = self.folder / f"{_STAGING}discarded"
        write_flushed(beside, json.dumps(known[-100:]).encode())
        os.replace(beside, self.folder / _DISCARDED)

    def _told(self, sentence: str, checkpoint: Checkpoint, seconds: float) -> None:
        details: dict[str, Json] = {"bytes": checkpoint.size, "seconds": round(seconds, 3), "digest": checkpoint.digest}
        self.tell(Event("checkpoint", sentence, checkpoint.step, details=details))

    def _folders(self) -> list[Path]:
        """Folders of published or half-published checkpoints, in the order of steps."""
        try:
            found = [path for path in self.folder.iterdir() if step_of(path) >= 0]
        except FileNotFoundError:
            return []
        return sorted(found, key=step_of)

    def _hidden(self, *prefixes: str) -> list[Path]:
        try:
            return [path for path in self.folder.iterdir() if path.name.startswith(prefixes)]
        except FileNotFoundError:
            return []

    @contextmanager
    def _disk(self, staging: Path, needed: int = 0) -> Iterator[None]:
        """Turn a refusal of the disk into `CheckpointFailed`, and free what was staged."""
        try:
            yield
        except (OSError, IntegrityError) as error:
            needed = needed or sum(path.stat().st_size for path in staging.glob("*") if path.is_file())
            free = shutil.disk_usage(self.folder).free if self.folder.is_dir() else 0
            if staging.name.startswith(_STAGING):
                remove(staging)
            if isinstance(error, IntegrityError):
                raise
            raise write_failure(error, staging, needed, free) from error
