"""The mean of bounded values, or a rate, from a number of items that was fixed beforehand.

What holds at every n, and for rare events: a bootstrap or a t-test knows only the values that it saw, and of a hundred
items an accident in one of fifty is often not seen. Where the bounds of a value are known, the bound is the worst that
was not seen. tests/statistics compares them; `benchmarks/gate_rates.py` measures what it costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sluice.infra.errors import InputError
from sluice.statistics.paired import RESAMPLES, Floats, Interval, seed_of


@dataclass(frozen=True)
class BoundedMean:
    """The mean of bounded values: two-sided interval, and the weighted means (sorted) that it is read from, with one
    more value at the lower, or at the upper bound."""

    interval: Interval
    with_low: Floats
    with_high: Floats

    def p_greater(self, null: float) -> float:
        """One-sided p-value of "the mean is at most `null`", at least 1 / (resamples + 1). At most (1 - confidence) / 2
        exactly when `null` is below the interval."""
        return float((1 + np.searchsorted(self.with_low, null, side="right")) / (len(self.with_low) + 1))

    def p_less(self, null: float) -> float:
        """One-sided p-value of "the mean is at least `null`"."""
        below = np.searchsorted(self.with_high, null, side="left")
        return float((1 + len(self.with_high) - below) / (len(self.with_high) + 1))


def bounded_mean(
    values: Floats, low: float, high: float, *, confidence: float, resamples: int = RESAMPLES
) -> BoundedMean:
    """Mean of `values` [n], each within [low, high]; differences of paired values within [a, b] are within
    [a - b, b - a]. The order of values does not matter; no value leaves the interval [low, high].

    The Bayesian bootstrap (Rubin 1981, Annals of Statistics 9:130-134: weights ~ Dirichlet(1, ..., 1)) with one more
    value at the bound that speaks against the claim. Source: Gaffke 2005, "Three test statistics for a nonparametric
    one-sided hypothesis on the mean of a nonnegative variable", Mathematical Methods of Statistics 14:451-467;
    Learned-Miller and Thomas 2019, "A New Confidence Interval for the Mean of a Bounded Random Variable"
    (arXiv:1905.06208). For values of two kinds it is Clopper and Pearson's exact interval, and for n equal values the
    "rule of three". That it holds for every distribution and n is proven for two kinds of values and conjectured for
    all others; no counterexample is known.

    Raises `InputError` for a value out of bounds.
    """
    require_bounds(values, low, high)
    with_low, with_high = _weighted_means(values, low, high, resamples)
    # The rank at which p_greater passes the level, so that interval and p-value never disagree.
    rank = math.floor((1 - confidence) / 2 * (resamples + 1) + 1e-9)
    ends = (with_low[rank - 1], with_high[resamples - rank]) if rank else (low, high)
    return BoundedMean(Interval(float(ends[0]), float(ends[1])), with_low, with_high)


def require_bounds(values: Floats, low: float, high: float) -> None:
    """Raises `InputError` for a value that is not within [low, high], or not a number."""
    if not ((values >= low) & (values <= high)).all():
        raise InputError(
            f"A value among {float(values.min()):g} to {float(values.max()):g} is not within {low:g} to {high:g}.",
            hint="Correct the metric's bounds.",
        )


def _weighted_means(values: Floats, low: float, high: float, resamples: int) -> tuple[Floats, Floats]:
    """Means of `values` and one more, `low` or `high`, under the same random weights: [resamples] each, sorted."""
    # Equal values share a weight: the sum of k standard exponentials is gamma distributed with shape k.
    distinct, counts = np.unique(values, return_counts=True)
    generator = np.random.default_rng(seed_of([distinct.tolist(), counts.tolist()]))
    rows = max(1, 50_000 // max(1, len(distinct)))  # weights that fit into the processor's cache: five times as fast
    sums, totals = np.empty(resamples), np.empty(resamples)
    for start in range(0, resamples, rows):
        part = slice(start, min(start + rows, resamples))
        weights = generator.standard_gamma(counts, size=(part.stop - start, len(distinct)))
        sums[part], totals[part] = weights @ distinct, weights.sum(axis=1)
    extra = generator.standard_exponential(resamples)
    means = ((sums + extra * bound) / (totals + extra) for bound in (low, high))
    # Rounding must not move a mean out of bounds.
    below, above = (np.sort(np.clip(one, low, high)) for one in means)
    return below, above


def rate_interval(hits: int, n: int, *, confidence: float) -> Interval:
    """Exact interval of a rate (Clopper and Pearson 1934, Biometrika 26:404-413, by scipy): of 0 hits in n the upper
    limit is 1 - ((1 - confidence) / 2) ** (1 / n), and of no items at all the interval is everything."""
    from scipy import stats

    if n == 0:
        return Interval(0.0, 1.0)
    found = stats.binomtest(hits, n).proportion_ci(confidence_level=confidence, method="exact")
    return Interval(float(found.low), float(found.high))


def rate_p(hits: int, n: int, null: float, alternative: Literal["greater", "less"]) -> float:
    """Exact one-sided p-value of "the rate is at most `null`" (`greater`), or at least (`less`); at most
    (1 - confidence) / 2 exactly when `null` is outside `rate_interval` on that side."""
    from scipy import stats

    return float(stats.binomtest(hits, n, null, alternative=alternative).pvalue) if n else 1.0
