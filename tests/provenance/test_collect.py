"""Garbage collection: nothing reachable is ever gone, whatever is written, killed or used meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.infra.errors import ConflictError, InputError, IntegrityError, SluiceError
from sluice.provenance import collecting
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.attestation import Signer
from sluice.provenance.canonical import digest_bytes
from sluice.provenance.collect import Collector
from sluice.provenance.collecting import Announcement
from sluice.provenance.lease import this_process
from sluice.provenance.roots import Roots
from sluice.provenance.steps import StepKey, StepOutput, StepRunner
from tests.support.directory_store import DirectoryStore

CODE = digest_bytes(b"code")
DAY = 86400.0


def age(objects: DirectoryStore, days: float, prefix: str = "") -> None:
    for info in objects.list(prefix):
        os.utime(objects.root / info.key, (time.time() - days * DAY,) * 2)


class Store:
    """An object store with artifacts and steps, all of it as old as the test says."""

    def __init__(self, objects: DirectoryStore, folder: Path, signer: Signer) -> None:
        self.objects = objects
        self.artifacts = ArtifactStore(objects, folder / "cache")
        self.steps = StepRunner(objects, self.artifacts, signer, folder / "work")

    def put(self, content: str, metadata: dict[str, Any] | None = None, kind: str = "thing") -> str:
        files = {"own": content.encode(), "shared": b"the same everywhere"}
        return self.artifacts.put_files(files, kind, metadata).digest

    def step(self, name: str, *inputs: str, content: str = "") -> str:
        """Digest of what a step makes of these inputs; run again, it is a hit."""
        key = StepKey(name, CODE, {}, {f"input-{n}": digest for n, digest in enumerate(inputs)})
        record, _ = self.steps.run(key, lambda _: StepOutput({"made": self.put(content or f"made by {name}")}))
        return record.output.artifacts["made"]

    def collector(self, *live: str, evidence: tuple[str, ...] = (), batch: int = 2) -> Collector:
        roots = Roots(dict.fromkeys(live, "live"), dict.fromkeys(evidence, "evidence"))
        return Collector(self.objects, self.artifacts, lambda: roots, batch=batch)

    def is_whole(self, digest: str) -> bool:
        if not self.artifacts.exists(digest):
            return False
        return all(self.artifacts.read_file(digest, entry.path) for entry in self.artifacts.manifest(digest).files)


@pytest.fixture
def store(object_store: DirectoryStore, tmp_path: Path, signer: Signer) -> Store:
    return Store(object_store, tmp_path, signer)


def test_what_a_live_release_reaches_stays_and_the_rest_goes(store: Store) -> None:
    base, corpus = store.put("base"), store.put("corpus")
    dataset = store.step("curate", corpus)
    adapter = store.step("train", base, dataset)
    merged = store.put("merged", {"made_of": {"adapters": [adapter]}}, "model")
    failed = store.step("tune", dataset)
    report = store.step("report", failed)
    alone = store.put("nobody wants it", kind="analysis")
    age(store.objects, 8)
    collector = store.collector(merged, evidence=(report,))
    plan = collector.plan()
    assert {(one.digest, one.kind) for one in plan.artifacts} == {(failed, "thing"), (alone, "analysis")}
    assert len(plan.blobs) == 2, "what they share with others stays"
    assert {reason: tally.count for reason, tally in plan.kept.items()} == {"live": 1, "behind: live": 4, "evidence": 1}
    assert all(store.is_whole(one) for one in (failed, alone)), "a plan deletes nothing"
    done = collector.delete(plan.digest)
    assert (done.artifacts, done.blobs, dict(done.spared)) == (2, 2, {})
    assert done.bytes == sum(one.size for one in plan.blobs)
    assert not store.artifacts.exists(failed)
    assert all(store.is_whole(one) for one in (base, corpus, dataset, adapter, merged, report))
    assert len(list(store.steps.records())) == 4, "records stay"
    again = collector.plan()
    assert (again.artifacts, again.blobs) == ((), ())
    assert list(store.objects.list("collecting/")) == []


def test_what_lies_beside_a_release_stays_as_long_as_it(store: Store) -> None:
    live, gone = store.put("live"), store.put("gone")
    beside = [store.put(f"signature of {one}", {"subject": one}, "signature") for one in (live, gone)]
    age(store.objects, 30)
    collector = store.collector(live)
    assert {one.digest for one in collector.plan().artifacts} == {gone, beside[1]}


def test_what_came_from_another_site_keeps_its_history(store: Store) -> None:
    dataset = store.step("curate", store.put("corpus"))
    adapter = store.step("train", dataset)
    # Records of other sites lie apart, so that they are no hits here.
    for info in list(store.objects.list("steps/")):
        store.objects.put(f"sites/north/{info.key}", store.objects.get(info.key))
        store.objects.delete(info.key)
    age(store.objects, 30)
    assert store.collector(adapter).plan().artifacts == ()
    assert dataset in {one.digest for one in store.collector().plan().artifacts}


def test_what_is_younger_than_the_grace_stays(store: Store) -> None:
    old, young = store.put("old"), store.put("young")
    age(store.objects, 8)
    age(store.objects, 6, f"manifests/sha256/{young.removeprefix('sha256:')}")
    plan = store.collector().plan()
    assert [one.digest for one in plan.artifacts] == [old]
    assert "written within the grace" in plan.kept
    with pytest.raises(InputError, match="grace = 1 days is too short"):
        Collector(store.objects, store.artifacts, Roots, grace_s=DAY)


def test_a_step_within_the_grace_keeps_what_it_uses_and_a_hit_makes_its_record_young(store: Store) -> None:
    dataset = store.step("curate", store.put("corpus"))
    age(store.objects, 8)
    assert len(store.collector().plan().artifacts) == 2
    plan = store.collector().plan()
    store.step("curate", store.put("corpus"))
    done = store.collector().delete(plan.digest)
    assert done.artifacts == 0
    assert done.spared["used or made by a step within the grace"] == 2
    assert store.is_whole(dataset)


def test_a_plan_is_exact_and_cannot_be_changed(store: Store) -> None:
    first = store.put("first")
    age(store.objects, 8)
    plan = store.collector().plan()
    second = store.put("second")
    age(store.objects, 8)
    store.collector().delete(plan.digest)
    assert not store.artifacts.exists(first)
    assert store.is_whole(second), "the plan did not name it"
    with pytest.raises(InputError, match="is no plan"):
        store.collector().delete(digest_bytes(b"none"))
    (place,) = store.objects.list("gc/plans/")
    store.objects.put(place.key, json.dumps({"artifacts": []}).encode())
    with pytest.raises(IntegrityError, match="was changed"):
        store.collector().delete(plan.digest)


def test_roots_that_cannot_be_told_and_damaged_manifests_stop_everything(store: Store) -> None:
    digest = store.put("first")
    age(store.objects, 8)

    def silent() -> Roots:
        raise ConflictError("The ledger does not answer.")

    with pytest.raises(ConflictError):
        Collector(store.objects, store.artifacts, silent).plan()
    store.objects.put(f"manifests/sha256/{digest.removeprefix('sha256:')}", b"{}")
    with pytest.raises(IntegrityError):
        store.collector().plan()


def test_a_collector_that_was_stopped_for_long_deletes_nothing_more(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store.put("first")
    age(store.objects, 8)
    plan = store.collector().plan()
    head = store.objects.head

    def stopped(key: str) -> Any:
        found = head(key)
        monkeypatch.setattr("sluice.provenance.collecting.time.monotonic", lambda now=time.monotonic(): now + 1000)
        return found

    monkeypatch.setattr(store.objects, "head", stopped)
    with pytest.raises(ConflictError, match="stopped for so long"):
        store.collector().delete(plan.digest)
    assert store.is_whole(digest)


def test_a_writer_waits_for_an_announcement_and_writes_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = store.put("first")
    age(store.objects, 8)
    announced = Announcement(store.objects, [digest])
    announced.__enter__()
    waited: list[int] = []

    def collector_ends() -> None:
        waited.append(1)
        for info in [*store.objects.list("manifests/"), *store.objects.list("blobs/")]:
            store.objects.delete(info.key)
        announced.__exit__()

    monkeypatch.setattr(collecting, "pause", collector_ends)
    assert store.put("first") == digest
    assert waited == [1]
    assert store.is_whole(digest)


def test_the_announcement_of_a_killed_collector_is_passed_over(store: Store) -> None:
    place = "collecting/old.json"
    mine = this_process()
    gone = {"host": mine.host, "machine": mine.machine, "pid": mine.pid, "started": "0"}
    digest = store.put("first")
    store.objects.put(place, json.dumps({"process": gone, "expires": time.time() + 600, "digests": [digest]}).encode())
    assert store.put("first") == digest
    assert store.objects.head(place) is None


class Killed(BaseException):
    """Ends a collector or a writer between two requests."""


class Meddled(DirectoryStore):
    """Runs something before each request: a kill, or another process that gets its turn."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.turn: Callable[[], None] = lambda: None
        self.before_delete: Callable[[], None] = lambda: None

    def delete(self, key: str) -> None:
        if key.startswith(("manifests/", "blobs/")):
            self.before_delete()
        super().delete(key)

    def _path(self, key: str) -> Path:
        self.turn()
        return super()._path(key)

    def list(self, prefix: str) -> Any:
        self.turn()
        return super().list(prefix)


@pytest.mark.parametrize("looks", [True, False])
def test_a_writer_right_before_the_deletion_is_saved_by_looking_at_the_announcement(
    tmp_path: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch, looks: bool
) -> None:
    """The worst moment: the collector has asked everything, and deletes next. Without the look it would be lost."""
    objects = Meddled(tmp_path / "objects")
    store = Store(objects, tmp_path, signer)
    digest = store.put("first")
    age(objects, 8)
    plan = store.collector().plan()
    claimed: list[str] = []

    def write() -> None:
        objects.before_delete = lambda: None
        with contextlib.suppress(ConflictError):
            claimed.append(store.put("first"))

    objects.before_delete = write
    monkeypatch.setattr(collecting, "pause", _raise(ConflictError))
    if not looks:
        monkeypatch.setattr("sluice.provenance.artifacts.wait_for_collector", lambda *_: False)
    store.collector().delete(plan.digest)
    assert bool(claimed) is not looks, "it waits until the collector has ended"
    assert not store.is_whole(digest)
    assert store.put("first") == digest
    assert store.is_whole(digest)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_graph_kills_and_writers_lose_nothing_that_is_reachable(
    signer: Signer, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A random graph of random ages; collectors that are killed anywhere; writers that come between any two requests.

    A writer that would wait for the collector gives up and comes back when the collector has ended.
    """
    folder = Path(tempfile.mkdtemp(dir=tmp_path_factory.getbasetemp()))
    objects = Meddled(folder / "objects")
    store = Store(objects, folder, signer)
    made: list[str] = []
    for number in range(data.draw(st.integers(2, 6), label="artifacts")):
        before = data.draw(st.lists(st.sampled_from(made), max_size=2, unique=True), label="behind") if made else []
        if data.draw(st.booleans(), label="by a step"):
            made.append(store.step(f"step-{number}", *before))
        else:
            made.append(store.put(f"put-{number}", {"behind": before}))
    for info in list(objects.list("")):
        days = data.draw(st.sampled_from([1.0, 4.0, 8.0, 8.0, 30.0]), label="age")
        os.utime(objects.root / info.key, (time.time() - days * DAY,) * 2)
    roots = set(data.draw(st.lists(st.sampled_from(made), max_size=2), label="roots"))
    behind = {digest: _behind(store, digest) for digest in made}
    claimed: set[str] = set()

    class Waits(SluiceError):
        """The writer would have to wait for a collector that gets no turn meanwhile."""

    def write(number: int) -> None:
        """Another process stores or uses what is there already: it counts on it when the call returns."""
        turn, before = objects.turn, objects.before_delete
        objects.turn = objects.before_delete = lambda: None
        pause, collecting.pause = collecting.pause, _raise(Waits)
        try:
            writer = Store(objects, folder / "writer", signer)
            if number % 2:
                claimed.add(writer.put("again", {"behind": []}))
            made_again = made[number % len(made)]
            record = next((r for r in writer.steps.records() if made_again in r.output.artifacts.values()), None)
            if record is None:
                manifest = writer.artifacts.manifest(made_again)
                content = f"put-{made.index(made_again)}"
                claimed.add(writer.put(content, dict(manifest.metadata)))
            else:
                again, _ = writer.steps.run(record.key, lambda _: StepOutput({"made": writer.put(f"new {number}")}))
                claimed.update(again.output.artifacts.values())
        except SluiceError:
            # It waits, or what it would use is gone and it fails loudly: it counts on nothing.
            pass
        finally:
            objects.turn, objects.before_delete, collecting.pause = turn, before, pause

    def check() -> None:
        turn, objects.turn = objects.turn, lambda: None
        try:
            for digest in roots:
                for one in (digest, *behind[digest]):
                    assert store.is_whole(one), "reachable and gone"
            for digest in claimed:
                assert store.is_whole(digest), "a writer was told that it is stored, and it is gone"
        finally:
            objects.turn = turn

    for _ in range(data.draw(st.integers(1, 3), label="collections")):
        killed_at = data.draw(st.one_of(st.none(), st.integers(1, 120)), label="killed at")
        # Which of the collector's requests a writer comes before, and what it writes: mostly before a deletion.
        writes = data.draw(st.dictionaries(st.integers(1, 8), st.integers(0, 11), max_size=4), label="writers")
        elsewhere = data.draw(st.dictionaries(st.integers(1, 80), st.integers(0, 11), max_size=2), label="elsewhere")
        requests, deletions = [0], [0]

        def turn(
            requests: list[int] = requests,
            killed_at: int | None = killed_at,
            elsewhere: dict[int, int] = elsewhere,
        ) -> None:
            requests[0] += 1
            if requests[0] == killed_at:
                raise Killed
            if requests[0] in elsewhere:
                write(elsewhere[requests[0]])

        def before_delete(deletions: list[int] = deletions, writes: dict[int, int] = writes) -> None:
            deletions[0] += 1
            if deletions[0] in writes:
                write(writes[deletions[0]])

        collector = store.collector(*roots, batch=data.draw(st.integers(1, 3), label="batch"))
        objects.turn, objects.before_delete = turn, before_delete
        try:
            collector.delete(collector.plan().digest)
        except Killed:
            pass
        finally:
            objects.turn = objects.before_delete = lambda: None
        check()
        # A killed process is gone: its lease and its announcement are passed over, as `is_gone` tells.
        for info in [*objects.list("collecting/"), *objects.list("leases/")]:
            objects.delete(info.key)
        check()
    final = store.collector(*roots)
    final.delete(final.plan().digest)
    check()
    again = store.collector(*roots).plan()
    assert (again.artifacts, again.blobs) == ((), ()), "a second pass has nothing left to do"
    shutil.rmtree(folder)


def _behind(store: Store, digest: str) -> set[str]:
    """What an artifact reaches, by a second opinion that knows nothing of the collector."""
    found: set[str] = set()
    waiting = [digest]
    while waiting:
        current = waiting.pop()
        onward = list(store.artifacts.manifest(current).metadata.get("behind", []))
        for record in store.steps.records():
            if current in record.output.artifacts.values():
                onward += [*record.key.inputs.values(), *record.output.artifacts.values()]
        waiting += [one for one in onward if one not in found]
        found.update(onward)
    return found


def _raise(error: type[SluiceError]) -> Callable[[], None]:
    def pause() -> None:
        raise error("")

    return pause
