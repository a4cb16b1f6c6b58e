"""A hung collective: the watch ends every process, and the finding names who is missing, from what, and where."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sluice.training.flight import explain
from sluice.training.watch import HANG_EXIT, Watch


def _train(rank: int, port: int, work_dir: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)

    def tell(sentence: str) -> None:
        with (work_dir / "told").open("a") as stream:
            stream.write(sentence + "\n")

    with Watch(work_dir, rank, 2.0, world_size=2, tell=tell, poll_s=0.1, margin_s=2.0) as watch:
        with watch.allow("start-up", 60):
            dist.init_process_group("gloo", rank=rank, world_size=2)
            dist.new_group([0, 1])
        for step in range(1, 5):
            watch.beat(step, "backward")
            if step == 3:
                if rank == 1:
                    time.sleep(100)  # rank 1 stands here
            dist.all_reduce(torch.ones(5, 7))
            with watch.allow("checkpoint", 20):
                # Longer than the limit of a step, which must not matter here.
                time.sleep(2.5 if step == 1 else 0)


def _hold_the_interpreter(work_dir: Path) -> None:
    with Watch(work_dir, 0, 1.0, poll_s=0.1, margin_s=1.0) as watch:
        watch.beat(7, "forward")
        ctypes.PyDLL(None).sleep(100)  # PyDLL keeps the lock that CDLL gives free


def _codes(target: Callable[..., None], arguments: list[tuple[Any, ...]]) -> list[int | None]:
    """Exit codes of processes that call `target`, one with each of `arguments`. None: it had to be killed."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=values) for values in arguments]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 120
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def _line(text: str) -> int:
    return next(n for n, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.strip().startswith(text))


def test_the_rank_that_never_joined_is_named_with_the_collective_and_its_line(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert _codes(_train, [(rank, port, tmp_path) for rank in range(2)]) == [HANG_EXIT, HANG_EXIT]
    (told,) = (tmp_path / "told").read_text().splitlines()
    assert told == (tmp_path / "flight" / "finding.txt").read_text().strip()
    assert "Rank 1 never joined gloo:all_reduce number 3 (sizes 5x7)" in told
    assert "rank 0 waits there since" in told
    assert f"stands in {__file__}:{_line('time.sleep(100)')} (_train)" in told
    assert "step 3, backward" in told


def test_a_process_that_holds_the_interpreter_ends_and_its_line_is_known(tmp_path: Path) -> None:
    assert _codes(_hold_the_interpreter, [(tmp_path,)]) == [1]
    finding = explain(tmp_path, 1)
    assert finding.startswith("Rank 0 did not give the interpreter free; it stands in")
    assert f"{__file__}:{_line('ctypes.PyDLL')} (_hold_the_interpreter)" in finding
