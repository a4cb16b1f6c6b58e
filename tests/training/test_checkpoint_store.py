"""The checkpoint store: what is kept, what is found damaged, and a process killed before every change it makes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.infra.errors import IntegrityError
from sluice.training import checkpoint_store
from sluice.training.checkpoint_files import MANIFEST, MARKER, CheckpointFailed
from sluice.training.checkpoint_store import KEEP_DAMAGED, CheckpointStore, steps_to_keep
from sluice.training.journal import Event
from sluice.training.recipe_sections import CheckpointSection

SHARDS = ("__0_0.distcp", "__1_0.distcp", ".metadata")


@dataclass
class Run:
    """A store, its clock and what it told."""

    folder: Path
    policy: CheckpointSection = field(default_factory=CheckpointSection)
    now: float = 1000.0
    events: list[Event] = field(default_factory=list)

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.folder, self.policy, self.events.append, clock=lambda: self.now)

    def save(self, step: int, loss: float | None = None) -> None:
        stage(self.store, step)
        self.store.publish(step, details={"step": step}, validation_loss=loss, world_size=2)

    def steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in self.store.complete()]

    def newest(self) -> int | None:
        found = self.store.newest_good()
        return found.step if found else None

    def told(self, kind: str) -> list[str]:
        return [event.sentence for event in self.events if event.kind == kind]


def stage(store: CheckpointStore, step: int) -> None:
    folder = store.staging(step)
    for number, name in enumerate(SHARDS):
        (folder / name).write_bytes(bytes([step % 256, number]) * 500)


@pytest.fixture(autouse=True)
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of files and folders in the order they were flushed, and renames; only the order is real.

    kill -9 takes nothing that was not flushed, so the tests need not wait for the disk thousands of times.
    """
    order: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: order.append(Path(f"/proc/self/fd/{handle}").readlink().name))
    for name in ("rename", "replace"):
        real = getattr(os, name)

        def move(source: Path, target: Path, real: Callable[[Path, Path], None] = real) -> None:
            real(source, target)
            order.append(f"{Path(source).name} -> {Path(target).name}")

        monkeypatch.setattr(os, name, move)
    return order


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "checkpoints")


def test_a_published_checkpoint_is_read_as_it_was_written(run: Run) -> None:
    stage(run.store, 10)
    details = {"guards": {"losses": [1.5, float("inf")]}}
    published = run.store.publish(10, details=details, validation_loss=0.25, world_size=4)
    found = run.store.newest_good()
    assert found == published
    assert (found.step, found.created, found.world_size, found.validation_loss) == (10, 1000.0, 4, 0.25)
    assert (found.details, found.size, sorted(entry.path for entry in found.files)) == (details, 3000, sorted(SHARDS))
    assert sorted(path.name for path in run.folder.iterdir()) == ["step_00000010"]
    assert sorted(path.name for path in found.folder.iterdir()) == sorted([*SHARDS, MANIFEST, MARKER])
    assert run.told("checkpoint") == ["Checkpoint of step 10 saved and verified (0.0 MiB)."]


def test_everything_is_on_the_disk_before_its_name_is(run: Run, flushed: list[str]) -> None:
    run.save(10)
    assert sorted(flushed[:4]) == sorted([*SHARDS, MANIFEST])
    assert flushed[4:] == [
        ".staging-step_00000010",
        ".staging-step_00000010 -> step_00000010",
        "checkpoints",
        ".staging-step_00000010.marker",
        ".staging-step_00000010.marker -> COMPLETE",
        "step_00000010",
    ]


def test_nothing_is_found_where_nothing_was_saved(run: Run) -> None:
    assert (run.newest(), run.steps(), run.store.best()) == (None, [], None)


def truncate(folder: Path) -> None:
    os.truncate(folder / SHARDS[1], 999)


def flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return damage


def replace_by_folder(folder: Path) -> None:
    (folder / SHARDS[0]).unlink()
    (folder / SHARDS[0]).mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated shard": (truncate, "__1_0.distcp has 999 bytes where 1000 were written."),
    "flipped bit": (flip(SHARDS[0]), "__0_0.distcp does not hold the bytes that were written."),
    "missing file": (lambda folder: (folder / SHARDS[0]).unlink(), "__0_0.distcp is missing."),
    "missing index": (lambda folder: (folder / ".metadata").unlink(), ".metadata is missing."),
    "extra file": (lambda folder: (folder / "x").write_bytes(b""), "x does not belong to it."),
    "missing marker": (lambda folder: (folder / MARKER).unlink(), "It has no file COMPLETE"),
    "flipped bit of the marker": (flip(MARKER), "COMPLETE cannot be read"),
    "missing manifest": (lambda folder: (folder / MANIFEST).unlink(), "MANIFEST.json cannot be read"),
    "flipped bit of the manifest": (flip(MANIFEST), "MANIFEST.json is not the one that COMPLETE names."),
    "folder instead of a file": (replace_by_folder, "__0_0.distcp is missing."),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_older_one_taken(run: Run, name: str) -> None:
    damage, reason = DAMAGES[name]
    for step in (10, 20):
        run.save(step)
    damage(run.folder / "step_00000020")
    assert run.newest() == 10
    (sentence,) = run.told("checkpoint_damaged")
    assert sentence.startswith(f"The checkpoint of step 20 is damaged and was set aside: {reason}")
    assert sentence.endswith("The one of step 10 is tried next.")
    assert (run.folder / ".damaged-step_00000020").is_dir()
    # It is told once, and the step can be saved again.
    assert run.newest() == 10
    assert len(run.told("checkpoint_damaged")) == 1
    run.save(20)
    assert run.newest() == 20


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7), which=st.sampled_from([*SHARDS, MANIFEST, MARKER]))
@settings(max_examples=60, deadline=None)
def test_no_flipped_bit_goes_unnoticed(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int, which: str
) -> None:
    run = Run(tmp_path_factory.mktemp("flip"))
    run.save(10)
    path = run.folder / "step_00000010" / which
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)
    assert run.newest() is None


def test_a_folder_under_another_name_is_not_that_checkpoint(run: Run) -> None:
    run.save(10)
    (run.folder / "step_00000010").rename(run.folder / "step_00000030")
    assert run.steps() == []
    assert run.newest() is None
    assert "MANIFEST.json is of step 10." in run.told("checkpoint_damaged")[0]
    assert run.told("checkpoint_damaged")[0].endswith("There is no older one.")


def test_only_a_few_damaged_ones_are_kept(run: Run) -> None:
    run.policy = CheckpointSection(keep_last=6)
    for step in range(1, 6):
        run.save(step)
        truncate(run.folder / f"step_{step:08d}")
    assert run.newest() is None
    assert len(run.told("checkpoint_damaged")) == 5
    assert len(list(run.folder.iterdir())) == KEEP_DAMAGED


def test_the_last_the_best_and_one_for_each_so_many_hours_are_kept(run: Run) -> None:
    run.policy = CheckpointSection(keep_last=2, keep_every_hours=2)
    for number in range(1, 11):
        run.now = 1000 + number * 1800.0
        run.save(number, {3: 0.1, 6: float("nan")}.get(number, 0.5))
    assert run.steps() == [1, 3, 5, 9, 10]
    best = run.store.best()
    assert best is not None
    assert best.step == 3


@dataclass(frozen=True)
class Copy:
    step: int
    created: float
    validation_loss: float | None


@given(
    losses=st.lists(st.none() | st.floats(0, 9), max_size=12),
    gaps=st.lists(st.floats(0, 9000), min_size=12, max_size=12),
    last=st.integers(1, 4),
    hours=st.none() | st.floats(0.5, 3),
)
def test_pruning_step_by_step_keeps_what_is_promised(
    losses: list[float | None], gaps: list[float], last: int, hours: float | None
) -> None:
    policy = CheckpointSection(keep_last=last, keep_every_hours=hours)
    there: list[Copy] = []
    every: list[Copy] = []
    now = 0.0
    for step, (loss, gap) in enumerate(zip(losses, gaps, strict=False), start=1):
        now += gap
        every.append(Copy(step, now, loss))
        there.append(every[-1])
        keep = steps_to_keep(there, policy)
        there = [copy for copy in there if copy.step in keep]
        kept = {copy.step for copy in there}
        assert {copy.step for copy in every[-last:]} <= kept
        measured = [copy.validation_loss for copy in every if copy.validation_loss is not None]
        if measured:
            assert min(measured) in [copy.validation_loss for copy in there]
        if hours is not None:
            assert every[0].step in kept
            # Nowhere a longer hole than the policy and one save's distance make.
            times = [copy.created for copy in there]
            assert all(b - a < hours * 3600 + max(gaps) for a, b in pairwise(times))


def test_a_loss_measured_after_the_save_counts(run: Run) -> None:
    run.policy = CheckpointSection(keep_last=1)
    run.save(10)
    run.store.set_validation_loss(10, 0.3)
    run.save(20, 0.4)
    assert run.steps() == [10, 20]
    found = run.store.newest_good()
    assert found is not None
    assert found.validation_loss == 0.4
    best = run.store.best()
    assert best is not None
    assert (best.step, best.validation_loss) == (10, 0.3)
    run.store.set_validation_loss(20, float("nan"))
    run.store.set_validation_loss(30, 0.1)
    assert run.newest() == 20

    # Measured while the save is on its way: it is written when it is published.
    store = run.store
    stage(store, 30)
    store.set_validation_loss(30, 0.2)
    assert store.publish(30, details={}).validation_loss == 0.2


def test_a_roll_back_takes_newer_ones_back_and_says_which(run: Run) -> None:
    run.policy = CheckpointSection(keep_last=5)
    for step in (10, 20, 30):
        run.save(step)
    digests = {checkpoint.step: checkpoint.digest for checkpoint in run.store.complete()}
    run.store.discard_after(10)
    assert run.steps() == [10]
    assert run.store.discarded() == (digests[30], digests[20])
    run.now += 1
    run.save(20)
    assert run.steps() == [10, 20]
    assert run.store.complete()[-1].digest not in run.store.discarded()


def test_the_best_one_is_verified_before_it_is_used(run: Run) -> None:
    run.policy = CheckpointSection(keep_last=5)
    for step, loss in ((10, 0.7), (20, 0.5), (30, 0.9)):
        run.save(step, loss)
    shard = run.folder / "step_00000020" / SHARDS[0]
    shard.write_bytes(b"\xff" + shard.read_bytes()[1:])
    best = run.store.best()
    assert best is not None
    assert best.step == 10
    assert run.steps() == [10, 30]
    [told] = run.told("checkpoint_damaged")
    assert told.endswith("The one of step 10 is tried next.")


def test_a_step_saved_twice_is_one_checkpoint(run: Run) -> None:
    run.save(10)
    first = run.store.newest_good()
    run.now += 60
    run.save(10)
    assert run.store.newest_good() == first
    assert len(run.told("checkpoint")) == 1

    # A damaged one of the same step gives way.
    truncate(run.folder / "step_00000010")
    run.save(10)
    found = run.store.newest_good()
    assert found is not None
    assert found.created == 1060
    assert sorted(path.name for path in run.folder.iterdir()) == ["step_00000010"]


def test_a_file_that_the_disk_gives_back_otherwise_is_found_at_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.save(10)
    stage(run.store, 20)

    def flush_badly(path: Path, *, forget: bool = False) -> None:
        if path.name == SHARDS[0]:
            flip(SHARDS[0])(path.parent)

    monkeypatch.setattr(checkpoint_store, "flush", flush_badly)
    with pytest.raises(IntegrityError, match=r"__0_0\.distcp does not hold the bytes that were written"):
        run.store.publish(20, details={})
    monkeypatch.undo()
    assert [path.name for path in run.folder.iterdir()] == ["step_00000010"]
    assert run.newest() == 10


def test_a_full_disk_is_told_and_the_older_one_stays(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.save(10)
    with pytest.raises(CheckpointFailed, match=r"the disk is full \(1048576.00 GiB needed, .* free\)") as caught:
        run.store.staging(20, needed=2**50)
    assert (caught.value.needed, caught.value.exit_code) == (2**50, 3)
    assert 0 < caught.value.free < 2**50
    run.store.abandon(20, caught.value)
    (sentence,) = run.told("checkpoint_failed")
    assert sentence.startswith("The checkpoint of step 20 was not saved: ")
    assert "the disk is full" in sentence
    assert sentence.endswith("The one of step 10 is still good.")

    # Full in the middle of the manifest.
    stage(run.store, 20)

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_store, "write_flushed", full)
    with pytest.raises(CheckpointFailed, match=r"the disk is full \(0.0 MiB needed"):
        run.store.publish(20, details={})
    monkeypatch.undo()
    assert [path.name for path in run.folder.iterdir()] == ["step_00000010"], "its space is free again"
    run.save(20)
    assert run.newest() == 20


def test_an_old_one_that_cannot_be_removed_does_not_spoil_the_save(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.policy = CheckpointSection(keep_last=1)
    run.save(10)

    def refuse(store: CheckpointStore, folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(CheckpointStore, "_take_out", refuse)
    run.save(20)
    assert run.steps() == [10, 20]
    assert run.told("checkpoint")[-1] == "The old checkpoint of step 10 cannot be removed: Permission denied."
    monkeypatch.undo()
    run.save(30)
    assert run.steps() == [30]


CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def die_at_change(number: int, work: Callable[[], object]) -> bool:
    """Run `work` in a copy of this process, killed with -9 before its `number`-th change of the file system.

    Whether it was killed: False when `work` makes fewer changes than that.
    """
    child = os.fork()
    if child == 0:
        left = number

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event in CHANGES or (event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(watch)
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_killed_at_every_change_of_a_save_nothing_is_lost(tmp_path: Path) -> None:
    """A save that also prunes: two checkpoints are there, one stays, a third is on its way."""
    number, killed, outcomes = 0, True, set()
    while killed:
        run = Run(tmp_path / str(number), CheckpointSection(keep_last=1))
        run.save(10)
        run.save(20)
        killed = die_at_change(number, lambda run=run: run.save(30))  # type: ignore[misc]
        newest = run.newest()
        outcomes.add(newest)
        assert newest in (20, 30)
        assert all("It has no file COMPLETE" in sentence for sentence in run.told("checkpoint_damaged"))
        assert not [path for path in run.folder.iterdir() if path.name.startswith((".staging", ".removing"))]
        # Running again converges.
        run.save(30)
        assert run.newest() == 30
        assert [path.name for path in run.folder.iterdir() if not path.name.startswith(".damaged")] == ["step_00000030"]
        number += 1
    assert outcomes == {20, 30}
    assert number > 15


def test_killed_at_every_change_of_a_roll_back_or_a_loss_the_rest_is_good(tmp_path: Path) -> None:
    number, killed = 0, True
    while killed:
        run = Run(tmp_path / str(number), CheckpointSection(keep_last=3))
        for step in (10, 20, 30):
            run.save(step, 0.5)

        def work(store: CheckpointStore = run.store) -> None:
            store.set_validation_loss(10, 0.25)
            store.discard_after(10)

        killed = die_at_change(number, work)
        assert run.newest() in (10, 20, 30)
        assert run.steps() in ([10], [10, 20], [10, 20, 30])
        assert {checkpoint.validation_loss for checkpoint in run.store.complete()} <= {0.5, 0.25}
        assert run.told("checkpoint_damaged") == []
        number += 1
    assert run.steps() == [10]


SAVE_FOR_EVER = """
import sys
from pathlib import Path
from sluice.training.checkpoint_store import CheckpointStore
from sluice.training.recipe_sections import CheckpointSection
store = CheckpointStore(Path(sys.argv[1]), CheckpointSection(keep_last=1), lambda event: None)
found = store.newest_good()
step = found.step if found else 0
while True:
    step += 1
    for name in ("a", "b"):
        (store.staging(step) if name == "a" else store.folder / f".staging-step_{step:08d}").joinpath(name).write_bytes(
            bytes([step % 256]) * 300_000
        )
    store.publish(step, details={"step": step})
    print(step, flush=True)
"""


def test_a_process_killed_while_it_saves_without_end_goes_on_from_its_last(tmp_path: Path) -> None:
    said = 0
    for pause in (0.0, 0.003, 0.007, 0.013):
        process = subprocess.Popen([sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        for _ in range(3):
            said = int(process.stdout.readline())
        try:
            process.wait(pause)
        except subprocess.TimeoutExpired:
            pass
        process.kill()
        rest = process.stdout.read().split()
        process.wait()
        said = int(rest[-1]) if rest else said
        run = Run(tmp_path)
        newest = run.newest()
        assert newest is not None
        assert newest in (said, said + 1), "what was said to be saved is there"
