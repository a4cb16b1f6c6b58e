"""`sequential.betting_p` for values that keep coming: several nulls at once, and a cost that knows new values only."""

from __future__ import annotations

import numpy as np

from sluice.statistics.paired import Floats
from sluice.statistics.sequential import BETS

_EDGE = 1e-9

_AT_ONCE = 200_000
"""Numbers at once: what stays in the processor's cache."""


class BettingProcess:
    """Bets against "the mean is at most `null`", for each of `nulls` [k], on values within [low, high].

    Without `restart` its p-values are those of `betting_p` for the same values. `kept` is the share of the stake that
    is put aside for restarts; a stake that is put aside is a martingale too, and so is the sum of all.
    """

    def __init__(self, nulls: Floats, low: float, high: float, *, kept: float = 0.0) -> None:
        self._low, self._range = low, high - low
        # At the very edge a null is impossible, or never ruled out: a hair beside it the formulas say the same.
        self._means = np.clip((np.asarray(nulls, dtype=np.float64) - low) / self._range, _EDGE, 1 - _EDGE)
        self._shares = (np.arange(BETS) + 0.5) / BETS
        self._capital = np.full((len(self._means), BETS), (1 - kept) / BETS)
        self._kept = kept
        self._restarts = 0
        self._most = np.ones(len(self._means))
        self.count = 0

    def add(self, values: Floats) -> None:
        """Values in the order of looking: [n], the same ones for every null, or [n, k], each null's own."""
        scaled = (values - self._low) / self._range
        scaled = scaled[:, None] if scaled.ndim == 1 else scaled
        shares = np.tile(self._shares, self._capital.shape[1] // BETS)
        rows = max(1, _AT_ONCE // self._capital.size)
        with np.errstate(over="ignore", under="ignore"):
            for start in range(0, len(scaled), rows):
                gains = scaled[start : start + rows] / self._means - 1
                factors = 1 + gains[:, :, None] * shares
                factors[0] *= self._capital
                np.multiply.accumulate(factors, axis=0, out=factors)
                np.maximum(self._most, factors.sum(axis=2).max(axis=0) + self._kept, out=self._most)
                self._capital = factors[-1].copy()
        self.count += len(scaled)

    def restart(self) -> None:
        """Begin anew with a part of what was put aside, beside all bets that run: after a long time of one kind their
        capital is lost, and they would be slow to see a change. The n-th restart gets 1/n - 1/(n + 1) of it."""
        self._restarts += 1
        stake = self._kept / (self._restarts + 1)
        self._kept -= stake
        fresh = np.full((len(self._means), BETS), stake / BETS)
        self._capital = np.hstack([self._capital, fresh])

    @property
    def p(self) -> Floats:
        """Always-valid one-sided p-value of each null: [k]; it never rises."""
        return 1 / self._most

    @property
    def growth(self) -> Floats:
        """Logarithm of what the best bet from the begin made of its stake, for a value: [k]; 0 without values."""
        best = self._capital[:, :BETS].max(axis=1) * BETS
        with np.errstate(divide="ignore"):
            return np.log(np.minimum(best, 1e300)) / max(self.count, 1)
