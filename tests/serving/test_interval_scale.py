"""Every metric is drawn on one scale: worse to the right, its own margin at one place."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.serving.interval_scale import MARGIN, SAME, difference_text, interval_text, place_of, share_of
from tests.serving.rollouts import metric

RATIO = metric("total_time", kind="ratio", bound_fail=1.5, bound_margin=2.0)


def test_equal_and_margin_have_their_places_for_every_kind() -> None:
    for one, equal in ((metric(), 0.0), (metric("judge_score", kind="score"), 0.0), (RATIO, 1.0)):
        assert share_of(one, equal) == pytest.approx(SAME)
        assert share_of(one, one.bound_margin) == pytest.approx(MARGIN)


def test_twice_and_half_are_equally_far() -> None:
    assert share_of(RATIO, 2.0) - SAME == pytest.approx(SAME - share_of(RATIO, 0.5))


def test_what_has_to_be_better_is_drawn_too() -> None:
    superior = metric(bound_margin=0.0, bound_fail=0.0)
    assert place_of(superior).margin == place_of(superior).fail == pytest.approx(SAME)
    assert place_of(metric("total_time", kind="ratio", bound_fail=1.0, bound_margin=1.0, low=0.8, high=1.2)).high


def test_no_data_has_no_place() -> None:
    place = place_of(metric(estimate=None, low=None, high=None))
    assert place.low is place.middle is place.high is None
    assert difference_text(metric(), None) == interval_text(metric(low=None)) == "–"


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=3).map(sorted), st.sampled_from(["rate", "ratio", "score"]))
def test_marks_stay_inside_and_in_order(values: list[float], kind: str) -> None:
    low, middle, high = (math.exp(value) if kind == "ratio" else value for value in values)
    fail, margin = (1.2, 1.5) if kind == "ratio" else (0.05, 0.4)
    place = place_of(metric(kind=kind, low=low, estimate=middle, high=high, bound_fail=fail, bound_margin=margin))
    assert place.low is not None
    assert place.middle is not None
    assert place.high is not None
    assert 0 <= place.low <= place.middle <= place.high <= 1


def test_a_ratio_of_nothing_is_at_the_edge() -> None:
    assert place_of(metric(kind="ratio", low=0.0, estimate=1.0, high=2.0, bound_fail=1.2, bound_margin=1.5)).low == 0


@pytest.mark.parametrize(
    ("kind", "value", "text"), [("rate", 0.032, "+3.2 pts"), ("ratio", 1.324, "×1.32"), ("score", -0.05, "-0.05")]
)
def test_units_are_peoples(kind: str, value: float, text: str) -> None:
    assert difference_text(metric(kind=kind), value) == text
