"""The page of a rollout: what became of it and why, for somebody who was not there; nothing from elsewhere in it."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from sluice.serving.analysis import Conviction
from sluice.serving.policy import default_policy
from sluice.serving.rollout_charts import history
from sluice.serving.rollout_page import PageFacts, rollout_page
from sluice.serving.rollout_state import RolloutState
from tests.serving.rollouts import (
    BEGUN,
    CANARY,
    FIGURES,
    STABLE,
    TRACE,
    USERS_WORDS,
    analysis,
    event,
    failed,
    holding,
    metric,
    promoted,
)

_VOID = {"meta", "br", "line", "polygon", "polyline"}


class Balanced(HTMLParser):
    """Refuses tags that do not close in order; keeps the text and every attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += f"{data} "


def read(state: RolloutState, facts: PageFacts = PageFacts("assistant")) -> Balanced:
    page = Balanced()
    page.feed(rollout_page(state, facts))
    assert page.open == []
    page.text = " ".join(page.text.split())
    return page


@pytest.mark.parametrize(
    "state", [failed(), promoted(), holding(), holding(analysis=None), holding(events=holding().events[:1])]
)
def test_it_needs_nothing_from_elsewhere_and_runs_nothing(state: RolloutState) -> None:
    html = rollout_page(state, PageFacts("assistant", policy=default_policy()))
    page = read(state)
    assert "script" not in {tag for tag, _, _ in page.attributes}
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name in ("src", "srcset")]
    assert not re.search(r"url\(|@import", html)
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_a_failure_names_the_metric_the_figures_and_the_requests() -> None:
    page = read(failed(), PageFacts("assistant", traces={TRACE: TRACE}, pages={TRACE: "http://mlflow.test/trace"}))
    assert "Rolled back at 30%" in page.text
    assert "Thumbs down: 6 of 9 on the canary, 1 of 20 on stable." in page.text
    assert "9 values of the canary were compared with 20 of stable" in page.text
    assert "+62.0 pts" in page.text
    assert "+26.0 to +99.0" in page.text
    assert "at most 2.0e-04" in page.text
    assert f"sluice lineage {TRACE}" in page.text
    assert ("a", "href", "http://mlflow.test/trace") in page.attributes
    assert "8f1d2c3a-0001-4aaa-9bbb-0123456789ab" in page.text


def test_what_ended_it_at_once_is_told_though_no_metric_had_failed() -> None:
    requests = tuple(Conviction(f"r-{at}", "s", "error_rate", 1.0, "HTTP 503", BEGUN + at) for at in range(12))
    tripped = replace(FIGURES, verdict="fail", sentence="12 of 12 answers failed within 10 s.", convicting=requests)
    html = rollout_page(failed(reason=tripped.sentence, analysis=tripped), PageFacts("assistant"))
    assert "Ended at once" in html
    assert html.index("r-11") < html.index("4 more") < html.index("r-3<")
    assert html.count("HTTP 503") == 12


def test_a_person_who_aborts_it_convicts_nobody() -> None:
    page = read(failed(reason="slow (aborted by ann)", analysis=FIGURES))
    assert "slow (aborted by ann)" in page.text
    assert "convicted" not in page.text


def test_what_users_and_servers_sent_is_shown_as_text() -> None:
    html = rollout_page(failed(), PageFacts("assistant"))
    assert USERS_WORDS not in html
    assert "&lt;script&gt;" in html
    mean = holding(events=(event(0, "probe", 0, '"><img src=x>', verdict="fail"), *holding().events))
    assert "<img" not in rollout_page(mean, PageFacts("assistant"))


def test_a_success_has_no_conviction() -> None:
    page = read(promoted())
    assert "Promoted: it answers everybody" in page.text
    assert "What convicted it" not in page.text


def test_every_event_is_told_with_who_and_why() -> None:
    page = read(failed())
    for one in failed().events:
        assert one.sentence in page.text
    assert "ann: paused (is it the mail?) ann" in page.text


def test_looks_that_follow_each_other_are_one_row() -> None:
    looks = tuple(event(30 + number, "look", 30, f"Look {number}.", verdict="pass") for number in range(5))
    html = rollout_page(holding(events=(*holding().events[:3], *looks)), PageFacts("assistant"))
    assert "4 looks before" in html
    assert html.index("Look 4.") < html.index("Look 0.")


def test_a_metric_without_figures_is_a_gap_and_no_zero() -> None:
    known, unknown = metric(), metric(estimate=None, low=None, high=None)
    looks = tuple(
        event(10 * number, "look", 10, analysis=analysis(one))
        for number, one in enumerate((known, known, unknown, known, known))
    )
    state = holding(begun=0.0, events=looks, analysis=looks[-1].analysis)
    assert [one for _, one in history(state, "error_rate")] == [known, known, unknown, known, known]
    assert rollout_page(state, PageFacts("assistant")).count('class="band"') == 2


def test_the_shadow_and_what_has_no_figures_at_all_are_not_drawn() -> None:
    shadow = event(1, "pass", 0, verdict="pass", analysis=analysis(metric(estimate=0.9)))
    state = holding(events=(shadow, *holding().events))
    assert [one.canary_n for _, one in history(state, "error_rate")] == [4, 7]
    html = rollout_page(state, PageFacts("assistant"))
    assert html.count('class="metric ') == 3  # of four: nothing is known of the judge's score
    assert "Judge score" in html


def test_a_clock_that_jumped_back_draws_all_the_same() -> None:
    events = (*holding().events[:3], event(-4000, "note", 10, "This machine's clock jumped."), *holding().events[3:])
    assert "clock jumped" in read(holding(events=events)).text


def test_before_any_user_it_says_so() -> None:
    state = holding(phase="failed", weight=0, events=holding().events[:2], reason="probe: no answer", analysis=None)
    page = read(state)
    assert "Failed before any user saw it" in page.text
    assert f"{CANARY.served_name} beside {STABLE.served_name}" in page.text
    assert str(BEGUN) not in page.text
