"""Leases: one holder of eight, followed when it dies or falls silent, and given back."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sluice.infra.errors import IntegrityError
from sluice.infra.object_store import ObjectExists
from sluice.provenance import lease as lease_module
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.attestation import Signer
from sluice.provenance.canonical import digest_bytes
from sluice.provenance.lease import Edition, Leases, Process, this_process
from sluice.provenance.steps import StepKey, StepOutput, StepRunner
from tests.support.directory_store import DirectoryStore

RACERS = 8
KEY = StepKey("train", digest_bytes(b"code"), {"seed": 1})
ELSEWHERE = Process("other-host", "another boot", 1, "1")
_state: dict[str, Any] = {}


def begin(barrier: Barrier, root: Path) -> None:
    _state.update(barrier=barrier, root=root, signer=Signer.load_or_create(root / "signer.pem"))


def run_step(number: int) -> tuple[bool, str, bool]:
    root = _state["root"]
    objects = DirectoryStore(root / "objects")
    artifacts = ArtifactStore(objects, root / f"cache-{number}")
    # Each process is a machine of its own as far as the local lock goes.
    runner = StepRunner(objects, artifacts, _state["signer"], root / f"machine-{number}")
    called: list[int] = []

    def function(folder: Path) -> StepOutput:
        called.append(number)
        time.sleep(0.2)
        return StepOutput({"adapter": artifacts.put_files({"weights": f"{number}".encode()}, "adapter").digest})

    _state["barrier"].wait(30)
    record, hit = runner.run(KEY, function)
    return hit, record.statement, bool(called)


def test_of_eight_processes_one_computes_and_all_get_its_record(tmp_path: Path) -> None:
    Signer.load_or_create(tmp_path / "signer.pem")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["securesystemslib.dsse", "google.protobuf.json_format", __name__])
    barrier = context.Barrier(RACERS)
    with ProcessPoolExecutor(RACERS, mp_context=context, initializer=begin, initargs=(barrier, tmp_path)) as pool:
        results = list(pool.map(run_step, range(RACERS)))
    assert sum(called for *_, called in results) == 1
    assert sum(not hit for hit, *_ in results) == 1
    assert len({statement for _, statement, _ in results}) == 1
    assert list(DirectoryStore(tmp_path / "objects").list("leases/")) == []


def hold_for_ever(root: str, taken: Any) -> None:
    with Leases(DirectoryStore(Path(root))).hold("work"):
        taken.set()
        time.sleep(60)


def test_a_holder_that_was_killed_on_this_machine_is_followed_at_once(object_store: DirectoryStore) -> None:
    context = multiprocessing.get_context("fork")
    taken = context.Event()
    child = context.Process(target=hold_for_ever, args=(str(object_store.root), taken))
    child.start()
    assert taken.wait(10)
    holder = Leases(object_store).holder("work")
    assert holder is not None
    assert holder.process.pid == child.pid
    os.kill(child.pid or 0, signal.SIGKILL)
    # A zombie counts as gone: the one who waits may be its parent.
    begun = time.monotonic()
    with Leases(object_store).hold("work") as lease:
        assert lease is not None
        assert time.monotonic() - begun < 5, "not after its minute"
    child.join()
    assert list(object_store.list("leases/")) == []


def foreign(leases: Leases, number: int, expires: float) -> None:
    leases._create("work", Edition(number, "their-holder", ELSEWHERE, time.time(), expires))


def test_a_silent_holder_elsewhere_is_followed_by_our_own_clock(object_store: DirectoryStore) -> None:
    # Its clock is an hour ahead: what it wrote cannot tell that it is gone.
    leases = Leases(object_store, duration_s=0.4)
    foreign(leases, 7, time.time() + 3600)
    said: list[str] = []
    begun = time.monotonic()
    with leases.hold("work", report=lambda _d, _t, text: said.append(text)) as lease:
        assert lease is not None
        assert time.monotonic() - begun >= 0.4
        with pytest.raises(ObjectExists):
            leases.renew("work", Edition(7, "their-holder", ELSEWHERE, 0, 0))
    assert len(said) == 1
    assert "process 1 on other-host, since 2" in said[0]
    assert list(object_store.list("leases/")) == []


def test_a_clock_that_runs_ahead_does_not_take_a_living_lease(object_store: DirectoryStore) -> None:
    leases = Leases(object_store, duration_s=30)
    foreign(leases, 1, time.time() - 200)  # Our clock is some minutes ahead of the holder's.
    looks = iter([False, False, True])
    with leases.hold("work", until=lambda: next(looks)) as lease:
        assert lease is None
    foreign(leases, 2, time.time() - 1000)
    object_store.delete("leases/work/00000001.json")
    with leases.hold("work") as lease:
        assert lease is not None, "left long ago"


def test_a_lease_is_renewed_while_it_is_held_and_not_after(object_store: DirectoryStore) -> None:
    leases = Leases(object_store, duration_s=0.3)
    with leases.hold("work") as lease:
        assert lease is not None
        time.sleep(0.8)
        assert not lease.lost
        (only,) = object_store.list("leases/work/")
        assert int(Path(only.key).stem) >= 3
    assert list(object_store.list("leases/")) == []


def test_a_holder_that_was_overtaken_notices_and_leaves_the_winner_alone(object_store: DirectoryStore) -> None:
    leases = Leases(object_store, duration_s=0.3)
    with leases.hold("work") as lease:
        assert lease is not None
        foreign(leases, 2, time.time() + 60)
        time.sleep(0.3)
        assert lease.lost
    assert [Path(info.key).stem for info in object_store.list("leases/")] == ["00000002"]


def test_a_step_whose_lease_was_lost_takes_the_record_of_the_faster_machine(
    object_store: DirectoryStore, artifacts: ArtifactStore, signer: Signer, tmp_path: Path
) -> None:
    slow = StepRunner(object_store, artifacts, signer, tmp_path / "slow", leases=Leases(object_store, duration_s=0.2))
    fast = StepRunner(object_store, artifacts, signer, tmp_path / "fast", leases=Leases(object_store, duration_s=0.2))
    said: list[str] = []

    def compute(text: bytes) -> StepOutput:
        return StepOutput({"adapter": artifacts.put_files({"weights": text}, "adapter").digest})

    def cut_off(_: Path) -> StepOutput:
        # As after a long pause of the whole machine: its editions are gone, another machine did the work.
        for info in list(object_store.list("leases/")):
            object_store.delete(info.key)
        assert not fast.run(KEY, lambda _: compute(b"fast"))[1]
        time.sleep(0.3)
        return compute(b"slow")

    record, hit = slow.run(KEY, cut_off, lambda _d, _t, text: said.append(text))
    assert hit
    assert record == fast.find(KEY)
    assert len(list(object_store.list("steps/"))) == 1


def test_a_failed_holder_gives_the_lease_back(object_store: DirectoryStore) -> None:
    leases = Leases(object_store)
    with pytest.raises(ValueError, match="broken"), leases.hold("work"):
        raise ValueError("broken")
    assert leases.holder("work") is None
    assert list(object_store.list("leases/")) == []


def test_what_is_no_lease_is_told(object_store: DirectoryStore) -> None:
    object_store.put("leases/work/00000001.json", json.dumps({"holder": "x"}).encode())
    with pytest.raises(IntegrityError, match=r"leases/work/00000001\.json' is not a lease"):
        Leases(object_store).holder("work")


def test_a_reused_process_id_is_another_process() -> None:
    mine = this_process()
    assert not mine.is_gone()
    assert Process(mine.host, mine.machine, mine.pid, "1").is_gone()
    assert not Process(mine.host, "another boot", mine.pid, "1").is_gone(), "of other machines nothing is known"
    assert not Process(mine.host, "", mine.pid, "1").is_gone()


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["try", "die", "release", "renew"])), max_size=40))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_of_takes_deaths_and_renewals_has_one_living_holder(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[int, str]]
) -> None:
    """Four holders by turns. A dead one is known to be gone, so at most one living holder exists at any time."""
    objects = DirectoryStore(tmp_path_factory.mktemp("leases"))
    dead: set[str] = set()

    class Mortal(Leases):
        def _expired(self, edition: Edition) -> bool:
            return edition.holder in dead

    leases = [Mortal(objects, duration_s=1000) for _ in range(4)]
    held: dict[int, lease_module.Lease] = {}
    for who, move in moves:
        if move == "try" and who not in held:
            taken = leases[who]._try("work", {})
            if isinstance(taken, lease_module.Lease):
                held[who] = taken
            assert len(held) <= 1
            assert held, "somebody gets it"
        elif who in held:
            one = held[who]
            if move == "die":
                dead.add(one._edition.holder)
                one._end.set()
                del held[who]
            elif move == "release":
                one.release()
                del held[who]
            elif move == "renew":
                one._edition = leases[who].renew("work", one._edition)
    for one in held.values():
        one.release()
