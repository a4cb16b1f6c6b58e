"""Metrics against values worked out by hand, and against their own laws."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sluice.evaluation.metrics import Metric, exact_match, rouge_l, score, token_f1

from sluice.evaluation import metrics
from sluice.evaluation.answers import Answer
from sluice.infra.errors import InputError


def answer(item: str, text: str = "", finish: str = "stop", error: str | None = None) -> Answer:
    return Answer(item, text, finish, 5, 5, 0.1, 0.2, error)


def test_token_f1_counts_repeated_words() -> None:
    # Shared words: a, permit (once); 2 * 2 / (4 + 3).
    assert token_f1("A permit, a permit!", "you need a permit".replace("you ", "")) == pytest.approx(4 / 7)
    assert token_f1("Före bygget", "före BYGGET.") == 1.0
    assert token_f1("", "something") == 0.0
    assert token_f1("", "?!") == 1.0


def test_rouge_l_is_about_order() -> None:
    # Lin 2004, section 3.1: "police killed the gunman" against "police kill the gunman" and "the gunman kill police":
    # longest common subsequences of 3 and 2 words of 4.
    reference = "police killed the gunman"
    assert rouge_l("police kill the gunman", reference) == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", reference) == pytest.approx(2 / 4)
    assert exact_match("Police killed, the gunman", reference) == 1.0
    assert exact_match("the gunman killed police", reference) == 0.0


@given(st.text(alphabet="ab c", max_size=30), st.text(alphabet="ab c", max_size=30))
def test_overlap_metrics_are_symmetric_bounded_and_ordered(left: str, right: str) -> None:
    for function in (token_f1, rouge_l):
        assert function(left, right) == function(right, left)
        assert 0 <= function(left, right) <= 1
        assert function(left, left) == 1
    assert exact_match(left, right) <= rouge_l(left, right) <= token_f1(left, right) + 1e-12


def test_what_has_no_value_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Metric("broken", "Broken", "mean", True, "", 3, "", lambda *_: math.nan)
    monkeypatch.setattr(metrics, "METRICS", {**metrics.METRICS, "broken": broken})
    references = {"d": "x", "a": "one two", "b": "x", "c": "x"}
    answers = [answer("a", "one two"), answer("b", error="timeout: 5 s"), answer("c", "x y", finish="length")]
    scores = score(answers, references, ["token_f1", "answer_rate", "answer_words", "broken"])
    assert scores.items == ("a", "b", "c", "d")
    assert scores.values["token_f1"] == (1.0, None, 2 / 3, None)
    assert scores.values["answer_rate"] == (1.0, None, 0.0, None)
    assert scores.values["answer_words"] == (2.0, None, 2.0, None)
    assert scores.causes["token_f1"] == {"b": "timeout", "d": "missing"}
    assert scores.values["broken"] == (None,) * 4
    assert scores.causes["broken"]["a"] == "not a finite number"
    assert scores.outcomes == {"a": "answered", "b": "timeout", "c": "truncated", "d": "missing"}


@pytest.mark.parametrize("text", ["", "I'm sorry, I cannot answer."])
def test_saying_nothing_is_a_bad_answer_not_a_missing_one(text: str) -> None:
    scores = score([answer("a", text)], {"a": "use brick"}, ["token_f1", "answer_rate"])
    assert scores.values == {"token_f1": (0.0,), "answer_rate": (0.0,)}


def test_answers_that_do_not_belong_are_refused() -> None:
    with pytest.raises(InputError, match="two answers"):
        score([answer("a"), answer("a")], {"a": "x"}, ["token_f1"])
    with pytest.raises(InputError, match="no reference"):
        score([answer("b")], {"a": "x"}, ["token_f1"])
    with pytest.raises(InputError, match="'bleu' is unknown"):
        score([], {"a": "x"}, ["bleu"])
