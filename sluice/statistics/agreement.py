"""Agreement between raters: a judge with people, and a judge with itself when it is asked again."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sluice.statistics.paired import seed_of

DRAWS = 20_000
"""Draws of the posterior: the Monte-Carlo error of a 95% limit is below a hundredth of the interval's width."""


@dataclass(frozen=True)
class Kappa:
    """Cohen's kappa of two raters on `n` items, with a two-sided interval."""

    value: float
    low: float
    high: float
    n: int


def cohens_kappa(labels_a: Sequence[Hashable], labels_b: Sequence[Hashable], confidence: float = 0.95) -> Kappa:
    """Agreement of two raters beyond chance; labels in the same order of items. Deterministic.

    Kappa: Cohen 1960, "A Coefficient of Agreement for Nominal Scales", Educational and Psychological Measurement
    20:37-46. The interval is that of the posterior of kappa under Jeffreys' prior of the table
    (Basu, Banerjee and Sen 2000, "Bayesian Inference for Kappa from Single and Multiple Studies", Biometrics
    56:577-582). The usual interval (Fleiss, Cohen and Everitt 1969) and the bootstrap have no width at all when two
    raters agree on all items; of 50 items with a true kappa of 0.6 to 0.8 their lower limits were above it in 3% to 16%
    of simulations where 2.5% were allowed, and the posterior's in 2.5% at most (tests/statistics).

    Where nobody can say more than chance (no items, or both raters used one and the same label throughout) kappa is
    not defined: the value is 0 and the interval everything, -1 to 1. Raises `ValueError` for lists of different
    lengths.
    """
    pairs = list(zip(labels_a, labels_b, strict=True))
    # dict, not set: the order of labels, and so of the draws, must not depend on the hashes of this process.
    labels = {label: index for index, label in enumerate(dict.fromkeys(label for pair in pairs for label in pair))}
    size = len(labels)
    if size < 2:
        return Kappa(0.0, -1.0, 1.0, len(pairs))
    table = np.zeros((size, size))
    for a, b in pairs:
        table[labels[a], labels[b]] += 1
    # Ordered by content, so that the order of the items does not matter.
    order = sorted(range(size), key=lambda index: repr(list(labels)[index]))
    table = table[np.ix_(order, order)]
    # Jeffreys' half a pair in each cell of a table of two labels. Of more labels the prior weighs no more, in all.
    posterior = np.random.default_rng(seed_of(table.tolist())).dirichlet((table + 2 / size**2).ravel(), size=DRAWS)
    tail = (1 - confidence) / 2
    low, high = np.quantile(_kappas(posterior.reshape(DRAWS, size, size)), [tail, 1 - tail])
    value = float(_kappas(table[None] / len(pairs))[0])
    # The prior pulls towards no agreement, so of few items the estimate itself can lie outside.
    return Kappa(value, min(float(low), value), max(float(high), value), len(pairs))


def _kappas(tables: NDArray[np.float64]) -> NDArray[np.float64]:
    """Kappa of each table of shares [draws, labels, labels]."""
    agreed = np.trace(tables, axis1=1, axis2=2)
    chance = (tables.sum(axis=1) * tables.sum(axis=2)).sum(axis=1)
    result: NDArray[np.float64] = (agreed - chance) / (1 - chance)
    return result


def self_agreement(repeats: Sequence[Sequence[Hashable]]) -> float:
    """Share of equal labels when a rater is asked again: over items, the mean share of pairs of its own labels that
    are equal (the observed agreement of Fleiss 1971, Psychological Bulletin 76:378-382).

    `repeats` [items, times asked]; an item asked less than twice says nothing. NaN when no item says anything.
    """
    shares = [
        sum(one == other for i, one in enumerate(labels) for other in labels[:i])
        / (len(labels) * (len(labels) - 1) / 2)
        for labels in repeats
        if len(labels) > 1
    ]
    return float(np.mean(shares)) if shares else float("nan")
