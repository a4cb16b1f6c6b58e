"""Why a step ran: its key beside the key of the nearest earlier step of its name, down to the file that changed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from sluice.infra.errors import IntegrityError
from sluice.infra.object_store import ObjectMissing, ObjectStore
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import Json, digest_bytes
from sluice.provenance.step_records import StepKey, StepRecord, read_records
from sluice.provenance.steps import code_key

Change = Literal["added", "removed", "changed"]
Outcome = Literal["hit", "computed", "unfinished"]


@dataclass(frozen=True)
class Difference:
    """One thing that differs. `part` is what it is (`parameter`, `input`, `code`, `file`, ...), `inside` the details.

    `before` is None for what was added, `after` for what was removed. `follows` names the task that an input which
    differs comes from, when that one explains it; empty for a cause of its own.
    """

    part: str
    name: str
    change: Change
    before: Json
    after: Json
    inside: tuple[Difference, ...] = ()
    follows: str = ""


@dataclass(frozen=True)
class Why:
    """Why a step ran or was a hit. `record` is its record, `earlier` what it is compared with."""

    key: StepKey
    outcome: Outcome
    sentence: str
    record: StepRecord | None
    earlier: StepRecord | None
    differences: tuple[Difference, ...]


class Explainer:
    """Compares keys, artifacts and code of one object store."""

    def __init__(self, objects: ObjectStore, artifacts: ArtifactStore) -> None:
        self._objects = objects
        self._artifacts = artifacts
        self._records: list[StepRecord] | None = None

    def records(self) -> list[StepRecord]:
        """All records, oldest first; read once. Raises `IntegrityError` for one that is damaged."""
        if self._records is None:
            self._records = sorted(read_records(self._objects), key=lambda record: record.finished)
        return self._records

    def why(self, key: StepKey, *, hit: bool | None) -> Why:
        """Why the step with this key was a hit or not; `hit` None means: not told, or not ended."""
        editions = [record for record in self.records() if record.key_digest == key.digest]
        if hit and editions:
            return Why(key, "hit", f"the same key was computed before, {_when(editions[-1])}", editions[-1], None, ())
        if len(editions) > 1:
            sentence = f"it was computed before, {_when(editions[-2])}, but an output of that was gone"
            return Why(key, "computed", sentence, editions[-1], editions[-2], ())
        record = editions[-1] if editions else None
        earlier = self.nearest(key, record)
        outcome: Outcome = "computed" if record else "unfinished"
        if earlier is None:
            return Why(key, outcome, f"no earlier step is called {key.name!r}", record, None, ())
        differences = tuple(self.compare_keys(earlier.key, key))
        parts = ", ".join(f"{one.part} {one.name}".strip() for one in differences)
        return Why(key, outcome, f"{parts} differ{'s' if len(differences) == 1 else ''}", record, earlier, differences)

    def nearest(self, key: StepKey, record: StepRecord | None) -> StepRecord | None:
        """Of the earlier records of the same step name, the one with the fewest differing parts; of those the last."""
        best: tuple[int, StepRecord] | None = None
        for one in self.records():
            if one.key.name != key.name or one.key_digest == key.digest:
                continue
            if record is not None and one.finished > record.finished:
                continue
            distance = _distance(one.key, key)
            if best is None or distance <= best[0]:
                best = distance, one
        return best[1] if best else None

    def compare_keys(self, before: StepKey, after: StepKey) -> list[Difference]:
        """What differs between two keys: code, then parameters and inputs by name."""
        found: list[Difference] = []
        if before.name != after.name:
            found.append(Difference("name", "", "changed", before.name, after.name))
        if before.code != after.code:
            inside = self._compare_code(before.code, after.code)
            found.append(Difference("code", "", "changed", before.code, after.code, inside))
        found += compare_values("parameter", before.parameters, after.parameters)
        found += self.compare_inputs(before.inputs, after.inputs)
        return found

    def compare_inputs(
        self, before: Mapping[str, str], after: Mapping[str, str], part: str = "input"
    ) -> list[Difference]:
        """What differs between two sets of artifacts by name, down to their files and metadata."""
        found = []
        for one in compare_values(part, before, after):
            inside = self.compare_artifacts(one.before, one.after) if one.change == "changed" else ()
            found.append(Difference(part, one.name, one.change, one.before, one.after, inside))
        return found

    def compare_artifacts(self, before: str, after: str) -> tuple[Difference, ...]:
        """What differs between two artifacts: kind, metadata, and files with their sizes in bytes.

        Nothing when one is no longer stored; a note in place of the details would be a difference that is none.
        """
        try:
            one, other = self._artifacts.manifest(before), self._artifacts.manifest(after)
        except ObjectMissing:
            return ()
        found = compare_values("kind", {"": one.kind}, {"": other.kind})
        found += compare_values("metadata", one.metadata, other.metadata)
        sizes = [{entry.path: entry.size for entry in manifest.files} for manifest in (one, other)]
        digests = [{entry.path: entry.digest for entry in manifest.files} for manifest in (one, other)]
        found += [
            Difference("file", file.name, file.change, sizes[0].get(file.name), sizes[1].get(file.name))
            for file in _compare_flat("file", *digests)
        ]
        return tuple(found)

    def _compare_code(self, before: str, after: str) -> tuple[Difference, ...]:
        one, other = self._sources(before), self._sources(after)
        if one is None or other is None:
            return ()
        return (
            *_compare_flat("file", one["files"], other["files"]),
            *_compare_flat("lock", one["locks"], other["locks"]),
        )

    def _sources(self, code: str) -> Json | None:
        """The files behind a code digest, where they were kept."""
        try:
            data = self._objects.get(code_key(code))
        except ObjectMissing:
            return None
        if digest_bytes(data) != code:
            raise IntegrityError(f"The list of files of the code {code} has another digest, {digest_bytes(data)}.")
        return json.loads(data)


def compare_values(part: str, before: Mapping[str, Json], after: Mapping[str, Json]) -> list[Difference]:
    """What differs between two JSON objects, nested ones by dotted names."""
    found: list[Difference] = []
    for one in _compare_flat(part, before, after):
        if isinstance(one.before, dict) and isinstance(one.after, dict):
            found += [
                Difference(part, f"{one.name}.{deep.name}", deep.change, deep.before, deep.after)
                for deep in compare_values(part, one.before, one.after)
            ]
        else:
            found.append(one)
    return found


def _compare_flat(part: str, before: Mapping[str, Json], after: Mapping[str, Json]) -> Iterable[Difference]:
    for name in sorted({*before, *after}):
        if name not in before:
            yield Difference(part, name, "added", None, after[name])
        elif name not in after:
            yield Difference(part, name, "removed", before[name], None)
        elif type(before[name]) is not type(after[name]) or before[name] != after[name]:
            yield Difference(part, name, "changed", before[name], after[name])


def _distance(one: StepKey, other: StepKey) -> int:
    """How many parts of two keys differ, without a look into code and artifacts."""
    parameters = compare_values("parameter", one.parameters, other.parameters)
    inputs = compare_values("input", one.inputs, other.inputs)
    return len(parameters) + len(inputs) + (one.code != other.code)


def _when(record: StepRecord) -> str:
    return f"on {record.host}, finished {record.finished[:19].replace('T', ' ')} UTC"
