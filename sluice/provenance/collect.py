"""Garbage collection: what nothing live reaches is planned first, and deleted only by that plan's digest.

Live is what the roots name and what those reach: through the metadata of manifests, and through the records of the
steps that made them, to all inputs and outputs of those. Step records younger than the grace are roots as well (a run
may be under way anywhere), and nothing younger than the grace is touched. Records and signed statements always stay:
they are small, they are the lineage, and a step whose outputs are gone is computed again when it is asked for.

Deletion: manifests first, blobs after, both in batches. Each batch is announced (`collecting.py`), then everything is
marked anew, and each object's age is asked once more right before it goes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

from sluice.infra.errors import InputError, IntegrityError
from sluice.infra.object_store import ObjectMissing, ObjectStore
from sluice.infra.progress import Report, no_report
from sluice.provenance.artifacts import ArtifactStore, blob_key, manifest_key
from sluice.provenance.canonical import (
    Json,
    canonical_json,
    digest_bytes,
    digest_json,
    digests_in,
    hex_of,
    require_digest,
)
from sluice.provenance.collecting import GRACE_S, Announcement
from sluice.provenance.lease import Leases
from sluice.provenance.manifest import Manifest
from sluice.provenance.roots import Roots
from sluice.provenance.step_records import StepRecord, parse_record

PLAN_VERSION = 1
_MANIFESTS, _BLOBS, _STEPS, _SITES = "manifests/sha256/", "blobs/sha256/", "steps/", "sites/"
_BATCH = 500
_READERS = 16


@dataclass(frozen=True)
class Doomed:
    """One thing that would go: a manifest with its artifact's kind, or a blob (kind empty). Size in bytes."""

    digest: str
    kind: str
    size: int


@dataclass(frozen=True)
class Tally:
    """How many, and how many bytes of distinct content."""

    count: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What would go, and by reason what stays. `created` is ISO 8601 UTC; the digest covers what would go."""

    created: str
    grace_s: float
    artifacts: tuple[Doomed, ...]
    blobs: tuple[Doomed, ...]
    kept: Mapping[str, Tally] = field(default_factory=dict)

    def to_json(self) -> Json:
        return {
            "version": PLAN_VERSION,
            "created": self.created,
            "grace_s": self.grace_s,
            "artifacts": [asdict(one) for one in self.artifacts],
            "blobs": [asdict(one) for one in self.blobs],
        }

    @property
    def digest(self) -> str:
        return digest_json(self.to_json())


@dataclass(frozen=True)
class Collected:
    """What a deletion did: artifacts and blobs that went, and by reason how many of the plan were spared."""

    artifacts: int
    blobs: int
    bytes: int
    spared: Mapping[str, int]


@dataclass
class _Marked:
    """`live` has the reason of each artifact that stays; `blobs` what any stored manifest names, live or not."""

    live: dict[str, str]
    blobs: set[str]
    manifests: dict[str, float]


class Collector:
    """Plans and deletes in one object store. `roots` is asked anew before each batch; it raises when it cannot tell."""

    def __init__(
        self,
        objects: ObjectStore,
        artifacts: ArtifactStore,
        roots: Callable[[], Roots],
        *,
        grace_s: float = GRACE_S,
        batch: int = _BATCH,
    ) -> None:
        if grace_s < GRACE_S:
            raise InputError(
                f"grace = {grace_s / 86400:g} days is too short: writers count on {GRACE_S / 86400:g} days.",
                hint="Only a longer grace can be chosen.",
            )
        self._objects = objects
        self._artifacts = artifacts
        self._roots = roots
        self._grace_s = grace_s
        self._batch = batch
        # Both never change once written, so each is read once.
        self._manifests: dict[str, Manifest] = {}
        self._records: dict[str, StepRecord] = {}

    def plan(self, report: Report = no_report) -> Plan:
        """What would go now, kept in the object store so that `delete` can be told exactly that. Deletes nothing."""
        marked = self._mark(report)
        gone = sorted(digest for digest in marked.manifests if digest not in marked.live)
        artifacts = [Doomed(d, self._manifests[d].kind, self._manifests[d].size) for d in gone]
        needed = {entry.digest for d in marked.live for entry in self._files(d)}
        blobs, sizes = [], {}
        for info in self._objects.list(_BLOBS):
            digest = f"sha256:{info.key.removeprefix(_BLOBS)}"
            sizes[digest] = info.size
            if digest not in needed and not self._is_young(info.modified):
                blobs.append(Doomed(digest, "", info.size))
        created = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        plan = Plan(created, self._grace_s, tuple(artifacts), tuple(blobs), self._kept(marked, sizes))
        self._objects.put(_plan_key(plan.digest), canonical_json(plan.to_json()))
        return plan

    def delete(self, digest: str, report: Report = no_report) -> Collected:
        """Delete what the plan with this digest named, as far as it is still unreachable and old. May be run again.

        Raises `InputError` when there is no such plan, `ConflictError` when the collector was stopped for long.
        """
        plan = self._read_plan(digest)
        spared: dict[str, int] = {}
        done = [0, 0, 0]
        total = len(plan.artifacts) + len(plan.blobs)
        with Leases(self._objects).hold("collector", report=report):
            for batch in _batches(plan.artifacts, self._batch):
                done[0] += self._delete_manifests(batch, spared)
                report(sum(done[:2]) + sum(spared.values()), total, "artifacts")
            for batch in _batches(plan.blobs, self._batch):
                count, size = self._delete_blobs(batch, spared)
                done[1], done[2] = done[1] + count, done[2] + size
                report(sum(done[:2]) + sum(spared.values()), total, "blobs")
        return Collected(done[0], done[1], done[2], spared)

    def _delete_manifests(self, batch: list[Doomed], spared: dict[str, int]) -> int:
        count = 0
        with Announcement(self._objects, (one.digest for one in batch)) as announced:
            marked = self._mark(no_report)
            for one in batch:
                if one.digest not in marked.manifests:
                    _count(spared, "was gone already")
                elif one.digest in marked.live:
                    _count(spared, marked.live[one.digest])
                elif self._delete(announced, manifest_key(one.digest), spared):
                    count += 1
        return count

    def _delete_blobs(self, batch: list[Doomed], spared: dict[str, int]) -> tuple[int, int]:
        count = size = 0
        with Announcement(self._objects, (one.digest for one in batch)) as announced:
            marked = self._mark(no_report)
            for one in batch:
                if one.digest in marked.blobs:
                    _count(spared, "a file of an artifact that is stored")
                elif self._delete(announced, blob_key(one.digest), spared):
                    count, size = count + 1, size + one.size
        return count, size

    def _delete(self, announced: Announcement, key: str, spared: dict[str, int]) -> bool:
        info = self._objects.head(key)
        if info is None:
            _count(spared, "was gone already")
            return False
        if self._is_young(info.modified):
            _count(spared, "written since")
            return False
        announced.require_time()
        self._objects.delete(key)
        return True

    def _mark(self, report: Report) -> _Marked:
        # Records before manifests: who claims an artifact through a record made sure that its manifest is there.
        roots = self._roots()
        records = {info.key: info.modified for info in self._objects.list(_STEPS)}
        # Of what came from other sites, the records lie apart.
        imported = (info for info in self._objects.list(_SITES) if f"/{_STEPS}" in info.key)
        records |= {info.key: info.modified for info in imported}
        self._load_records(records, report)
        manifests = {f"sha256:{i.key.removeprefix(_MANIFESTS)}": i.modified for i in self._objects.list(_MANIFESTS)}
        manifests = self._load_manifests(manifests, report)
        makers: dict[str, list[StepRecord]] = {}
        for place in records:
            for digest in self._records[place].output.artifacts.values():
                makers.setdefault(digest, []).append(self._records[place])
        live: dict[str, str] = {}
        for digest, reason in roots.live.items():
            _reach(digest, reason, live, self._beyond(makers))
        for place, modified in records.items():
            if self._is_young(modified):
                for digest in _named(self._records[place]):
                    _reach(digest, "used or made by a step within the grace", live, self._beyond(makers))
        for digest, modified in manifests.items():
            if self._is_young(modified):
                _reach(digest, "written within the grace", live, self._beyond(makers))
        for digest, reason in roots.evidence.items():
            live.setdefault(digest, reason)
        for digest in manifests:
            # A signature or bill of materials says whose it is; it stays as long as that does.
            if self._manifests[digest].metadata.get("subject") in live:
                live.setdefault(digest, "signature or bill of materials of what stays")
        blobs = {entry.digest for digest in manifests for entry in self._manifests[digest].files}
        return _Marked(live, blobs, manifests)

    def _beyond(self, makers: Mapping[str, list[StepRecord]]) -> Callable[[str], Iterator[str]]:
        def beyond(digest: str) -> Iterator[str]:
            if digest in self._manifests:
                yield from digests_in(self._manifests[digest].metadata)
            for record in makers.get(digest, ()):
                yield from _named(record)

        return beyond

    def _load_records(self, places: Iterable[str], report: Report) -> None:
        new = [place for place in places if place not in self._records]
        with ThreadPoolExecutor(max_workers=_READERS) as pool:
            found = pool.map(self._record, new)
            for number, (place, record) in enumerate(zip(new, found, strict=True), start=1):
                self._records[place] = record
                report(number, len(new), "reading step records")

    def _record(self, place: str) -> StepRecord:
        return parse_record(_STEPS + place.rpartition("/")[2], self._objects.get(place))

    def _load_manifests(self, listed: Mapping[str, float], report: Report) -> dict[str, float]:
        """Those of the listed manifests that are still there; a damaged one raises: its blobs cannot be known."""
        new = [digest for digest in listed if digest not in self._manifests]
        with ThreadPoolExecutor(max_workers=_READERS) as pool:
            for number, (digest, manifest) in enumerate(zip(new, pool.map(self._manifest, new), strict=True), start=1):
                if manifest is not None:
                    self._manifests[digest] = manifest
                report(number, len(new), "reading manifests")
        return {digest: modified for digest, modified in listed.items() if digest in self._manifests}

    def _manifest(self, digest: str) -> Manifest | None:
        try:
            return self._artifacts.manifest(require_digest(digest))
        except ObjectMissing:
            return None

    def _files(self, digest: str) -> Iterable[Json]:
        return self._manifests[digest].files if digest in self._manifests else ()

    def _kept(self, marked: _Marked, sizes: Mapping[str, int]) -> dict[str, Tally]:
        """By reason, how many artifacts stay; a blob that several share is counted for the first reason."""
        seen: set[str] = set()
        kept: dict[str, Tally] = {}
        for digest in marked.manifests:
            if digest in marked.live:
                new = {entry.digest for entry in self._files(digest)} - seen
                seen |= new
                before = kept.get(marked.live[digest], Tally(0, 0))
                size = sum(sizes.get(one, 0) for one in new)
                kept[marked.live[digest]] = Tally(before.count + 1, before.bytes + size)
        return kept

    def _is_young(self, modified: float) -> bool:
        return time.time() - modified <= self._grace_s

    def _read_plan(self, digest: str) -> Plan:
        try:
            data = self._objects.get(_plan_key(digest))
        except ObjectMissing as error:
            raise InputError(
                f"PLAN_DIGEST = {digest!r} is no plan of this object store.", hint="`sluice gc` makes one."
            ) from error
        if digest_bytes(data) != digest:
            raise IntegrityError(f"The plan {digest} was changed: its digest is {digest_bytes(data)}.")
        raw = json.loads(data)
        if raw["grace_s"] > self._grace_s:
            raise InputError(
                f"The plan {digest} was made with a grace of {raw['grace_s'] / 86400:g} days, "
                f"longer than {self._grace_s / 86400:g}.",
                hint="Give the same grace, or plan again.",
            )
        artifacts, blobs = (tuple(Doomed(**one) for one in raw[part]) for part in ("artifacts", "blobs"))
        return Plan(raw["created"], raw["grace_s"], artifacts, blobs)


def _reach(start: str, reason: str, live: dict[str, str], beyond: Callable[[str], Iterator[str]]) -> None:
    if start in live:
        return
    live[start] = reason
    waiting = [start]
    while waiting:
        for digest in beyond(waiting.pop()):
            if digest not in live:
                live[digest] = f"behind: {reason}" if not reason.startswith("behind: ") else reason
                waiting.append(digest)


def _named(record: StepRecord) -> Iterator[str]:
    """Every digest that a step record names: inputs, outputs, and what is pinned in parameters and values."""
    yield from record.key.inputs.values()
    yield from record.output.artifacts.values()
    yield from digests_in(dict(record.key.parameters))
    yield from digests_in(dict(record.output.values))


def _batches(items: tuple[Doomed, ...], size: int) -> Iterator[list[Doomed]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _count(spared: dict[str, int], reason: str) -> None:
    spared[reason] = spared.get(reason, 0) + 1


def _plan_key(digest: str) -> str:
    return f"gc/plans/{hex_of(digest)}.json"
