"""The figures of a run and its line: robust against slow steps, resumed attempts and roll-backs."""

from __future__ import annotations

import pytest

from sluice.infra.progress import duration_text
from sluice.training.journal import Event, Line, StepMetrics, Validation
from sluice.training.progress_line import WARNING_STEPS, ProgressLine
from sluice.training.run_figures import RunFigures, loss_text, number_text


def step(number: int, *, at: float, seconds: float = 2.0, attempt: int = 0, loss: float = 1.25) -> StepMetrics:
    return StepMetrics(number, loss, 0.5, 3e-4, 4000, 2000, seconds, 61.2, 0.413, attempt=attempt, time=at)


def told(*lines: Line, max_steps: int = 100, devices: int = 2, price: float | None = 36.0) -> tuple[float, float, str]:
    said: list[tuple[float, float, str]] = []
    line = ProgressLine(lambda *a: said.append(a), max_steps=max_steps, devices=devices, dollars_per_hour=price)
    line.see(lines)
    assert len(said) == 1
    return said[0]


def test_a_line_says_all_that_people_want_to_know() -> None:
    lines: list[Line] = [
        Event("started", "go", time=0),
        *(step(n, at=2.0 * n) for n in range(1, 11)),
        Validation(10, 1.5, 20.0),
    ]
    assert told(*lines) == (
        10,
        100,
        "loss 1.250 (validation 1.500) · 3 min left · 1,000 tok/s/device · MFU 41% · 61.2 GiB · lr 3.0e-04 "
        "· grad 0.500 · $0.20",
    )
    assert "$" not in told(*lines, price=None)[2]
    assert told(Event("started", "Two processes start.", time=0))[2] == "Two processes start"


def test_one_slow_step_does_not_shake_the_time_left() -> None:
    lines = [step(n, at=2.0 * n, seconds=600.0 if n == 15 else 2.0) for n in range(1, 21)]
    figures = RunFigures(100, 2)
    figures.see(lines)
    assert figures.seconds_left == 80 * 2.0
    # Faster machines after a resume: only the new attempt counts.
    figures.see([step(21, at=100, seconds=1.0, attempt=1)])
    assert figures.seconds_left == 79


def test_pauses_between_attempts_cost_nothing_and_a_roll_back_goes_back() -> None:
    figures = RunFigures(100, 1, dollars_per_hour=3600.0)
    figures.see([Event("launched", "", time=1000), Event("started", "", time=1005), step(1, at=1010), step(2, at=1020)])
    figures.see(
        [Event("uploaded", "", time=1023), Event("launched", "", time=9000), Event("resumed", "", 1, time=9004)]
    )
    assert figures.steps_done == 1
    figures.see([Event("started", "", time=9004), step(2, at=9005, attempt=1)])
    assert (figures.paid_s, figures.dollars, figures.attempts) == (28, 28, 2)
    # Processes that died are started again while the nodes wait.
    figures.see([Event("dead_rank", "", time=9006), Event("started", "", time=9025), step(3, at=9026)])
    assert figures.paid_s == 28 + 21


def test_a_warning_stays_while_it_is_fresh_and_an_error_until_the_next_attempt() -> None:
    warning = Event("guard", "Step 3: skipped.", 3, "warning", time=3)
    assert told(step(3, at=3), warning)[2].endswith("\n⚠ Step 3: skipped.")
    assert "⚠" not in told(step(3, at=3), warning, step(4 + WARNING_STEPS, at=9))[2]
    stopped = Event("stopped", "It stopped.", 3, "error", time=4)
    assert told(step(3, at=3), stopped, step(90, at=9))[2].endswith("⚠ It stopped.")
    assert "⚠" not in told(step(3, at=3), stopped, Event("started", "Again.", time=5))[2]


def test_a_step_without_numbers_is_told_in_words() -> None:
    assert "loss not a number" in told(step(1, at=1, loss=float("nan")))[2]
    assert told(StepMetrics(1, 1.0, float("inf"), 0.0, 0, 0, 0.0, 0.0, time=1.0))[2].count("grad infinite") == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3599, "1 h"), (12_000, "3 h 20 min"), (187_200, "2 d 4 h")],
)
def test_durations_are_as_exact_as_people_care_for(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_numbers_keep_what_says_something() -> None:
    assert [loss_text(value) for value in (0.83124, 12.0, 0.00004, 41_200.0)] == [
        "0.831",
        "12.000",
        "4.0e-05",
        "41,200",
    ]
    assert [number_text(value) for value in (0.0, 0.5, 12.3456)] == ["0", "0.5000", "12.35"]
