"""What counts as a wrong stream: the judge of the streams has to notice each kind."""

from __future__ import annotations

from benchmarks.rollout import Asked, Weights, split, unsticky, verdicts

KNOWN = {("a", 0): "left", ("c", 0): "right"}
WEIGHTS = Weights(asked=[0.0, 10.0, 20.0], there=[1.0, 11.0, 21.0], weight=[0, 50, 10])


def asked(release: str, text: str, at: float = 5.0, *, session: str = "s", fine: bool = True) -> Asked:
    return Asked(session, True, 0, release, text, fine, at, at + 0.1)


def test_failed_mixed_and_wrong_are_told_apart() -> None:
    answers = [
        asked("a", "left"),
        asked("c", "right"),
        asked("a", "right"),
        asked("c", "rileft"),
        asked("a", "", fine=False),
    ]
    found = verdicts(answers, KNOWN, ("a", "c"))
    assert found == {"failed": 1, "mixed_answers": 1, "wrong_adapter": 1, "answered_by_canary": 2}


def test_a_request_beside_a_change_may_have_met_either_weight() -> None:
    assert WEIGHTS.possible(5, 6) == (0, 0)
    assert WEIGHTS.possible(9, 10.5) == (0, 50)
    assert WEIGHTS.possible(10.5, 10.6) == (0, 50)
    assert WEIGHTS.possible(12, 13) == (50, 50)
    assert WEIGHTS.possible(12, 30) == (10, 50)


def test_sessions_that_jump_are_noticed() -> None:
    steady = [asked("a", "", 5), asked("c", "", 12), asked("a", "", 25)]
    assert unsticky(steady, WEIGHTS, "c") == 0
    # On stable at 50% and on the canary at 10%: no place in 0 to 100 explains both.
    assert unsticky([asked("a", "", 12), asked("c", "", 25)], WEIGHTS, "c") == 1
    # On the canary although nobody may be.
    assert unsticky([asked("c", "", 5)], WEIGHTS, "c") == 1
    assert unsticky([asked("a", "", 12, session="one"), asked("c", "", 25, session="other")], WEIGHTS, "c") == 0


def test_a_split_that_is_off_is_noticed() -> None:
    half = [asked("ac"[n % 2], "", 12, session=str(n)) for n in range(200)]
    assert [row["holds"] for row in split(half, WEIGHTS, "c")] == [True]
    fifth = [asked("c" if n % 5 == 0 else "a", "", 12, session=str(n)) for n in range(200)]
    (row,) = split(fifth, WEIGHTS, "c")
    assert (row["weight"], row["sessions"], row["on_canary"], row["holds"]) == (50, 200, 40, False)
