"""The statistics of a paired comparison of a fixed number of items.

scipy where it has the method; each formula names its source.

Differences are candidate minus champion on the same item. All tests here are one-sided, "the mean difference is
greater than `null`"; `confidence` is that of a two-sided interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sluice.provenance.canonical import Json, digest_json, hex_of

Floats = NDArray[np.float64]

RESAMPLES = 9_999
"""Resamples of a bootstrap: the Monte-Carlo error of a 95% limit is then far below the width that it bounds
(Davison and Hinkley 1997, "Bootstrap Methods and their Application", section 5.2.2)."""

_AT_ONCE = 1_000_000
"""Resampled values at once: 8 MB, more is no quicker."""


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval."""

    low: float
    high: float


def seed_of(value: Json) -> int:
    """A seed that depends on the data only: the same inputs give the same interval on every machine."""
    return int(hex_of(digest_json(value))[:16], 16)


@dataclass(frozen=True)
class BootstrapMean:
    """The bootstrap of a mean: resampled means (sorted), bias correction z0 and acceleration a of BCa; and the means of
    random subsets (sorted), which is the sign-flip permutation test turned into an interval."""

    interval: Interval
    resampled: Floats
    bias: float
    acceleration: float
    subsets: Floats

    def p_greater(self, null: float) -> float:
        """One-sided p-value of "the mean is at most `null`", at least 1 / (resamples + 1): the larger of the
        bootstrap's and the permutation test's."""
        return max(self._bootstrap_p(null), self._permutation_p(null))

    def _bootstrap_p(self, null: float) -> float:
        """The BCa interval read backwards: the level whose one-sided lower limit is `null`, so the p-value and the
        interval never disagree. Source: Efron 1987, JASA 82:171, equation 2.3, solved for the level (as the
        "bootstrap p-value" of Efron and Tibshirani 1993, section 15.6)."""
        from scipy.special import ndtr, ndtri

        below = np.searchsorted(self.resampled, null, side="left")
        at_most = np.searchsorted(self.resampled, null, side="right")
        count = len(self.resampled)
        share = float(np.clip((below + at_most) / (2 * count), 0.5 / count, 1 - 0.5 / count))
        away = float(ndtri(share)) - self.bias
        scale = 1 + self.acceleration * away
        # A scale of 0 or less is beyond what BCa maps onto levels: certain, on the side where `null` lies.
        level = away / scale - self.bias if scale > 0 else math.copysign(math.inf, away)
        return max(float(ndtr(level)), 1 / (count + 1))

    def _permutation_p(self, null: float) -> float:
        """Flipping the signs of a subset's distances to `null` raises their sum when the subset's mean is at most
        `null`."""
        at_most = np.searchsorted(self.subsets, null, side="right")
        return float((1 + at_most) / (len(self.subsets) + 1))


def bootstrap_mean(values: Floats, *, confidence: float, seed: int, resamples: int = RESAMPLES) -> BootstrapMean:
    """Mean of `values` [n] without known bounds (with bounds: `sluice.statistics.bounded`), n at least 2, all finite:
    the wider, at each end, of two intervals that fail in different places.

    BCa bootstrap; resampling paired differences is the paired bootstrap. Source: Efron 1987, "Better Bootstrap
    Confidence Intervals", JASA 82:171-185; computed by scipy.stats.bootstrap. Too narrow when few values differ from
    the rest. Sign-flip permutation test: exact at every n for two equal releases, whose differences are symmetric.
    Source: Hartigan 1969, "Using Subsample Values as Typical Values", JASA 64:1303-1317, which gives its interval.
    Too narrow when the differences are skewed.
    """
    from scipy import stats
    from scipy.special import ndtri

    generator = np.random.default_rng(seed)
    subsets = _subset_means(values, generator, resamples)
    mean = float(values.mean())
    if np.ptp(values) == 0:
        # Nothing to resample; what is left of the permutation test is the sign test.
        return BootstrapMean(Interval(mean, mean), np.full(resamples, values[0]), 0.0, 0.0, subsets)
    result = stats.bootstrap(
        (values,), np.mean, n_resamples=resamples, batch=max(1, _AT_ONCE // len(values)),
        confidence_level=confidence, method="BCa", rng=generator,
    )  # fmt: skip
    resampled = np.sort(np.asarray(result.bootstrap_distribution, dtype=np.float64))
    below = np.searchsorted(resampled, mean, side="left") + np.searchsorted(resampled, mean, side="right")
    centred = values - mean
    acceleration = float((centred**3).sum() / (6 * (centred**2).sum() ** 1.5))
    # The rank at which the permutation's p-value passes the level.
    rank = max(1, math.floor((1 - confidence) / 2 * (resamples + 1) + 1e-9))
    bca, finite = result.confidence_interval, np.clip(subsets, values.min(), values.max())
    interval = Interval(min(float(bca.low), float(finite[rank - 1])), max(float(bca.high), float(finite[-rank])))
    return BootstrapMean(interval, resampled, float(ndtri(below / (2 * resamples))), acceleration, subsets)


def _subset_means(values: Floats, generator: np.random.Generator, resamples: int) -> Floats:
    """Means of random subsets of `values`, each value in with probability 1/2: [resamples], sorted. That of the empty
    subset, which flips no sign, is below everything."""
    means = np.full(resamples, -math.inf)
    rows = max(1, _AT_ONCE // len(values))
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start), len(values)
        chosen = generator.integers(0, 2, size=size, dtype=np.int8)
        counts = chosen.sum(axis=1)
        np.divide(chosen @ values, counts, out=means[start : start + size[0]], where=counts > 0)
    # Rounding must not move a mean of equal values off that value.
    return np.sort(np.where(np.isinf(means), means, np.clip(means, values.min(), values.max())))


def mcnemar_exact(gained: int, lost: int) -> float:
    """One-sided exact p-value that gains are not more likely than losses, from the discordant pairs alone.

    `gained`: champion 0, candidate 1; `lost`: the reverse. Source: McNemar 1947, Psychometrika 12:153-157, in its
    exact conditional (binomial) form; two-sided is twice the smaller side.
    """
    from scipy import stats

    if gained + lost == 0:
        return 1.0
    return float(stats.binomtest(gained, gained + lost, 0.5, alternative="greater").pvalue)


def score_z(gained: int, lost: int, n: int, difference: float) -> float:
    """Score statistic of "the paired difference of two rates is `difference`" (-1 < difference < 1).

    Source: Tango 1998, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", Statistics in Medicine 17:891-908. At difference 0 it is McNemar's z.
    """
    numerator = gained - lost - n * difference
    if numerator == 0:
        return 0.0
    a = 2 * n
    b = -gained - lost + (2 * n - gained + lost) * difference
    c = -lost * difference * (1 - difference)
    q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = n * (2 * q + difference * (1 - difference))
    return math.copysign(math.inf, numerator) if variance <= 0 else numerator / math.sqrt(variance)


def score_interval(gained: int, lost: int, n: int, *, confidence: float) -> Interval:
    """Tango's (1998) score interval of the paired difference of two rates; sound where a bootstrap is not, as with
    no discordant pair, when it is +-z^2 / (n + z^2)."""
    from scipy.optimize import brentq
    from scipy.special import ndtri

    z = float(ndtri(0.5 + confidence / 2))
    estimate = (gained - lost) / n
    edge = 1 - 1e-12

    def limit(sign: int) -> float:
        def distance(difference: float) -> float:
            # Infinite at the edges of the range; brentq needs only the sign there.
            return float(np.clip(score_z(gained, lost, n, difference), -1e6, 1e6)) - sign * z

        end = -sign * edge
        inner = min(max(estimate, -edge), edge)
        if distance(end) * distance(inner) > 0:
            return float(-sign)
        return float(brentq(distance, end, inner, xtol=1e-10))

    return Interval(limit(1), limit(-1))


def score_p(gained: int, lost: int, n: int, null: float) -> float:
    """One-sided p-value of "the paired difference of rates is at most `null`" (Tango 1998, section 2)."""
    from scipy.special import ndtr

    if null <= -1:
        return 1.0  # no evidence can be asked for or against the impossible
    return float(ndtr(-score_z(gained, lost, n, null)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the given order: the smallest times m, the next times m - 1, ... never decreasing, at
    most 1. Source: Holm 1979, Scandinavian Journal of Statistics 6:65-70."""
    adjusted = [1.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def minimum_detectable_effect(half_width: float, deviation: float, n: int, *, power: float) -> float:
    """The smallest true mean difference that n pairs show with `power`: what the interval reaches to one side
    (`half_width`), and what chance may take away, z[power] * deviation / sqrt(n), `deviation` of the differences.

    For a normal interval it is (z[1 - alpha] + z[power]) * deviation / sqrt(n). Source: Chow, Shao and Wang 2008,
    "Sample Size Calculations in Clinical Research", section 3.1; for evaluations of language models: Miller 2024,
    "Adding Error Bars to Evals" (arXiv:2411.00640), section 5.
    """
    from scipy.special import ndtri

    return half_width + float(ndtri(power)) * deviation / math.sqrt(n)


def needed_n(deviation: float, effect: float, *, alpha: float, power: float) -> int:
    """The pairs needed to show a true mean difference `effect` (> 0) with `power`: the formula above for a normal
    interval, solved for n; `alpha` one-sided."""
    from scipy.special import ndtri

    return max(2, math.ceil(((float(ndtri(1 - alpha)) + float(ndtri(power))) * deviation / effect) ** 2))


def worst_case(champion: Floats, candidate: Floats, low: float, high: float) -> Interval:
    """The mean difference [candidate minus champion] when all that is missing went against the candidate, and when it
    went in its favour. Values [n] of the same items within [low, high], NaN where one is missing, at least one item.

    Source: Manski 1989, "Anatomy of the Selection Problem", Journal of Human Resources 24:343-360: without any
    assumption why they are missing, these bounds are the narrowest. They bound what was measured, and have no
    uncertainty of sampling in them.
    """
    return Interval(
        float((_filled(candidate, low) - _filled(champion, high)).mean()),
        float((_filled(candidate, high) - _filled(champion, low)).mean()),
    )


def _filled(values: Floats, value: float) -> Floats:
    return np.nan_to_num(values, nan=value)


def relative_gain(champion: Floats, candidate: Floats, loss: float, *, higher_is_better: bool) -> Floats:
    """Values [n] whose mean is positive exactly when the candidate loses less than the share `loss` of the champion's
    mean (the champion's mean being positive): a margin of 10% is a test of their mean against 0, over the same pairs.

    candidate - (1 - loss) champion; where lower is better, (1 + loss) champion - candidate. Testing the ratio by this
    contrast needs no estimate of the ratio; its bounds are its values at the corners (low, high) and (high, low).
    Source: Fieller 1954, "Some Problems in Interval Estimation", JRSSB 16:175-185; for margins that are a share of the
    champion's mean: Hauschke et al. 1999, "Sample size determination for proving equivalence based on the ratio of two
    means", Statistics in Medicine 18:93-105.
    """
    return candidate - (1 - loss) * champion if higher_is_better else (1 + loss) * champion - candidate
