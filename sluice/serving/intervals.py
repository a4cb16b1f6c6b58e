"""Intervals for the comparison of two releases: a difference of rates, a ratio of medians."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A point estimate with its two-sided confidence interval."""

    estimate: float
    low: float
    high: float


def wilson(count: int, total: int, confidence: float) -> Interval:
    """Wilson's score interval for a rate (E. B. Wilson, JASA 22, 1927). `total` must be above 0."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = count / total
    centre = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    return Interval(rate, max(0.0, centre - half), min(1.0, centre + half))


def rate_difference(canary: tuple[int, int], stable: tuple[int, int], confidence: float) -> Interval:
    """Canary's rate minus stable's, each given as (count, total) with total above 0.

    Newcombe's hybrid score interval (R. G. Newcombe, Statistics in Medicine 17, 1998, method 10): right for the few
    samples and the rates of exactly 0 with which a rollout begins, where the textbook interval has no width.
    """
    a, b = wilson(*canary, confidence), wilson(*stable, confidence)
    difference = a.estimate - b.estimate
    below = math.hypot(a.estimate - a.low, b.high - b.estimate)
    above = math.hypot(a.high - a.estimate, b.estimate - b.low)
    return Interval(difference, difference - below, difference + above)


def median_ratio(canary: Sequence[float], stable: Sequence[float], confidence: float, *, seed: int = 0) -> Interval:
    """Canary's median over stable's, both of positive finite values, with a bootstrap percentile interval.

    The median of a resample of n values is one of the values themselves; its rank is n times a Beta((n+1)/2, (n+1)/2)
    variate (J. S. Maritz and R. G. Jarrett, JASA 73, 1978), so the resamples need not be drawn: the cost is one sort,
    however many answers there were. The seed is fixed: the same samples give the same verdict.
    """
    generator = np.random.default_rng(seed)
    ratios = _resampled_medians(canary, generator) / _resampled_medians(stable, generator)
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Interval(float(np.median(canary) / np.median(stable)), float(low), float(high))


def _resampled_medians(values: Sequence[float], generator: np.random.Generator) -> NDArray[np.float64]:
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    half = (ordered.size + 1) / 2
    ranks = (generator.beta(half, half, _RESAMPLES) * ordered.size).astype(np.int64)
    return ordered[np.minimum(ranks, ordered.size - 1)]
