"""What a release needs elsewhere, gathered from the object store of the site that made it.

Whole artifacts: the adapter, the gate's report and decision, the account of its training, its companions; the base
model on request. Of the dataset only the card, its figures and the ids of its traces: what users wrote stays where it
is. Of everything else in its history the manifests, step records and signed statements, and the ledger from its
first entry. So the receiver can follow every digest back to the traces, without the traces.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sluice.infra.errors import InputError, IntegrityError
from sluice.infra.object_store import ObjectMissing, ObjectStore
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import canonical_json, digest_bytes, hex_of, short
from sluice.provenance.ledger import LedgerEntry
from sluice.provenance.manifest import Manifest
from sluice.provenance.step_records import StepRecord, read_records, record_key
from sluice.registry.transfer.companions import find_companions, pointers
from sluice.registry.transfer.released import Release, find_release
from sluice.registry.transfer.snapshot import BaseReference, ReleaseEntry, SnapshotFile

BASE_KIND = "base-model"
WHOLE_KINDS = frozenset({"decision", "training"})
"""Artifacts in a release's history that travel with their files, beside those that it names itself."""
DATASET_FILES = ("card.html", "card.json", "card.md", "lineage.json")


@dataclass(frozen=True)
class Wanted:
    """A release to hand over: the version's number and tags at this site."""

    release: str
    number: int
    tags: Mapping[str, str]


@dataclass
class Content:
    """Entries for a snapshot, and the files behind them by path."""

    releases: list[ReleaseEntry] = field(default_factory=list)
    files: dict[str, SnapshotFile] = field(default_factory=dict)

    def add(self, path: str, size: int, digest: str) -> None:
        self.files[path] = SnapshotFile(path=path, size=size, digest=digest)

    def add_bytes(self, path: str, data: bytes) -> None:
        self.add(path, len(data), digest_bytes(data))


class History:
    """The step records of an object store, by what they made."""

    def __init__(self, objects: ObjectStore) -> None:
        self.makers: dict[str, list[tuple[str, StepRecord]]] = {}
        editions: dict[str, int] = {}
        for record in read_records(objects):
            edition = editions.get(record.key_digest, 0)
            editions[record.key_digest] = edition + 1
            for digest in record.output.artifacts.values():
                self.makers.setdefault(digest, []).append((record_key(record.key_digest, edition), record))


def gather(
    objects: ObjectStore,
    artifacts: ArtifactStore,
    entries: list[LedgerEntry],
    wanted: Iterable[Wanted],
    *,
    with_base: bool,
) -> Content:
    """The content of a snapshot of these releases.

    Raises `GateRefused` for a release without a passing, approved decision, `InputError` for one that is no adapter,
    `IntegrityError` when no step made its report.
    """
    history = History(objects)
    content = Content()
    for entry in entries:
        content.add_bytes(f"ledger/{entry.ledger}/{entry.sequence:08d}.json", canonical_json(entry.envelope))
        if entry.kind == "revocation":
            # What a revoked key had signed before: without it nobody could tell what still counts.
            kept = artifacts.manifest(str(entry.body["kept"]))
            content.add_bytes(f"manifests/sha256/{hex_of(kept.digest)}", canonical_json(kept.to_json()))
            _add_files(content, kept, None)
    for one in wanted:
        kind = artifacts.manifest(one.release).kind
        if kind != "adapter":
            raise InputError(
                f"Release {short(one.release)} is a {kind}; what is handed over is an adapter.",
                hint="--with-base carries the base model with its adapter." if kind == BASE_KIND else "",
            )
        found = find_release(entries, one.release)
        _add_release(content, objects, artifacts, history, one, found, with_base=with_base)
    return content


def _add_release(
    content: Content,
    objects: ObjectStore,
    artifacts: ArtifactStore,
    history: History,
    wanted: Wanted,
    found: Release,
    *,
    with_base: bool,
) -> None:
    adapter = artifacts.manifest(wanted.release)
    base, dataset = str(adapter.metadata["base"]), str(adapter.metadata["dataset"])
    gates = [record for _, record in history.makers.get(found.report, ()) if "decision" in record.output.artifacts]
    if not gates:
        raise IntegrityError(f"No step of this site made the report {found.report} of release {short(wanted.release)}.")
    companions = find_companions(objects, wanted.release)
    for digest in (wanted.release, found.report, *companions.values()):
        # The champion it was compared with is another release, with a history of its own.
        stop = {found.champion} if digest == found.report else set()
        _add_history(content, objects, artifacts, history, digest, stop - {wanted.release})
    for place, data in pointers(wanted.release, companions).items():
        content.add_bytes(place, data)
    known = artifacts.manifest(base)
    if with_base:
        _add_files(content, known, None)
    content.releases.append(
        ReleaseEntry(
            release=wanted.release,
            kind=adapter.kind,
            number=wanted.number,
            tags=dict(wanted.tags),
            decision=found.decision,
            approval=found.approval,
            report=found.report,
            evidence=gates[-1].output.artifacts["decision"],
            dataset=dataset,
            index=gates[-1].key.inputs.get("index"),
            base=BaseReference(
                digest=base,
                name=str(known.metadata.get("name", "")),
                license=str(known.metadata.get("license", "")),
                source=str(known.metadata.get("source", "")),
                included=with_base,
            ),
            companions=companions,
        )
    )


def _add_history(
    content: Content,
    objects: ObjectStore,
    artifacts: ArtifactStore,
    history: History,
    digest: str,
    stop: set[str | None],
) -> None:
    """An artifact and all that it came from, but for what is behind `stop`: manifests, records, statements; and the
    files of what travels whole."""
    waiting, seen = [digest], {digest}
    while waiting:
        current = waiting.pop()
        try:
            manifest = artifacts.manifest(current)
        except ObjectMissing:
            # Collected since: its digest still stands in the statements.
            pass
        else:
            content.add_bytes(f"manifests/sha256/{hex_of(current)}", canonical_json(manifest.to_json()))
            if current == digest or manifest.kind in WHOLE_KINDS:
                _add_files(content, manifest, None)
            elif manifest.kind == "dataset":
                _add_files(content, manifest, DATASET_FILES)
        for place, record in history.makers.get(current, ()) if current not in stop else ():
            if place in content.files:
                continue
            content.add_bytes(place, canonical_json(record.to_json()))
            statement = f"attestations/sha256/{hex_of(record.statement)}.json"
            content.add(statement, _size(objects, statement), record.statement)
            for other in (*record.key.inputs.values(), *record.output.artifacts.values()):
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)


def _add_files(content: Content, manifest: Manifest, names: tuple[str, ...] | None) -> None:
    for entry in manifest.files:
        if names is None or entry.path in names:
            content.add(f"blobs/sha256/{hex_of(entry.digest)}", entry.size, entry.digest)


def _size(objects: ObjectStore, key: str) -> int:
    found = objects.head(key)
    if found is None:
        raise IntegrityError(f"The statement {key} is gone from the object store.")
    return found.size
