"""Agreement against published figures and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sluice.statistics.agreement import cohens_kappa, self_agreement


def labels_of(table: list[list[int]]) -> tuple[list[str], list[str]]:
    """Two raters' labels with this table of counts."""
    pairs = [(f"l{i}", f"l{j}") for i, row in enumerate(table) for j, count in enumerate(row) for _ in range(count)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def test_kappa_of_published_tables() -> None:
    # Cohen 1960, table 1, as counts of 200: agreement 0.70, by chance 0.41, kappa 0.492.
    found = cohens_kappa(*labels_of([[88, 14, 18], [10, 40, 10], [2, 6, 12]]))
    assert found.value == pytest.approx(0.492, abs=5e-4)
    assert found.n == 200
    # The usual interval, sound at this n, is 0.391 to 0.592 (Fleiss, Cohen and Everitt 1969).
    assert [found.low, found.high] == pytest.approx([0.391, 0.592], abs=0.02)


def test_full_agreement_of_few_items_is_not_certainty() -> None:
    found = cohens_kappa(*labels_of([[25, 0], [0, 25]]))
    assert found.value == 1.0
    assert found.high == 1.0
    assert 0.8 < found.low < 0.95
    assert cohens_kappa(*labels_of([[4, 0], [0, 4]])).low < 0.5


def test_where_nothing_can_be_told_from_chance_the_interval_is_everything() -> None:
    for a, b in (([], []), (["good"] * 50, ["good"] * 50)):
        found = cohens_kappa(a, b)
        assert (found.value, found.low, found.high, found.n) == (0.0, -1.0, 1.0, len(a))
    with pytest.raises(ValueError, match="zip"):
        cohens_kappa(["good"], [])


def test_order_of_items_and_of_raters_does_not_matter() -> None:
    a, b = labels_of([[20, 5], [3, 30]])
    order = np.random.default_rng(2).permutation(len(a))
    assert cohens_kappa([a[i] for i in order], [b[i] for i in order]) == cohens_kappa(a, b)
    turned = cohens_kappa(b, a)
    assert [turned.value, turned.low] == pytest.approx([cohens_kappa(a, b).value, cohens_kappa(a, b).low], abs=0.01)


@pytest.mark.parametrize(("share", "kappa"), [(0.5, 0.8), (0.2, 0.6), (0.1, 0.95)])
def test_the_lower_limit_holds_at_fifty_items(share: float, kappa: float) -> None:
    apart = share * (1 - share) * (1 - kappa)
    cells = [share - apart, apart, apart, 1 - share - apart]
    above, simulations = 0, 120
    for counts in np.random.default_rng(4).multinomial(50, cells, size=simulations):
        above += cohens_kappa(*labels_of(counts.reshape(2, 2).tolist())).low > kappa
    # 2.5% are allowed; binomial tolerance, three standard errors: 0.043.
    assert above / simulations <= 0.068


def test_self_agreement_is_the_share_of_equal_pairs() -> None:
    assert self_agreement([["a", "a", "a"], ["a", "a", "b"]]) == pytest.approx((1 + 1 / 3) / 2)
    assert self_agreement([["a", "b"], ["c"], []]) == 0.0
    assert math.isnan(self_agreement([["a"]]))
