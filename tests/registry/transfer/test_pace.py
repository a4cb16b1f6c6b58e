from __future__ import annotations

import threading
import time

import pytest

from sluice.registry.transfer.pace import Pace


def test_threads_together_keep_the_rate() -> None:
    pace = Pace(1_000_000)
    started = time.monotonic()

    def take() -> None:
        for _ in range(4):
            pace.take(50_000)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # 800 kB, of which half a second's worth was in the bucket.
    assert time.monotonic() - started > 0.28


def test_piece_larger_than_the_bucket_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("sluice.registry.transfer.pace.time.sleep", slept.append)
    Pace(100).take(1000)
    assert slept == [pytest.approx(9.5, abs=0.1)]
    Pace(None).take(10**12)
    assert len(slept) == 1
