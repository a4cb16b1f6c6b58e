"""One metric of two releases, compared moment by moment, and looked at as often as one likes.

The values of both come as one stream, in the order in which they became known. A block is closed as soon as it holds a
value of each, so that what is compared is of the same moment; the rule looks at who answered, never at what. Only the
mean of a block's difference given all that came before has to respect the null, whatever the distribution: a drift, or
an incident that hits both releases, moves both sides of a difference and convicts nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sluice.serving.metrics import Kind
from sluice.statistics.betting_process import BettingProcess
from sluice.statistics.paired import Floats

_KEPT = 0.5
"""Share of the stake on "fails" that is put aside for the steps to come (`BettingProcess.restart`)."""

_STEPS = (0.001, 0.002, 0.004, 0.007, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.11, 0.15, 0.2, 0.27, 0.36, 0.5, 0.65)
DIFFERENCES = np.array([-1.0, -0.8, *(-step for step in reversed(_STEPS)), 0.0, *_STEPS, 0.8, 1.0])
"""Where an interval of a difference may end; between two of them it is interpolated."""

_LOG_STEPS = (0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.14, 0.19, 0.26, 0.36, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
RATIOS = np.exp([*(-step for step in reversed(_LOG_STEPS)), 0.0, *_LOG_STEPS])
"""The same of a ratio: from a sixteenth to sixteen times."""


@dataclass(frozen=True)
class Limits:
    """What is tested: `fail` is the bound of "worse than this", `margin` that of "no worse than this". Levels are
    the chances of a false alarm, and of a false pass, of this metric."""

    fail: float
    margin: float
    fail_level: float
    pass_level: float


@dataclass(frozen=True)
class Evidence:
    """What is known of a metric after `blocks` blocks. `estimate`, `low` and `high` are of the difference (positive is
    worse) or of the ratio; None where nothing is known, or no bound. `more_blocks`: about how many more blocks show the
    margin if all goes on like this; None if they would not. `holds`: the running step speaks against the margin."""

    blocks: int
    estimate: float | None
    low: float | None
    high: float | None
    p_fail: float
    p_pass: float
    more_blocks: int | None
    holds: bool


class _Differences:
    """Blocks of rates and scores: mean of the canary minus mean of stable, in [-1, 1]; of a score the reverse."""

    nulls = DIFFERENCES

    def __init__(self, kind: Kind, limits: Limits) -> None:
        self._sign = -1.0 if kind == "score" else 1.0
        self._limits = limits
        self._sums = [0.0, 0.0]
        self._counts = [0, 0]
        self._pending: list[float] = []
        self._total, self._blocks = 0.0, 0

    def put(self, side: int, value: float) -> None:
        self._sums[side] += value
        self._counts[side] += 1

    def close(self) -> None:
        stable, canary = self._sums[0] / self._counts[0], self._sums[1] / self._counts[1]
        self._pending.append(self._sign * (canary - stable))
        self._sums, self._counts = [0.0, 0.0], [0, 0]

    def take(self, number: int) -> tuple[Floats, Floats, Floats]:
        """The `number` oldest blocks that were not taken: values for the bound, for the margin, for the grid."""
        values = np.array(self._pending[:number])
        del self._pending[:number]
        self._total, self._blocks = self._total + float(values.sum()), self._blocks + number
        return values, values, values

    def tests(self) -> tuple[float, float, Floats, float]:
        """Null of the bound, null of the margin, nulls of the grid, and the least value."""
        return self._limits.fail, self._limits.margin, DIFFERENCES, -1.0

    def estimate(self) -> float | None:
        return self._total / self._blocks if self._blocks else None


class _Ratios:
    """Blocks of times and costs: the share of pairs in which the canary's value is more than r times stable's, ties
    counting half. A release that is typically r times as slow has a share of 1/2, whatever the tails are like."""

    nulls = RATIOS

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._values: tuple[list[float], list[float]] = ([], [])
        self._pairs: tuple[list[float], list[float]] = ([], [])
        self._sizes: list[int] = []
        self._ratios = np.array([limits.fail, limits.margin, *RATIOS])
        self._totals = np.zeros(len(RATIOS))
        self._blocks = 0

    def put(self, side: int, value: float) -> None:
        self._values[side].append(value)

    def close(self) -> None:
        stable, canary = self._values
        # A block has one value of one of the two.
        size = max(len(stable), len(canary))
        self._pairs[0].extend(stable * (size // len(stable)))
        self._pairs[1].extend(canary * (size // len(canary)))
        self._sizes.append(size)
        self._values = ([], [])

    def take(self, number: int) -> tuple[Floats, Floats, Floats]:
        sizes = np.array(self._sizes[:number])
        pairs = int(sizes.sum())
        stable, canary = (np.array(side[:pairs])[:, None] for side in self._pairs)
        for side in self._pairs:
            del side[:pairs]
        del self._sizes[:number]
        allowed = stable * self._ratios
        slower = (canary > allowed) + 0.5 * (canary == allowed)
        starts = np.cumsum(sizes) - sizes
        shares = np.add.reduceat(slower, starts, axis=0) / sizes[:, None] if number else np.empty((0, slower.shape[1]))
        self._totals, self._blocks = self._totals + shares[:, 2:].sum(axis=0), self._blocks + number
        return shares[:, 0], shares[:, 1], shares[:, 2:]

    def tests(self) -> tuple[float, float, Floats, float]:
        return 0.5, 0.5, np.full(len(RATIOS), 0.5), 0.0

    def estimate(self) -> float | None:
        """The ratio that half of the pairs of the same moments exceed: their median."""
        if not self._blocks:
            return None
        shares = self._totals / self._blocks
        # Falling with the ratio; interp wants it rising.
        return float(np.exp(np.interp(-0.5, -shares, np.log(RATIOS))))


class _Blocks(Protocol):
    @property
    def nulls(self) -> Floats: ...
    def put(self, side: int, value: float) -> None: ...
    def close(self) -> None: ...
    def take(self, number: int) -> tuple[Floats, Floats, Floats]: ...
    def tests(self) -> tuple[float, float, Floats, float]: ...
    def estimate(self) -> float | None: ...


class Comparison:
    """One metric. `add` costs the same whatever came before; `evidence` costs what was added since."""

    def __init__(self, kind: Kind, limits: Limits) -> None:
        self._limits = limits
        self._blocks: _Blocks = _Ratios(limits) if kind == "ratio" else _Differences(kind, limits)
        fail, margin, grid, low = self._blocks.tests()
        high = 1.0
        self._fail = BettingProcess(np.array([fail]), low, high, kept=_KEPT)
        # "The mean is at least" is "at most" of the same values turned round.
        self._pass = BettingProcess(np.array([-margin]), -high, -low)
        self._above = BettingProcess(grid, low, high)
        self._below = BettingProcess(-grid, -high, -low)
        self._margin_mean = margin
        self._seen = [0, 0]
        self._closed: list[float] = []
        self._since = -np.inf
        self._step = np.zeros(3)

    def add(self, canary: bool, value: float, known: float) -> None:
        """One value, later than all before. `value` as `LiveMetric` says, finite."""
        side = int(canary)
        self._blocks.put(side, value)
        self._seen[side] += 1
        if all(self._seen):
            self._blocks.close()
            self._closed.append(known)
            self._seen = [0, 0]

    def evidence(self, since: float) -> Evidence:
        """After all that was added; `since` is when the running step began (epoch seconds)."""
        if since > self._since:
            before = int(np.searchsorted(self._closed, since))
            self._take(before)
            if self._fail.count:
                self._fail.restart()
            self._since, self._step = since, np.zeros(3)
        self._take(len(self._closed))
        low, high = self._interval()
        p_fail, p_pass = float(self._fail.p[0]), float(self._pass.p[0])
        return Evidence(
            self._fail.count, self._blocks.estimate(), low, high, p_fail, p_pass, self._more_blocks(), self._holds()
        )

    def _take(self, number: int) -> None:
        if number == 0:
            return
        del self._closed[:number]
        bound, margin, grid = self._blocks.take(number)
        self._fail.add(bound)
        self._pass.add(-margin)
        self._above.add(grid)
        self._below.add(-grid)
        self._step += np.array([len(margin), margin.sum(), (margin**2).sum()])

    def _interval(self) -> tuple[float | None, float | None]:
        """Ends where a null is ruled out at the level of its verdict, so that interval and verdict never disagree."""
        nulls = self._blocks.nulls
        return (
            _end(nulls, self._above.p, self._limits.fail_level * (1 - _KEPT)),
            _end(nulls[::-1], self._below.p[::-1], self._limits.pass_level),
        )

    def _more_blocks(self) -> int | None:
        growth = float(self._pass.growth[0])
        if growth <= 0 or self._pass.count == 0:
            return None
        # The stake is spread: the best bet has to make up for its neighbours.
        return max(1, int(np.ceil((np.log(1 / self._limits.pass_level) + 1.5) / growth)) - self._pass.count)

    def _holds(self) -> bool:
        """Is the running step's mean beyond the margin, by more than its standard error? What was shown at an earlier
        weight is no reason to go on with a release that has become worse since."""
        count, total, squares = self._step
        if count < 2:
            return False
        mean = total / count
        error = np.sqrt(max(squares / count - mean**2, 0.0) / (count - 1))
        return bool(mean - error > self._margin_mean)


def _end(nulls: Floats, p: Floats, level: float) -> float | None:
    """Where `p` [k], rising along `nulls` [k], passes `level`; None when it excludes none of them."""
    excluded = int(np.argmin(np.append(p, 1.0) <= level))
    if excluded == 0:
        return None
    if excluded == len(nulls):
        return float(nulls[-1])
    inside, outside = np.log(np.maximum(p[excluded - 1 : excluded + 1], 1e-300))
    share = (np.log(level) - inside) / (outside - inside)
    return float(nulls[excluded - 1] + share * (nulls[excluded] - nulls[excluded - 1]))
