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
    """The bootstrap of a mean: resampled means (sorted), bias correction z0 and acceleration a of BCa."""

    interval: Interval
    resampled: Floats
    bias: float
    acceleration: float

    def p_greater(self, null: float) -> float:
        """One-sided p-value of "the mean is at most `null`", at least 1 / (resamples + 1).

        The BCa interval read backwards: the level whose one-sided lower limit is `null`, so the p-value and the
        interval never disagree. Source: Efron 1987, JASA 82:171, equation 2.3, solved for the level (as the
        "bootstrap p-value" of Efron and Tibshirani 1993, section 15.6).
        """
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


def bootstrap_mean(values: Floats, *, confidence: float, seed: int, resamples: int = RESAMPLES) -> BootstrapMean:
    """BCa bootstrap of the mean of `values` [n], n at least 2, all finite and not all equal.

    Resampling paired differences is the paired bootstrap. Source: Efron 1987, "Better Bootstrap Confidence
    Intervals", JASA 82:171-185; computed by scipy.stats.bootstrap.
    """
    from scipy import stats
    from scipy.special import ndtri

    batch = max(1, 4_000_000 // len(values))  # at most 32 MB of resampled values at once
    result = stats.bootstrap(
        (values,), np.mean, n_resamples=resamples, batch=batch, confidence_level=confidence, method="BCa",
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    resampled = np.sort(np.asarray(result.bootstrap_distribution, dtype=np.float64))
    mean = float(values.mean())
    below = np.searchsorted(resampled, mean, side="left") + np.searchsorted(resampled, mean, side="right")
    centred = values - mean
    acceleration = float((centred**3).sum() / (6 * (centred**2).sum() ** 1.5))
    interval = Interval(float(result.confidence_interval.low), float(result.confidence_interval.high))
    return BootstrapMean(interval, resampled, float(ndtri(below / (2 * resamples))), acceleration)


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


def minimum_detectable_effect(deviation: float, n: int, *, alpha: float, power: float) -> float:
    """The smallest true mean difference that n pairs show with `power`, by the normal approximation.

    (z[1 - alpha] + z[power]) * deviation / sqrt(n), `alpha` one-sided, `deviation` of the differences. Source: Chow,
    Shao and Wang 2008, "Sample Size Calculations in Clinical Research", section 3.1; for evaluations of language
    models: Miller 2024, "Adding Error Bars to Evals" (arXiv:2411.00640), section 5.
    """
    from scipy.special import ndtri

    return float((ndtri(1 - alpha) + ndtri(power)) * deviation / math.sqrt(n))


def needed_n(deviation: float, effect: float, *, alpha: float, power: float) -> int:
    """The pairs needed to show a true mean difference `effect` (> 0) with `power`: the formula above, solved for n."""
    from scipy.special import ndtri

    return max(2, math.ceil(((float(ndtri(1 - alpha)) + float(ndtri(power))) * deviation / effect) ** 2))
