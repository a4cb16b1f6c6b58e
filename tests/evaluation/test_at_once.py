"""So many at once, in order; a failure ends the others."""

from __future__ import annotations

import asyncio

import pytest

from sluice.evaluation.at_once import at_once


def test_all_is_done_in_order_and_never_more_than_so_many_at_once() -> None:
    begun: list[int] = []
    busy = most = 0

    async def work(number: int) -> None:
        nonlocal busy, most
        begun.append(number)
        busy += 1
        most = max(most, busy)
        await asyncio.sleep(0.001 * (number % 3))
        busy -= 1

    asyncio.run(at_once(4, range(20), work))
    assert begun == list(range(20))
    assert most == 4
    asyncio.run(at_once(4, [], work))


def test_the_first_failure_ends_the_others_and_is_raised() -> None:
    ended: list[int] = []

    async def work(number: int) -> None:
        try:
            if number == 1:
                raise ValueError("one")
            await asyncio.sleep(60)
        finally:
            ended.append(number)

    with pytest.raises(ValueError, match="one"):
        asyncio.run(asyncio.wait_for(at_once(3, range(9), work), timeout=5))
    assert sorted(ended) == [0, 1, 2]
