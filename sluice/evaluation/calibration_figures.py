"""Figures of a calibration: scores cut at a threshold, and what length has to do with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

from sluice.provenance.canonical import digest_json
from sluice.statistics.agreement import Kappa, cohens_kappa

_SMALLEST_N = 5


def halves(labels: Mapping[str, int]) -> dict[str, int]:
    """Half 0 or 1 of each item, by digest, with as many good and bad ones in each as there can be."""
    return {
        item: place % 2
        for label in (0, 1)
        for place, item in enumerate(sorted((one for one, its in labels.items() if its == label), key=digest_json))
    }


def predicted_labels(
    scores: Mapping[str, float], labels: Mapping[str, int]
) -> tuple[dict[str, int], tuple[float, float]]:
    """Each score cut at the threshold of the *other* half of the items (two-fold cross-validation), and the threshold
    that was applied to each half."""
    half = halves(labels)
    parts = [{item: score for item, score in scores.items() if half[item] == number} for number in (0, 1)]
    thresholds = threshold(parts[1], labels), threshold(parts[0], labels)
    return {item: int(score >= thresholds[half[item]]) for item, score in scores.items()}, thresholds


def threshold(scores: Mapping[str, float], labels: Mapping[str, int]) -> float:
    """The cut with the largest sensitivity + specificity - 1 (Youden 1950, Cancer 3:32-35), of equal ones the nearest
    to 0.5; 0.5 when the items are all good, or all bad."""
    good = [score for item, score in scores.items() if labels[item]]
    bad = [score for item, score in scores.items() if not labels[item]]
    if not good or not bad:
        return 0.5
    levels = sorted({*good, *bad})
    cuts = {0.5, *((low + high) / 2 for low, high in pairwise(levels))}

    def gain(cut: float) -> float:
        return sum(score >= cut for score in good) / len(good) - sum(score >= cut for score in bad) / len(bad)

    best: float = max(cuts, key=lambda cut: (gain(cut), -abs(cut - 0.5), cut))
    return round(best, 6)


def best_kappa(scores: Mapping[str, float], labels: Mapping[str, int]) -> Kappa:
    """What agreement with people can still become at best: these scores are cut where it suits them, and all labelled
    items without a score agree."""
    rest = [label for item, label in labels.items() if item not in scores]

    def agreeing(cut: float) -> int:
        return sum((score >= cut) == bool(labels[item]) for item, score in scores.items())

    cut = max(sorted({0.5, *scores.values(), math.inf}), key=agreeing)
    given = [labels[item] for item in scores]
    return cohens_kappa([*given, *rest], [*(int(score >= cut) for score in scores.values()), *rest])


def length_bias(scores: Mapping[str, float], labels: Mapping[str, int], words: Mapping[str, int]) -> float | None:
    """Rank correlation of score and length among answers that people judge alike; None of fewer than five items.

    Spearman's partial rank correlation given the label (Kendall 1942, Biometrika 32:277-283): of the ranks, with the
    mean of each label taken out. Without that a judge would look biased wherever good answers happen to be longer.
    0 where score or length do not differ within a label: nothing is left for length to explain.
    """
    import numpy as np
    from scipy.stats import rankdata

    items = sorted(scores)
    if len(items) < _SMALLEST_N:
        return None
    columns = [rankdata([source[item] for item in items]) for source in (scores, words)]
    given = np.array([labels[item] for item in items])
    for column in columns:
        for label in (0, 1):
            column[given == label] -= column[given == label].mean() if (given == label).any() else 0.0
    deviations = [float(column.std()) for column in columns]
    if min(deviations) < 1e-9:
        return 0.0
    return round(float(np.mean(columns[0] * columns[1])) / (deviations[0] * deviations[1]), 6)
