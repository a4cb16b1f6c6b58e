"""Copies of checkpoints in an object store: killed uploads, damaged copies, and the thread beside training."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sluice.infra.errors import IntegrityError, UnavailableError
from sluice.infra.object_store import ObjectMissing
from sluice.infra.transfer import Moved, ignore_moved
from sluice.training.checkpoint_files import Checkpoint
from sluice.training.checkpoint_mirror import CheckpointMirror, MirrorThread, mirrored
from sluice.training.checkpoint_store import CheckpointStore
from sluice.training.job import CHECKPOINTS, Job
from sluice.training.journal import Event, Journal
from sluice.training.recipe import load_recipe
from sluice.training.recipe_sections import CheckpointSection
from tests.support.directory_store import DirectoryStore
from tests.support.faulty_store import FAULTS, FaultyStore, ProcessDied

PREFIX = "training/run-1/checkpoints"
KEEP_ALL = CheckpointSection(keep_last=9)


class CountingStore(DirectoryStore):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.sent: list[str] = []

    def put_file(self, key: str, path: Path, *, if_absent: bool = False, moved: Moved = ignore_moved) -> None:
        self.sent.append(path.name)
        super().put_file(key, path, if_absent=if_absent, moved=moved)


class Machine:
    """A disk with a store of checkpoints, and what was told there."""

    def __init__(self, folder: Path, policy: CheckpointSection = KEEP_ALL) -> None:
        self.events: list[Event] = []
        self.store = CheckpointStore(folder, policy, self.events.append)

    def save(self, step: int, loss: float | None = None) -> Checkpoint:
        folder = self.store.staging(step)
        for number, name in enumerate(("a.distcp", "b.distcp", ".metadata")):
            (folder / name).write_bytes(bytes([step, number]) * 400)
        return self.store.publish(step, details={"step": step}, validation_loss=loss, world_size=2)

    def steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in self.store.complete()]

    def told(self, kind: str) -> list[str]:
        return [event.sentence for event in self.events if event.kind == kind]


@pytest.fixture
def here(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "here")


@pytest.fixture
def there(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "there")


def files_of(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.folder.iterdir()}


def test_a_checkpoint_is_the_same_on_another_machine(
    here: Machine, there: Machine, object_store: DirectoryStore
) -> None:
    mirror = CheckpointMirror(object_store, PREFIX)
    assert (mirror.newest(), mirror.restore(there.store)) == (None, None)
    saved = here.save(10, 0.5)
    assert mirror.upload(saved) > saved.size
    copy = mirror.newest()
    assert copy is not None
    assert (copy.step, copy.digest, copy.validation_loss, copy.size) == (10, saved.digest, 0.5, 2400)
    fetched = mirror.restore(there.store)
    assert fetched is not None
    assert files_of(fetched) == files_of(saved)
    assert there.store.newest_good() == fetched
    assert there.told("checkpoint") == ["Checkpoint of step 10 fetched from the object store and verified (0.0 MiB)."]
    assert mirror.restore(there.store) is None, "it is up to date"
    assert mirror.restore(here.store) is None


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5])
def test_an_upload_that_broke_off_is_no_copy_and_goes_on(
    tmp_path: Path, here: Machine, there: Machine, kind: str, nth: int
) -> None:
    objects = FaultyStore(tmp_path / "objects")
    mirror = CheckpointMirror(objects, PREFIX)
    mirror.upload(here.save(10))
    saved = here.save(20)
    objects.arm(kind, nth)  # type: ignore[arg-type]
    try:
        mirror.upload(saved)
    except (ProcessDied, UnavailableError):
        found = mirror.newest()
        assert found is not None
        # The marker is the fifth write; one that was written whole counts, whether its answer was heard or not.
        assert found.step == (20 if nth == 5 and kind in ("dies after", "answer lost") else 10)
    assert objects.disarm()
    mirror.upload(saved)
    fetched = mirror.restore(there.store)
    assert fetched is not None
    assert files_of(fetched) == files_of(saved)


def test_bytes_that_are_there_are_not_sent_again(tmp_path: Path, here: Machine) -> None:
    objects = CountingStore(tmp_path / "objects")
    mirror = CheckpointMirror(objects, PREFIX)
    saved = here.save(10)
    mirror.upload(saved)
    assert sorted(objects.sent) == [".metadata", "a.distcp", "b.distcp"]
    assert mirror.upload(saved) == 0
    # A loss that came later changes the marker alone.
    here.store.set_validation_loss(10, 0.25)
    changed = here.store.complete()[-1]
    assert 0 < mirror.upload(changed) < 1000
    assert len(objects.sent) == 3
    best = mirror.newest()
    assert best is not None
    assert best.validation_loss == 0.25
    # Of a broken upload, what is there stays; a file that is not whole is replaced.
    key = f"{PREFIX}/step_00000010/"
    objects.delete(key + "COMPLETE")
    name = saved.files[1].digest.removeprefix("sha256:")
    objects.put(key + name, b"half")
    mirror.upload(changed)
    assert objects.sent[3:] == [saved.files[1].path] * 2
    assert objects.get(key + name) == (saved.folder / saved.files[1].path).read_bytes()


def test_the_same_step_with_other_bytes_replaces_the_copy(
    here: Machine, there: Machine, tmp_path: Path, object_store: DirectoryStore
) -> None:
    mirror = CheckpointMirror(object_store, PREFIX)
    mirror.upload(here.save(10))
    other = Machine(tmp_path / "other")
    folder = other.store.staging(10)
    (folder / "a.distcp").write_bytes(b"other")
    saved = other.store.publish(10, details={})
    mirror.upload(saved)
    fetched = mirror.restore(there.store)
    assert fetched is not None
    assert files_of(fetched) == files_of(saved)
    mirror.prune(KEEP_ALL)
    assert len(list(object_store.list(PREFIX))) == 3, "nothing of the first one is left"


def damage_shard(objects: DirectoryStore, key: str) -> None:
    objects.put(key, b"\0" + objects.get(key)[1:])


DAMAGES: dict[str, tuple[str, Callable[[DirectoryStore, str], None]]] = {
    "a flipped byte": ("a.distcp", damage_shard),
    "a missing file": ("a.distcp", lambda objects, key: objects.delete(key)),
    "a truncated file": ("a.distcp", lambda objects, key: objects.put(key, objects.get(key)[:-1])),
    "a damaged marker": ("COMPLETE", lambda objects, key: objects.put(key, objects.get(key)[:-9])),
    "a damaged manifest": ("MANIFEST.json", damage_shard),
    "a missing manifest": ("MANIFEST.json", lambda objects, key: objects.delete(key)),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_copy_is_not_restored_and_the_older_one_is(
    here: Machine, there: Machine, object_store: DirectoryStore, name: str
) -> None:
    which, damage = DAMAGES[name]
    mirror = CheckpointMirror(object_store, PREFIX)
    older, newer = here.save(10), here.save(20)
    for saved in (older, newer):
        mirror.upload(saved)
    digests = {entry.path: entry.digest.removeprefix("sha256:") for entry in newer.files}
    digests |= {"MANIFEST.json": newer.digest.removeprefix("sha256:"), "COMPLETE": "COMPLETE"}
    damage(object_store, f"{PREFIX}/step_00000020/{digests[which]}")
    with pytest.raises((IntegrityError, ObjectMissing)):
        mirror.fetch(20, there.store)
    assert list(there.store.folder.glob(".*")) == []
    fetched = mirror.restore(there.store)
    assert fetched is not None
    assert files_of(fetched) == files_of(older)
    assert there.steps() == [10]
    if which == "a.distcp":
        (sentence,) = there.told("checkpoint_damaged")
        assert sentence.startswith("The copy of step 20 in the object store is damaged and is not used: ")


def test_what_a_roll_back_took_back_is_not_fetched_again(here: Machine, object_store: DirectoryStore) -> None:
    """The launcher was killed between the roll-back and the removal of the copy: the newest copy is the spoilt one."""
    mirror = CheckpointMirror(object_store, PREFIX)
    mirror.upload(here.save(10, 0.9))
    mirror.upload(here.save(20, 0.1))
    here.store.discard_after(10)
    assert mirror.restore(here.store) is None
    assert here.steps() == [10]


def test_another_machine_has_the_journal_of_all_attempts(tmp_path: Path, object_store: DirectoryStore) -> None:
    mirror, recipe = CheckpointMirror(object_store, PREFIX), load_recipe("tiny")
    first, second = (Job(tmp_path / name, tmp_path, tmp_path, None, recipe, 6) for name in ("first", "second"))
    for job in (first, second):
        job.work_dir.mkdir()
    Journal(first.work_dir).write(Event("started", "Attempt 1."))
    store = CheckpointStore(first.work_dir / CHECKPOINTS, recipe.checkpoints, Journal(first.work_dir).write)
    folder = store.staging(2)
    for path in Journal(first.work_dir).files():
        shutil.copyfile(path, folder / path.name)
    mirror.upload(store.publish(2, details={}))
    with mirrored(second, mirror):
        pass
    kinds = [event.kind for event in Journal(second.work_dir).read(Event)]
    assert kinds == ["started", "checkpoint"]


def test_a_damaged_checkpoint_is_not_uploaded(here: Machine, object_store: DirectoryStore) -> None:
    saved = here.save(10)
    (saved.folder / "a.distcp").write_bytes(b"x" * 800)
    mirror = CheckpointMirror(object_store, PREFIX)
    with pytest.raises(IntegrityError, match="does not hold the bytes that were written: it is not uploaded"):
        mirror.upload(saved)
    assert mirror.newest() is None


def test_copies_are_pruned_as_the_policy_says_and_the_best_is_fetched_too(
    here: Machine, there: Machine, object_store: DirectoryStore
) -> None:
    mirror = CheckpointMirror(object_store, PREFIX)
    for step, loss in ((10, 0.1), (20, 0.3), (30, 0.2), (40, 0.4)):
        mirror.upload(here.save(step, loss))
    object_store.put(f"{PREFIX}/step_00000015/{'0' * 64}", b"left by a killed upload")
    object_store.put(f"{PREFIX}/step_00000050/{'0' * 64}", b"being uploaded")
    mirror.prune(CheckpointSection(keep_last=1))
    assert [copy.step for copy in mirror.copies()] == [10, 40]
    left = {info.key.split("/")[-2] for info in object_store.list(PREFIX)}
    assert left == {"step_00000010", "step_00000040", "step_00000050"}
    fetched = mirror.restore(there.store)
    assert fetched is not None
    assert fetched.step == 40
    assert there.steps() == [10, 40]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_thread_follows_saves_and_roll_backs(here: Machine, object_store: DirectoryStore) -> None:
    told: list[Event] = []
    mirror = CheckpointMirror(object_store, PREFIX)
    thread = MirrorThread(here.store, mirror, told.append, look_every_s=0.01).start()
    here.save(10, 0.1)
    wait_for(lambda: len(told) == 1)
    assert (told[0].kind, told[0].step) == ("uploaded", 10)
    assert told[0].sentence.startswith("Checkpoint of step 10 uploaded (0.0 MiB in ")
    assert told[0].details["bytes"] > 2400
    here.save(20)
    here.save(30)
    wait_for(lambda: (copy := mirror.newest()) is not None and copy.step == 30)
    here.store.discard_after(10)
    wait_for(lambda: [copy.step for copy in mirror.copies()] == [10])
    here.save(40)
    assert thread.close(20), "the last one is uploaded on close"
    assert [copy.step for copy in mirror.copies()] == [10, 40]


def test_the_thread_keeps_trying_and_says_so_once(
    here: Machine, object_store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Event] = []
    tries = threading.Semaphore(0)
    real = DirectoryStore.put_file

    def unavailable(*_: object, **__: object) -> None:
        tries.release()
        raise UnavailableError("The object store does not answer.", hint="Is it running?")

    monkeypatch.setattr(DirectoryStore, "put_file", unavailable)
    mirror = CheckpointMirror(object_store, PREFIX)
    thread = MirrorThread(here.store, mirror, told.append, look_every_s=0.001).start()
    here.save(10)
    for _ in range(8):
        assert tries.acquire(timeout=20)
    monkeypatch.setattr(DirectoryStore, "put_file", real)
    wait_for(lambda: mirror.newest() is not None)
    assert thread.close(20)
    assert [event.kind for event in told] == ["upload_failed", "uploaded"]
    assert told[0].sentence == (
        "The checkpoint of step 10 could not be uploaded, it is tried again: "
        "The object store does not answer. Is it running?"
    )
    assert told[1].details["attempts"] > 1


def test_a_store_that_hangs_does_not_keep_the_launcher(
    here: Machine, object_store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Event] = []
    free = threading.Event()
    monkeypatch.setattr(DirectoryStore, "put_file", lambda *_, **__: free.wait(20))
    here.save(10)
    thread = MirrorThread(here.store, CheckpointMirror(object_store, PREFIX), told.append, look_every_s=0.01).start()
    begun = time.monotonic()
    assert not thread.close(0.2)
    assert time.monotonic() - begun < 5
    assert told[-1].sentence == "The newest checkpoint was not uploaded within 0.2 s; it is on this machine's disk."
    free.set()
