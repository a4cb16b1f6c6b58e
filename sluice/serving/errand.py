"""A call that may hang, made beside the work that must not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from sluice.infra.errors import UnavailableError

_Result = TypeVar("_Result")

SLOW_S = 2.0
"""Seconds without an answer after which that is worth telling."""
HUNG_S = 20.0
"""A call that has not returned for so long is made again beside it: what is asked here is written once all the same."""
_FRESH_S = 10.0
_GRACE_S = 0.25
_RETRY_S = 2.0


class Errand(Generic[_Result]):
    """Calls `function` in a thread of its own, which ends with the process whatever it waits for."""

    def __init__(self, function: Callable[[], _Result]) -> None:
        self._function = function
        self._results: list[_Result] = []
        self._error: BaseException | None = None
        self._done = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def done(self, *, within_s: float = 0.0) -> bool:
        """Whether it has returned or raised, waiting for it at most `within_s` seconds."""
        return self._done.wait(within_s)

    def result(self) -> _Result:
        """What it returned; raises what it raised. Only once it is `done`."""
        if self._error is not None:
            raise self._error
        return self._results[0]

    def _run(self) -> None:
        try:
            self._results.append(self._function())
        except BaseException as error:  # noqa: BLE001 - it is raised again where somebody listens
            self._error = error
        finally:
            self._done.set()


class Asking:
    """Asks one thing after another of what may hang, while its owner goes on. `monotonic` gives seconds."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._errand: Errand[None] | None = None
        self._about: object = None
        self._sent = self._retry_at = 0.0
        self.waited_s = 0.0

    def answered(self, ask: Callable[[], None], about: object) -> bool:
        """Whether `ask` has returned, and not so late that it must be asked again (10 s). Raises what it raised; after
        `UnavailableError` it is left alone for a moment. `about` tells one question from another."""
        now = self._monotonic()
        if self._errand is None or self._about != about or now - self._sent > HUNG_S:
            if now < self._retry_at:
                self.waited_s = 0.0
                return False
            self._errand, self._about, self._sent = Errand(ask), about, now
            self._errand.done(within_s=_GRACE_S)
        self.waited_s = now - self._sent
        if not self._errand.done():
            return False
        errand, self._errand = self._errand, None
        try:
            errand.result()
        except UnavailableError:
            self._retry_at = now + _RETRY_S
            raise
        return self.waited_s <= _FRESH_S
