"""The training report: one page for runs of any length and any end, every text escaped, nothing drawn over."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sluice.training.curves import MOST_POINTS, Curves, _limit, _moving_median, loss_svg
from sluice.training.journal import Event, Journal, Sample, StepMetrics
from sluice.training.recipe import Recipe, load_recipe
from sluice.training.report import EVENTS_SHOWN, training_page
from tests.training.journals import START, write_journal

VOID = {"meta", "path", "use", "br", "hr", "img", "link"}


def recipe(steps: int) -> Recipe:
    return load_recipe("demo").with_overrides({"schedule.max_steps": steps})


class Closed(HTMLParser):
    """Fails on a tag that is not closed; collects the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def words(page: str) -> str:
    parser = Closed()
    parser.feed(page)
    assert parser.open == []
    return " ".join(" ".join(parser.text).split())


def test_a_long_run_with_trouble_is_told_on_one_page(tmp_path: Path) -> None:
    page = training_page(write_journal(tmp_path, 500, broken=120), recipe(500), dollars_per_hour=196.64)
    text = words(page)
    for said in (
        "Training finished",
        "All 500 steps are done",
        "2 attempts, 1 h 20 min of training",
        "$262",
        "Warning. Step 166: the gradient norm 31.2 is 38 times",
        "Step 120: the loss is not a number",
        "The checkpoint of step 300 is damaged",
        "Resumed from the checkpoint of step 250",
        "Saved step 500: 41 MB in 0.6 s. Uploaded in 1.9 s.",
        "Step 50 the the of and shed of",
        "resumed or restarted here",
        "not a finite number",
        "NVIDIA H100 80GB HBM3",
        "learning rate 0.003",
    ):
        assert said in text, said
    assert "What &lt;b&gt;insulation&lt;/b&gt; is allowed" in page
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="(?!#)', page)


@pytest.mark.parametrize(("steps", "validate"), [(1, True), (5, True), (80, False), (MOST_POINTS + 1, True)])
def test_runs_of_any_length_have_their_curves(tmp_path: Path, steps: int, validate: bool) -> None:
    page = training_page(write_journal(tmp_path, steps, validate=validate, trouble=False), recipe(steps))
    assert page.count("<svg") == 5
    text = words(page)
    assert ("lowest" in text) == validate
    assert "Cost" not in text
    assert len(page) < 700_000


def test_the_same_journal_gives_the_same_bytes(tmp_path: Path) -> None:
    write_journal(tmp_path, 30)
    assert training_page(tmp_path, recipe(30)) == training_page(tmp_path, recipe(30))


def test_a_run_that_ended_badly_or_not_yet_says_so(tmp_path: Path) -> None:
    failed = "Training failed: a training process was killed by SIGKILL, perhaps for lack of memory."
    empty = words(training_page(tmp_path, recipe(12), outcome=failed))
    assert "Training failed A training process was killed by SIGKILL" in empty
    assert "0 of 12 steps were done." in empty
    journal = Journal(tmp_path)
    journal.write(Event("started", "Go.", time=START))
    journal.write(Event("resumed", "Going on.", 3, time=START + 5))
    assert "Training under way 3 of 12 steps so far." in words(training_page(tmp_path, recipe(12)))
    journal.write(Event("interrupted", "Saved after a notice: run again to go on.", 3, "warning", time=START + 6))
    assert "Training interrupted Saved after a notice" in words(training_page(tmp_path, recipe(12)))
    journal.write(Event("stopped", "The loss was not a number 3 times.", 3, "error", time=START + 7))
    assert "Training stopped The loss was not a number 3 times. 3 of 12" in words(training_page(tmp_path, recipe(12)))


def test_too_many_events_leave_the_warnings(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(Event("guard", "The one warning.", 1, "warning", time=START))
    for number in range(EVENTS_SHOWN + 20):
        journal.write(Event("resumed", f"Restart {number}.", number, time=START + number))
    text = words(training_page(tmp_path, recipe(12)))
    assert "The one warning." in text
    assert "Restart 119." in text
    assert "Restart 0." not in text
    assert "21 earlier events" in text


def test_samples_are_followed_from_first_to_last(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in range(0, 100, 10):
        journal.write(Sample(step, 0, "A question?", f"answer {step}.", "the reference", time=START + step))
    text = words(training_page(tmp_path, recipe(100)))
    shown = re.findall(r"(Before training|Step \d+) answer (\d+)\.", text)
    assert [number for _, number in shown] == ["0", "30", "60", "90"]
    assert "All 10 answers" in text


def test_a_value_that_is_no_number_is_marked_and_not_drawn_over() -> None:
    values = np.array([1.0, np.nan, 3.0, 100.0, 5.0])
    assert np.isnan(_moving_median(values, 3)).tolist() == [False, True, False, False, False]
    assert _moving_median(values, 3)[3] == 5.0
    steps = [StepMetrics(n, float("nan") if n == 2 else 1.0, 1, 1, 1, 1, 1, 1, time=START) for n in range(1, 6)]
    whole = [StepMetrics(n, 1.0, 1, 1, 1, 1, 1, 1, time=START) for n in range(1, 6)]
    crosses = [loss_svg(Curves(some)).count("#cf222e") for some in (steps, whole)]
    assert crosses[0] > 0
    assert crosses[1] == 0


def test_one_outlier_does_not_flatten_the_curve() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    assert _limit(axes, np.array([1.0 + n / 100 for n in range(60)] + [900.0]), zero=False) == 1
    assert axes.get_ylim()[1] < 3
    assert _limit(axes, np.array([2.0, 1.0, 0.5]), zero=False) == 0
    assert axes.get_ylim()[0] == 0
