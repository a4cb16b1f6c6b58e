"""What is the same as the training library's answer, and every way in which a server's answer is another one."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.infra.errors import IntegrityError
from sluice.serving.parity import ReferenceAnswer, compare
from sluice.serving.vllm import Answer

LIMIT = 0.01
KNOWN = ReferenceAnswer((1, 2), ({10: -0.5, 20: -0.505, 30: -3.0}, {11: -0.4, 21: -2.0}))


def said(*tokens: tuple[int, float], prompt: tuple[int, ...] = (1, 2)) -> Answer:
    return Answer("x", "stop", tuple((f"t{i}", v) for i, v in tokens), {}, prompt, tuple(i for i, _ in tokens))


SAME = said((10, -0.5), (11, -0.4))


def test_the_same_answer_is_the_same() -> None:
    found = compare((SAME,), (KNOWN,), limit=LIMIT)
    assert (found.largest, found.tokens, found.ties, found.strange) == (0, 2, 0, ())
    assert found.within(LIMIT)
    near = compare((said((10, -0.508), (11, -0.4)),), (KNOWN,), limit=LIMIT)
    assert near.largest == pytest.approx(0.008)
    assert near.within(LIMIT)
    assert "as the training library does (2 tokens" in near.sentence(LIMIT)


def test_a_near_tie_may_turn_and_ends_the_comparison() -> None:
    tied = compare((said((20, -0.5), (77, -9.0)),), (KNOWN,), limit=LIMIT)
    assert (tied.ties, tied.tokens, tied.strange) == (1, 1, ())
    assert tied.within(LIMIT)
    assert "1 parted at a near tie" in tied.sentence(LIMIT)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (said((30, -0.5), (11, -0.4)), "parts from it at token 1 ('t30'), which is no near tie"),
        (said((10, -0.5), (99, -0.4)), "parts from it at token 2"),
        (said((10, -0.5)), "ends after 1 tokens, not after 2"),
        (said((10, -0.5), (11, -0.4), (12, -0.1)), "ends after 3 tokens, not after 2"),
        (said((10, -0.5), (11, -0.4), prompt=(1, 2, 3)), "3 tokens there, 2 in training: another chat template"),
        (said((10, -0.5), (11, -0.4), prompt=()), "it does not tell them"),
        (dataclasses.replace(SAME, tokens=()), "without log-probabilities"),
    ],
)
def test_another_answer_is_strange(answer: Answer, says: str) -> None:
    found = compare((answer,), (KNOWN,), limit=LIMIT)
    assert not found.within(LIMIT)
    assert says in found.sentence(LIMIT)


def test_one_strange_prompt_of_several_is_enough() -> None:
    found = compare((SAME, said((30, -0.5))), (KNOWN, KNOWN), limit=LIMIT)
    assert not found.within(LIMIT)
    assert "prompt 2 parts from it" in found.sentence(LIMIT)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_or_too_far_off_passes_nothing(value: float) -> None:
    assert not compare((said((10, value), (11, -0.4)),), (KNOWN,), limit=LIMIT).within(LIMIT)
    off = compare((said((10, -0.52), (11, -0.4)),), (KNOWN,), limit=LIMIT)
    assert not off.within(LIMIT)
    assert "not as the training library does" in off.sentence(LIMIT)


def test_nothing_compared_is_no_parity() -> None:
    assert not compare((), (), limit=LIMIT).within(LIMIT)
    assert not compare((SAME,), (), limit=LIMIT).within(LIMIT)


@pytest.mark.parametrize("content", [{}, {"prompt": [1]}, {"prompt": [], "steps": []}, {"prompt": [1], "steps": [[]]}])
def test_a_damaged_reference_is_told(content: dict[str, object]) -> None:
    with pytest.raises(IntegrityError, match="damaged"):
        ReferenceAnswer.from_json(content)


@given(st.lists(st.floats(-0.2, 0.2), min_size=2, max_size=2), st.floats(0.001, 0.1))
def test_within_means_every_difference_is(offsets: list[float], limit: float) -> None:
    answer = said((10, -0.5 + offsets[0]), (11, -0.4 + offsets[1]))
    known = ReferenceAnswer((1, 2), ({10: -0.5}, {11: -0.4}))
    differences = [abs(-0.5 + offsets[0] + 0.5), abs(-0.4 + offsets[1] + 0.4)]
    assert compare((answer,), (known,), limit=limit).within(limit) == (max(differences) <= limit)
