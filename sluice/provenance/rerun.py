"""Computing a recorded step again, beside its record: nothing is taken from the cache, and nothing is written over.

`Overlay` is an object store whose writes stay in a folder; `Rerunner` is the step runner that computes where the other
one would find. Both stand in for the originals, so a step is the same code that made the record.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sluice.infra.errors import InputError
from sluice.infra.object_store import ObjectExists, ObjectInfo, ObjectMissing, ObjectStore
from sluice.infra.progress import Report, no_report
from sluice.infra.transfer import Moved, ignore_moved
from sluice.provenance.canonical import Json, short
from sluice.provenance.step_records import StepKey, StepOutput, StepRecord
from sluice.provenance.steps import StepRunner


class Overlay:
    """An `ObjectStore` that reads what was written into `folder`, or else `below`; keys under `hidden` are not."""

    def __init__(self, below: ObjectStore, folder: Path, hidden: tuple[str, ...] = ()) -> None:
        self._below = below
        self._folder = folder
        self._hidden = hidden
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        if if_absent and self.head(key) is not None:
            raise ObjectExists(f"The object {key!r} exists already.")
        handle, staging = tempfile.mkstemp(dir=self._folder, prefix=".put-")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        self._place(key, Path(staging))

    def put_file(self, key: str, path: Path, *, if_absent: bool = False, moved: Moved = ignore_moved) -> None:
        if if_absent and self.head(key) is not None:
            raise ObjectExists(f"The object {key!r} exists already.")
        handle, staging = tempfile.mkstemp(dir=self._folder, prefix=".put-")
        os.close(handle)
        shutil.copyfile(path, staging)
        self._place(key, Path(staging))
        moved(path.stat().st_size)

    def get(self, key: str) -> bytes:
        path = self._folder / key
        return path.read_bytes() if path.is_file() else self._under(key).get(key)

    def get_file(self, key: str, path: Path, *, moved: Moved = ignore_moved) -> None:
        if (self._folder / key).is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._folder / key, path)
            moved(path.stat().st_size)
        else:
            self._under(key).get_file(key, path, moved=moved)

    def head(self, key: str) -> ObjectInfo | None:
        path = self._folder / key
        if path.is_file():
            return ObjectInfo(key, path.stat().st_size, path.stat().st_mtime)
        return None if key.startswith(self._hidden) else self._below.head(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        found = {info.key: info for info in self._below.list(prefix) if not info.key.startswith(self._hidden)}
        for path in self._folder.rglob("*"):
            key = path.relative_to(self._folder).as_posix()
            if path.is_file() and key.startswith(prefix) and not path.name.startswith(".put-"):
                found[key] = ObjectInfo(key, path.stat().st_size, path.stat().st_mtime)
        yield from (found[key] for key in sorted(found))

    def delete(self, key: str) -> None:
        """Removes what was written here; what lies below stays."""
        (self._folder / key).unlink(missing_ok=True)

    def _place(self, key: str, staging: Path) -> None:
        target = self._folder / key
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.replace(target)

    def _under(self, key: str) -> ObjectStore:
        if key.startswith(self._hidden):
            raise ObjectMissing(f"There is no object {key!r}.")
        return self._below


@dataclass(frozen=True)
class Rerun:
    """What computing a recorded step again gave: its key today, and its outputs."""

    key: StepKey
    output: StepOutput


class Rerunner(StepRunner):
    """Computes the step of `record` again, whatever was recorded, and records nothing.

    `instead` maps recorded input digests to those that an earlier rerun gave in their place.
    """

    def __init__(self, record: StepRecord, folder: Path, instead: Mapping[str, str] | None = None) -> None:
        # The parent's parts (store, signer) are what this runner does without.
        self._record = record
        self._folder = folder
        self._instead = dict(instead or {})
        self.rerun: Rerun | None = None

    def run(
        self,
        key: StepKey,
        function: Callable[[Path], StepOutput],
        report: Report = no_report,
        sources: Json | None = None,
    ) -> tuple[StepRecord, bool]:
        """The record that this computation would have left, unsigned.

        Raises `InputError` when the step is another one by now: other inputs or parameters than those recorded.
        """
        inputs = {name: self._instead.get(digest, digest) for name, digest in self._record.key.inputs.items()}
        was = {"step": self._record.key.name, **_named("input", inputs), **_named("", self._record.key.parameters)}
        now = {"step": key.name, **_named("input", key.inputs), **_named("", key.parameters)}
        changed = [name for name in sorted({*was, *now}) if was.get(name) != now.get(name)]
        if changed:
            told = "; ".join(f"{name} was {_word(was.get(name))}, is {_word(now.get(name))}" for name in changed[:3])
            raise InputError(f"The step would not be the recorded one: {told}.")
        self._folder.mkdir(parents=True, exist_ok=True)
        output = function(self._folder)
        self.rerun = Rerun(key, output)
        return StepRecord(key, output, "", "", "", self._record.statement), False


def _named(prefix: str, values: Mapping[str, Json]) -> dict[str, Json]:
    return {f"{prefix} {name}".strip(): value for name, value in values.items()}


def _word(value: Json) -> str:
    if isinstance(value, str) and value.startswith("sha256:"):
        return short(value)
    text = "not there" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
