"""What one block of a comparison says: a number that is bounded, and larger when the canary is worse.

Both kinds give, for each block, the value that is tested against the bound of failing, the one against the margin, and
those for a grid of possible results, from which the interval is read.
"""

from __future__ import annotations

import numpy as np

from sluice.statistics.paired import Floats

_STEPS = (0.001, 0.002, 0.004, 0.007, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.11, 0.15, 0.2, 0.27, 0.36, 0.5, 0.65)
_DIFFERENCES = np.array([-1.0, -0.8, *(-step for step in reversed(_STEPS)), 0.0, *_STEPS, 0.8, 1.0])

_LOG_STEPS = (0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.14, 0.19, 0.26, 0.36, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
_LOG_RATIOS = np.array([*(-step for step in reversed(_LOG_STEPS)), 0.0, *_LOG_STEPS])

_NOTHING = 1e-12
"""Two that cost nothing cost the same, and not each r times the other."""


class DifferenceBlocks:
    """Rates and scores: mean of the canary minus mean of stable, `turned` (scores: more is better) the reverse."""

    least = -1.0
    ends: tuple[float, float | None] = (-1.0, 1.0)
    grid = grid_nulls = _DIFFERENCES

    def __init__(self, bounds: tuple[float, float], *, turned: bool) -> None:
        self.nulls = bounds
        self._sign = -1.0 if turned else 1.0
        self._clear()
        self._pending: list[float] = []
        self._total, self._taken = 0.0, 0

    def put(self, canary: bool, value: float) -> None:
        """One value for the running block."""
        self._sums[canary] += value
        self._counts[canary] += 1

    def close(self) -> None:
        """The running block is complete."""
        stable, canary = (total / count for total, count in zip(self._sums, self._counts, strict=True))
        # Rounding must not move a mean of equal values out of bounds.
        self._pending.append(min(1.0, max(-1.0, self._sign * (canary - stable))))
        self._clear()

    def take(self, number: int) -> tuple[Floats, Floats, Floats]:
        """The next `number` complete blocks: values for the bound [n], for the margin [n], for the grid [n or n, k]."""
        values = np.array(self._pending[:number])
        del self._pending[:number]
        self._total += float(values.sum())
        self._taken += number
        return values, values, values

    def estimate(self) -> float | None:
        """Mean of all blocks taken."""
        return self._total / self._taken if self._taken else None

    def _clear(self) -> None:
        self._sums, self._counts = [0.0, 0.0], [0, 0]


class RatioBlocks:
    """Times and costs: the share of a block's pairs in which the canary's value is more than r times stable's, ties
    counting half, for r the bounds and a grid. A release that is typically r times as slow has a share of 1/2 there,
    whatever the tails are like: the probabilistic index P(X > rY) + P(X = rY) / 2 of Mann and Whitney 1947, Annals of
    Mathematical Statistics 18:50-60, read as a shift of logarithms (Hodges and Lehmann 1963, ibid. 34:598-611)."""

    least = 0.0
    ends: tuple[float, float | None] = (0.0, None)
    nulls = (0.5, 0.5)
    grid = np.exp(_LOG_RATIOS)
    grid_nulls = np.full(len(_LOG_RATIOS), 0.5)

    def __init__(self, bounds: tuple[float, float]) -> None:
        self._ratios = np.array([*bounds, *self.grid])
        self._running: tuple[list[float], list[float]] = ([], [])
        self._pairs: tuple[list[float], list[float]] = ([], [])
        self._sizes: list[int] = []
        self._totals, self._taken = np.zeros(len(self.grid)), 0

    def put(self, canary: bool, value: float) -> None:
        """One value for the running block."""
        self._running[canary].append(max(value, _NOTHING))

    def close(self) -> None:
        """The running block is complete: it holds one value of one of the two releases, and some of the other."""
        stable, canary = self._running
        size = max(len(stable), len(canary))
        self._pairs[0].extend(stable * (size // len(stable)))
        self._pairs[1].extend(canary * (size // len(canary)))
        self._sizes.append(size)
        self._running = ([], [])

    def take(self, number: int) -> tuple[Floats, Floats, Floats]:
        """As for `DifferenceBlocks`; `number` is at least 1."""
        sizes = np.array(self._sizes[:number])
        del self._sizes[:number]
        pairs = int(sizes.sum())
        stable, canary = (np.array(side[:pairs])[:, None] for side in self._pairs)
        for side in self._pairs:
            del side[:pairs]
        allowed = stable * self._ratios
        slower = (canary > allowed) + 0.5 * (canary == allowed)
        shares: Floats = np.add.reduceat(slower, np.cumsum(sizes) - sizes, axis=0) / sizes[:, None]
        self._totals = self._totals + shares[:, 2:].sum(axis=0)
        self._taken += number
        return shares[:, 0], shares[:, 1], shares[:, 2:]

    def estimate(self) -> float | None:
        """The ratio which half of the pairs of the same moments exceed, from a sixteenth to sixteen."""
        if not self._taken:
            return None
        # The shares fall with the ratio; `interp` wants them to rise.
        return float(np.exp(np.interp(-0.5, -self._totals / self._taken, _LOG_RATIOS)))
