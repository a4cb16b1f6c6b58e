"""A call that may hang, made beside the work that must not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

_Result = TypeVar("_Result")


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
