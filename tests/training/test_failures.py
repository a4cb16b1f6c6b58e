"""Why training processes ended, read from what they printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice.training.failures import DeadRanks, find_cause, is_echo

FIRST = "Traceback (most recent call last):\n  File 'x.py', line 1, in f\n    g()\nRuntimeError: mat1 and mat2\n"
ECHO = "Traceback (most recent call last):\n  File 'y.py'\nRuntimeError: [gloo/pair.cc] Connection closed by peer\n"
AGENT = "Traceback (most recent call last):\n  a\ntorch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (ECHO + FIRST + AGENT, "RuntimeError: mat1 and mat2"),
        ("[rank1]: " + FIRST.replace("\n", "\n[rank1]: ") + "\n" + AGENT, "RuntimeError: mat1 and mat2"),
        (ECHO + AGENT + "  exitcode  : -9 (pid: 12)\n", "killed by SIGKILL, perhaps for lack of memory."),
        (AGENT + "  exitcode  : -11 (pid: 12)\n", "killed by SIGSEGV."),
        (ECHO, "Connection closed by peer"),
        ("nothing\n", "exit code 1 and no message"),
    ],
)
def test_the_cause_is_the_first_failure_and_no_echo(log: str, cause: str) -> None:
    assert cause in find_cause(log, 1)


def test_dead_processes_are_told_once_with_the_restarts_that_are_left(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    before = b"failed (exitcode: -9) local_rank: 7 (pid: 1) of binary: an older attempt\n"
    log.write_bytes(before)
    dead = DeadRanks(log, len(before), restarts=1)
    assert list(dead.new()) == []
    with log.open("ab") as stream:
        stream.write(b"E1121 failed (exitcode: -9) local_rank: 1 (pid: 4711) of binary: python\nfailed (exit")
    [event] = dead.new()
    assert "Training process 1 (pid 4711) was killed by SIGKILL" in event.sentence
    assert "0 restarts are left" in event.sentence
    with log.open("ab") as stream:
        stream.write(b"code: 70) local_rank: 0 (pid: 4712) of binary: python\n")
    [event] = dead.new()
    assert event.sentence == "Training process 0 (pid 4712) ended with exit code 70."
    assert list(dead.new()) == []


def test_a_process_that_wants_to_start_again_did_not_die(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_bytes(
        b"failed (exitcode: 77) local_rank: 0 (pid: 1) of\nfailed (exitcode: -9) local_rank: 1 (pid: 2) of\n"
    )
    [event] = DeadRanks(log, 0, restarts=1).new()
    assert "0 restarts are left" in event.sentence


def test_a_process_that_waited_for_another_one_in_vain_is_an_echo() -> None:
    assert is_echo("DistStoreError: Timed out after 601 seconds waiting for clients. 1/2 clients joined.")
    assert not is_echo("ValueError: the learning rate is a fish")
