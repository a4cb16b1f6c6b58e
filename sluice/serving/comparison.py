"""One metric of two releases, compared moment by moment, and looked at as often as one likes.

The values of both come as one stream, in the order in which they became known. A block is closed as soon as it holds a
value of each, so that what is compared is of the same moment; the rule looks at who answered, never at what. Only the
mean of a block's difference, given all that came before, has to respect the null, whatever the distributions are: a
drift, or an incident that hits both releases, moves both sides of a difference and convicts nobody.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sluice.serving.blocks import DifferenceBlocks, RatioBlocks
from sluice.serving.metrics import Kind
from sluice.statistics.betting_process import BettingProcess
from sluice.statistics.paired import Floats

_KEPT = 0.25
"""Share of the stake on "it fails" that is put aside for the steps to come. By simulation: a release that becomes worse
at its fourth step is convicted after a quarter of the requests, one that is bad from the first after a tenth more."""

_AT_ONCE = 1000
"""Blocks at once."""

_SPREAD = 1.5
"""Logarithm of what the best bet has to win above the mean of all, about."""


@dataclass(frozen=True)
class Limits:
    """What is tested: `fail` is the bound of "worse than this", `margin` that of "no worse than this". The levels are
    the chance of a false alarm and that of a false pass."""

    fail: float
    margin: float
    fail_level: float
    pass_level: float


@dataclass(frozen=True)
class Evidence:
    """What is known of a metric after `blocks` blocks, `in_step` of them in the running step.

    `estimate`, `low` and `high` are of the difference (positive is worse) or of the ratio; None where nothing is known
    or, for a ratio, where it has no upper bound yet. `more_blocks`: about how many more show the margin if all goes on
    like this, which takes `more_s`; None if they would not. `against`: the running step speaks against the margin.
    """

    blocks: int
    in_step: int
    estimate: float | None
    low: float | None
    high: float | None
    p_fail: float
    p_pass: float
    more_blocks: int | None
    more_s: float | None
    against: bool


class Comparison:
    """One metric. `add` costs the same whatever came before; `evidence` costs what was added since it was last asked.
    When it is asked makes no difference to the p-values."""

    def __init__(self, kind: Kind, limits: Limits) -> None:
        self._limits = limits
        bounds = limits.fail, limits.margin
        self._blocks = RatioBlocks(bounds) if kind == "ratio" else DifferenceBlocks(bounds, turned=kind == "score")
        low, (fail, self._margin) = self._blocks.least, self._blocks.nulls
        grid = self._blocks.grid_nulls
        self._fail = BettingProcess(np.array([fail]), low, 1.0, kept=_KEPT)
        self._above = BettingProcess(grid, low, 1.0)
        # "The mean is at least" is "at most" of the same values turned round.
        self._pass = BettingProcess(np.array([-self._margin]), -1.0, -low)
        self._below = BettingProcess(-grid, -1.0, -low)
        self._both = [False, False]
        self._closed: list[float] = []
        self._last = -math.inf
        self._since = -math.inf
        self._step = np.zeros(3)

    def add(self, canary: bool, value: float, known: float) -> None:
        """One value, not earlier than all before; finite, and one that the metric can have."""
        self._blocks.put(canary, value)
        self._both[canary] = True
        if all(self._both):
            self._blocks.close()
            self._closed.append(known)
            self._both = [False, False]

    def moved(self, jump: float) -> None:
        """The clock jumped by so many seconds."""
        self._closed = [known + jump for known in self._closed]
        self._last += jump
        self._since += jump

    def evidence(self, since: float) -> Evidence:
        """After all that was added; `since` is when the running step began (epoch seconds)."""
        step = self._step
        # Of an earlier step, also when it was told late.
        self._take(int(np.searchsorted(self._closed, since)))
        self._step = step
        if since > self._since:
            if self._fail.count:
                self._fail.restart()
            self._since, self._step = since, np.zeros(3)
        self._take(len(self._closed))
        low, high = self._interval()
        more = self._more_blocks()
        in_step = int(self._step[0])
        return Evidence(
            blocks=self._fail.count,
            in_step=in_step,
            estimate=self._blocks.estimate(),
            low=low,
            high=high,
            p_fail=float(self._fail.p[0]),
            p_pass=float(self._pass.p[0]),
            more_blocks=more,
            more_s=more * (self._last - self._since) / in_step if more and in_step else None,
            against=self._against(),
        )

    def _take(self, number: int) -> None:
        """Look at the next `number` blocks."""
        for taken in range(0, number, _AT_ONCE):
            fail, margin, grid = self._blocks.take(min(_AT_ONCE, number - taken))
            self._fail.add(fail)
            self._pass.add(-margin)
            self._above.add(grid)
            self._below.add(-grid)
            self._step = self._step + np.array([len(margin), margin.sum(), (margin**2).sum()])
        if number:
            self._last = self._closed[number - 1]
            del self._closed[:number]

    def _interval(self) -> tuple[float | None, float | None]:
        """Ends where a value is ruled out at the level of its verdict, so that interval and verdict do not disagree."""
        if not self._fail.count:
            return None, None
        grid, (lowest, highest) = self._blocks.grid, self._blocks.ends
        low = _end(grid, self._above.p, self._limits.fail_level * (1 - _KEPT))
        high = _end(grid[::-1], self._below.p[::-1], self._limits.pass_level)
        low, high = lowest if low is None else low, highest if high is None else high
        # The restarts may have found more than the bets from the begin.
        if self._fail.p[0] <= self._limits.fail_level:
            low = max(low, self._limits.fail)
        # A release that became worse, or better, fits no single value: what either side ruled out lies between.
        return (low, high) if high is None else (min(low, high), max(low, high))

    def _more_blocks(self) -> int | None:
        growth = float(self._pass.growth[0])
        needed = math.log(1 / self._limits.pass_level) + _SPREAD
        return max(1, math.ceil(needed / growth) - self._pass.count) if growth > 0 else None

    def _against(self) -> bool:
        """Is the running step's mean beyond the margin, by more than its standard error? What was shown at an earlier
        weight is no reason to go on with a release that has become worse since."""
        count, total, squares = self._step
        if count < 2:
            return False
        mean = total / count
        error = math.sqrt(max(squares / count - mean**2, 0.0) / (count - 1))
        return bool(mean - error > self._margin)


def _end(grid: Floats, p: Floats, level: float) -> float | None:
    """Where `p` [k], rising along `grid` [k], passes `level`; None when it excludes nothing."""
    excluded = int(np.argmin(np.append(p, 1.0) <= level))
    if excluded == 0:
        return None
    if excluded == len(grid):
        return float(grid[-1])
    inside, outside = np.log(np.maximum(p[excluded - 1 : excluded + 1], 1e-300))
    share = (math.log(level) - inside) / (outside - inside)
    return float(grid[excluded - 1] + share * (grid[excluded] - grid[excluded - 1]))
