"""One controller at a time: tokens grow, the queue keeps its order, and a dead holder lets go."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from sluice.serving.controller_lease import FileLease

HOLD = """
import sys, time
from pathlib import Path
from sluice.serving.controller_lease import FileLease
held = FileLease(Path(sys.argv[1]), "the first").acquire()
print(held.token, flush=True)
time.sleep(60)
"""


def test_the_next_ones_wait_in_order_of_arrival_and_a_dead_holder_lets_go(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    order: list[tuple[str, int]] = []
    said: dict[str, list[str]] = {"second": [], "third": []}

    def wait(name: str, arrived: threading.Event) -> None:
        def report(_done: float, _total: float, message: str) -> None:
            said[name].append(message)
            arrived.set()

        held = FileLease(tmp_path, name).acquire(report)
        order.append((name, held.token))
        held.release()

    threads = []
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "1\n"
        for name in said:
            arrived = threading.Event()
            thread = threading.Thread(target=wait, args=(name, arrived), daemon=True)
            thread.start()
            threads.append(thread)
            assert arrived.wait(10)
        assert order == []
    finally:
        holder.kill()
        holder.communicate()
    for thread in threads:
        thread.join(10)
    assert order == [("second", 2), ("third", 3)]
    assert said["second"][0] == "waiting for the first"
    assert said["third"][0] == "waiting for second"


def test_who_died_in_the_queue_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "queue").mkdir()
    (tmp_path / "queue" / "00000001.json").write_text('{"holder": "a dead one"}')
    held = FileLease(tmp_path, "alive").acquire()
    assert held.token == 1
    assert not held.lost()
    assert list((tmp_path / "queue").iterdir()) == []


def test_a_lease_whose_file_is_another_one_is_lost(tmp_path: Path) -> None:
    held = FileLease(tmp_path, "one").acquire()
    (tmp_path / "controller.lock").unlink()
    other = FileLease(tmp_path, "other").acquire()
    assert held.lost()
    assert not other.lost()
    assert other.token == held.token + 1
