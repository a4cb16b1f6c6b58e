"""A rollout while all around it breaks: real Envoy with users, a controller that is killed, servers that die.

Whatever happens, users of stable lose nothing, no weight rises after a failure, and there is one promotion at most.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.chaos.rollout_controller import Machine, told
from tests.chaos.rollout_scene import WITH_FEEDBACK, Scene, scene

pytestmark = pytest.mark.chaos


def test_the_canary_is_killed_at_half(tmp_path: Path) -> None:
    with scene(tmp_path) as now:
        now.start()
        now.reaches("holding", weight=50)
        died = time.monotonic()
        now.canary_server.die()
        assert now.ends() == "failed"
        now.require_back()
        # Streams that were on it are lost with it; whoever came later was answered by stable.
        assert all(one.begun < died + 0.05 for one in now.answers if not one.whole)


def test_the_canary_hangs(tmp_path: Path) -> None:
    with scene(tmp_path) as now:
        now.start()
        now.reaches("holding", weight=50)
        now.canary_turns("hang")
        assert now.ends() == "failed"
        now.require_back()


@pytest.mark.parametrize("ledger", ["down", "hung"])
def test_a_bad_canary_goes_although_the_ledger_does_not_answer(tmp_path: Path, ledger: str) -> None:
    with scene(tmp_path) as now:
        now.start()
        now.reaches("holding", weight=50)
        now.ledger(ledger)
        now.canary_turns("fail")
        turned = time.monotonic()
        now.wait(lambda: now.gateway.router.refusal(now.canary.release), "the rollback")
        assert time.monotonic() - turned < 3.5
        now.ledger("fine")
        assert now.ends() == "failed"
        assert len(now.facts("failure")) == 1
        now.require_back()


def test_a_good_canary_waits_for_a_ledger_that_is_down(tmp_path: Path) -> None:
    with scene(tmp_path) as now:
        now.ledger("fine")
        now.start()
        now.reaches("holding", weight=20)
        now.ledger("down")
        time.sleep(1.5)
        assert max(now.weights()) == 20
        now.ledger("fine")
        assert now.ends() == "promote"
        now.require_promoted()


def test_nothing_passes_without_the_traces(tmp_path: Path) -> None:
    with scene(tmp_path, policy=WITH_FEEDBACK, traces_down=True) as now:
        now.start()
        now.reaches("holding", weight=20)
        time.sleep(1.5)
        assert max(now.weights()) == 20
        now.canary_turns("fail")
        assert now.ends() == "failed"
        now.require_back()


def test_the_access_log_is_cut(tmp_path: Path) -> None:
    with scene(tmp_path) as now:
        now.start()
        now.reaches("holding", weight=20)
        os.truncate(now.gateway.settings.access_log, 0)
        require_undecided(now)


def test_the_access_log_is_gone(tmp_path: Path) -> None:
    with scene(tmp_path) as now:
        process = now.start()
        now.reaches("holding", weight=20)
        # Whoever has it open reads on; the next one has nothing to read.
        now.gateway.settings.access_log.unlink()
        process.kill()
        process.wait(10)
        now.start()
        require_undecided(now)


def require_undecided(now: Scene) -> None:
    """What cannot be seen never passes, and says nothing against the release either."""
    assert now.ends() == "inconclusive", now.story()
    assert max(now.weights()) == 20
    assert len(now.facts("withdrawal")) == 1
    now.require_back(failed=False)


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_the_clock_jumps(tmp_path: Path, jump: float) -> None:
    with scene(tmp_path) as now:
        now.start()
        now.reaches("holding", weight=20)
        now.clock(jump)
        now.reaches("holding", weight=50)
        now.canary_turns("fail")
        turned = time.monotonic()
        assert now.ends() == "failed"
        assert time.monotonic() - turned < 5
        now.require_back()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB that can be filled."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("only root may mount a disk")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill_up(file: Path) -> None:
    with suppress(OSError), file.open("wb", buffering=0) as fill:
        while fill.write(b"x" * 4096):
            pass


def test_the_disk_is_full(tmp_path: Path, small_disk: Path) -> None:
    with scene(tmp_path / "scene", disk=small_disk) as now:
        now.start()
        now.reaches("holding", weight=20)
        fill_up(small_disk / "fill")
        # Neither the log nor the state can be written: nothing may rise.
        time.sleep(1)
        assert max(now.weights()) == 20
        now.rollback_by_hand()
        assert now.gateway.router.state().weight == 0
        (small_disk / "fill").unlink()
        assert now.ends() == "failed"
        now.require_back()


def test_the_controller_is_killed_in_every_phase_of_a_good_rollout(tmp_path: Path) -> None:
    phases = ["probing", "shadowing", "raising", "holding", "baking", "passed"]
    with scene(tmp_path) as now:
        now.ledger("slow")
        for phase in phases:
            process = now.start()
            now.reaches(phase)
            process.kill()
            process.wait(10)
        now.start()
        assert now.ends() == "promote"
        now.require_promoted()


def test_the_controller_is_killed_while_it_fails(tmp_path: Path) -> None:
    with scene(tmp_path) as now:
        now.start()
        now.reaches("holding", weight=20)
        now.ledger("hung")
        now.canary_turns("fail")
        now.reaches("failing")
        now.controllers[-1].kill()
        now.controllers[-1].wait(10)
        now.canary_turns("fine")
        now.ledger("fine")
        now.start()
        assert now.ends() == "failed"
        assert len(now.facts("failure")) == 1
        now.require_back()
        # Whoever tries once more is told, and nothing moves.
        now.start()
        assert now.ends() == "failed"
        now.require_back()


def test_the_controller_is_killed_between_its_decision_to_go_back_and_the_gateway(tmp_path: Path) -> None:
    with scene(tmp_path) as now:
        process = now.start()
        now.reaches("holding", weight=20)
        (tmp_path / "die").touch()
        now.canary_turns("fail")
        assert process.wait(15) == -signal.SIGKILL
        (tmp_path / "die").unlink()
        Machine(tmp_path).note("routes.log", weight=0, stable="", token=0)  # decided, and not noted any more
        now.start()
        assert now.ends() == "failed"
        now.require_back()


def test_two_controllers_at_once(tmp_path: Path) -> None:
    with scene(tmp_path) as now:
        first, second = now.start(), now.start()
        leader = _leader(now, first, second)
        os.kill(leader.pid, signal.SIGSTOP)
        time.sleep(0.5)
        assert len({one["pid"] for one in _routes(now)}) == 1
        leader.kill()
        leader.wait(10)
        now.controllers.remove(leader)
        assert now.ends() == "promote"
        assert len(told(tmp_path)) == 1
        tokens = [one["token"] for one in _routes(now)]
        assert tokens == sorted(tokens)
        now.require_promoted()


def _leader(now: Scene, *processes: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    """Whoever moves the weights, once it is holding one."""
    now.reaches("holding")
    pid = _routes(now)[0]["pid"]
    return next(process for process in processes if process.pid == pid)


def _routes(now: Scene) -> list[dict[str, int]]:
    return Machine(now.folder).facts("routes.log")
