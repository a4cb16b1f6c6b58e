"""`sequential.betting_p` for values that keep coming: several nulls at once, at a cost that knows new values only."""

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
    is put aside for restarts: money that is not bet is a martingale too, and so is the sum of all, so that p-values
    stay valid whenever one restarts, as long as only the past decides when.
    """

    def __init__(self, nulls: Floats, low: float, high: float, *, kept: float = 0.0) -> None:
        self._low, self._range = low, high - low
        # At the very edge a null is impossible, or never ruled out: a hair beside it the formulas say the same.
        self._means = np.clip((nulls - low) / self._range, _EDGE, 1 - _EDGE)
        self._shares = (np.arange(BETS) + 0.5) / BETS
        self._capital = np.full((len(nulls), BETS), (1 - kept) / BETS)
        self._kept = kept
        self._restarts = 0
        self._most = np.ones(len(nulls))
        self.count = 0
        """Values so far."""

    def add(self, values: Floats) -> None:
        """Values in the order of looking: [n], the same ones for every null, or [n, k], each null's own."""
        scaled = (values - self._low) / self._range
        scaled = scaled[:, None] if scaled.ndim == 1 else scaled
        shares = np.tile(self._shares, self._restarts + 1)
        rows = max(1, _AT_ONCE // self._capital.size)
        # Beyond what a number can hold a capital is infinite, or nothing; either is as good.
        with np.errstate(over="ignore", under="ignore"):
            for start in range(0, len(scaled), rows):
                gains = scaled[start : start + rows] / self._means - 1
                capital = 1 + gains[:, :, None] * shares
                capital[0] *= self._capital
                np.multiply.accumulate(capital, axis=0, out=capital)
                np.maximum(self._most, capital.sum(axis=2).max(axis=0) + self._kept, out=self._most)
                self._capital = capital[-1].copy()
        self.count += len(scaled)

    def restart(self) -> None:
        """Begin anew with a part of what was put aside, beside all bets that run: after a long time in which the null
        held, their capital is lost, and they are slow to see a change. The n-th restart gets 1/n - 1/(n + 1) of it."""
        self._restarts += 1
        stake = self._kept / (self._restarts + 1)
        self._kept -= stake
        self._capital = np.hstack([self._capital, np.full((len(self._means), BETS), stake / BETS)])

    @property
    def p(self) -> Floats:
        """Always-valid one-sided p-value of each null: [k]; it never rises."""
        p: Floats = 1 / self._most
        return p

    @property
    def growth(self) -> Floats:
        """By what the logarithm of the best of the first bets grew for a value, on average: [k]; 0 without values."""
        best = np.clip(self._capital[:, :BETS].max(axis=1), 1e-300, 1e300)
        growth: Floats = np.log(best * BETS) / max(self.count, 1)
        return growth
