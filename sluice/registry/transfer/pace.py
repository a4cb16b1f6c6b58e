"""A token bucket: what keeps a transfer from taking all of a line."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import BinaryIO


class Pace:
    """At most `rate` bytes a second over all threads that share it; None means no limit.

    The bucket holds half a second's worth. A taker that asks for more than is there goes into debt and sleeps it off,
    so that pieces larger than the bucket pass too. Source: https://en.wikipedia.org/wiki/Token_bucket
    """

    def __init__(self, rate: float | None) -> None:
        self.rate = rate
        self._tokens = (rate or 0.0) / 2
        self._filled = time.monotonic()
        self._lock = threading.Lock()

    def take(self, amount: int) -> None:
        """Wait until `amount` bytes may pass."""
        if self.rate is None or amount == 0:
            return
        with self._lock:
            now = time.monotonic()
            self._tokens = min(self.rate / 2, self._tokens + (now - self._filled) * self.rate) - amount
            self._filled = now
            wait = -self._tokens / self.rate
        if wait > 0:
            time.sleep(wait)


class PacedReader:
    """A file that is read at the pace of a bucket. It cannot be seeked: its reader takes it piece by piece."""

    def __init__(self, path: Path, pace: Pace) -> None:
        self._stream: BinaryIO = path.open("rb")
        self._pace = pace

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._pace.take(len(data))
        return data

    def __enter__(self) -> PacedReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
