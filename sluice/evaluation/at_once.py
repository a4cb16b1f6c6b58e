"""Many requests, so many at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


async def at_once(most: int, things: Iterable[T], work: Callable[[T], Awaitable[None]]) -> None:
    """Do `work` on all `things` in their order, at most `most` at a time. The first failure ends the others, and is
    raised when they have ended."""
    # One iterator for all workers: the event loop runs one of them at a time.
    queue = iter(things)

    async def worker() -> None:
        for thing in queue:
            await work(thing)

    workers = [asyncio.create_task(worker()) for _ in range(most)]
    try:
        await asyncio.gather(*workers)
    finally:
        for one in workers:
            one.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
