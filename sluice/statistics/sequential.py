"""The mean of bounded values when one may look at any time, and stop when one likes: betting.

Against each possible mean a gambler bets with a stake of 1, by rules that look at earlier values only. If that mean is
the true one the capital is a nonnegative martingale, so that it ever reaches 1/alpha has a probability of at most alpha
(Ville 1939); what has lost against the gambler is ruled out for good. Source: Waudby-Smith and Ramdas 2024,
"Estimating means of bounded random variables by betting", JRSSB 86:1-27 (arXiv:2010.09686).

The stake is split: over constant bets spread evenly between nothing and all (their "diversified Kelly" bets), which
win early when the difference is large; and, where the number of items at most is known beforehand, half of it on their
predictable plug-in bet for a fixed number, which suits the variance seen so far. Both were chosen by simulation: their
aGRAPA bets stop later and find less. The capital falls as the mean bet against rises, so that a limit is one root and
p-value and interval never disagree.

Values count in the order in which they were looked at. Put into another order after stopping they are worth nothing.
"""

from __future__ import annotations

import math

import numpy as np

from sluice.statistics.bounded import require_bounds
from sluice.statistics.paired import Floats, Interval

BETS = 30
"""Constant bets; more of them change the p-value by less than a tenth."""

TUNED_FOR = 0.025
"""Level at which the plug-in bet is best; every level holds."""

_MOST = 0.9
"""Share of the capital that the plug-in bet risks at most, so that no single value ruins it."""

_EDGE = 1e-9
_ENOUGH = 1e300


def betting_p(values: Floats, null: float, low: float, high: float, *, planned: int | None = None) -> float:
    """Always-valid one-sided p-value of "the mean is at most `null`"; 1 without values. More values never raise it.

    `values` [n] within [low, high] in the order of looking; `planned`: how many there can be at most, if that is known
    before the first. Raises `InputError` for a value out of bounds.
    """
    return float(betting_ps(values, null, low, high, planned=planned)[-1]) if len(values) else 1.0


def betting_ps(values: Floats, null: float, low: float, high: float, *, planned: int | None = None) -> Floats:
    """`betting_p` after each of `values`: [n], never rising."""
    scaled, mean = _scaled(values, low, high), (null - low) / (high - low)
    if mean >= 1:
        return np.ones(len(scaled))
    if mean <= 0:  # a mean below the lowest value is impossible, and one at it is when any value is above
        return np.where((mean < 0) | (np.maximum.accumulate(scaled) > 0), 0.0, 1.0)
    return 1 / np.maximum.accumulate(np.maximum(_capital(scaled, mean, planned), 1.0))


def confidence_sequence(
    values: Floats, low: float, high: float, confidence: float, *, planned: int | None = None
) -> Interval:
    """The always-valid interval of the mean after the last of `values`: all looks together miss the mean with a
    probability of at most 1 - confidence. More values never widen it. Arguments as for `betting_p`.

    Values that drift so far that no one mean fits them all rule out everything; the interval then lies between what
    either side ruled out.
    """
    scaled = _scaled(values, low, high)
    level = 2 / (1 - confidence)
    lower, upper = _limit(scaled, level, planned), 1 - _limit(1 - scaled, level, planned)
    return Interval(low + min(lower, upper) * (high - low), low + max(lower, upper) * (high - low))


def _scaled(values: Floats, low: float, high: float) -> Floats:
    require_bounds(values, low, high)
    return (values - low) / (high - low)


def _limit(values: Floats, level: float, planned: int | None) -> float:
    """The largest mean below which all are ruled out: where the most ever won is `level`."""
    from scipy.optimize import brentq

    def over(mean: float) -> float:
        return math.log(min(float(_capital(values, mean, planned).max()), _ENOUGH) / level)

    if len(values) == 0 or over(_EDGE) <= 0:
        return 0.0
    return float(brentq(over, _EDGE, 1.0, xtol=_EDGE))


def _capital(values: Floats, mean: float, planned: int | None) -> Floats:
    """What the gambler has after each value [n] of a stake of 1. `values` [n] in [0, 1], 0 < mean <= 1."""
    shares = (np.arange(BETS) + 0.5) / BETS
    # Beyond what a number can hold a capital is infinite, or nothing; either is as good.
    with np.errstate(over="ignore", under="ignore"):
        # A bet b gives 1 + b (x - mean); b = share / mean can lose no more than that share of the capital.
        total: Floats = np.cumprod(1 + shares[:, None] * (values / mean - 1), axis=1).mean(axis=0)
        if planned is not None:
            bets = np.minimum(_plug_in(values, planned), _MOST / mean)
            total = (total + np.cumprod(1 + bets * (values - mean))) / 2
    return total


def _plug_in(values: Floats, planned: int) -> Floats:
    """Predictable bets [n]: sqrt(2 log(1/alpha) / (planned * variance so far)), the best constant bet when the means
    differ by what `planned` values can just show. Mean and variance start from one value of 1/2 and 1/4."""
    count = np.arange(2, len(values) + 2)
    means = (0.5 + values.cumsum()) / count
    variances = (0.25 + ((values - means) ** 2).cumsum()) / count
    before = np.append(0.25, variances[:-1])
    result: Floats = np.sqrt(2 * math.log(1 / TUNED_FOR) / (planned * before))
    return result
