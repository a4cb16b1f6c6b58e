"""A rollout on a terminal: everything is there at every width, without colour too."""

from __future__ import annotations

from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from sluice.pipelines.cli.rollout_view import RolloutView, interval_line
from sluice.serving.policy import default_policy
from sluice.serving.rollout_facts import LeaseFacts, RolloutFacts
from sluice.serving.rollout_store import CoolDown
from tests.serving.rollouts import BEGUN, CANARY, STABLE, analysis, event, facts, failed, holding, metric, promoted


def shown(given: RolloutFacts, width: int = 120, **more: Any) -> str:
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(RolloutView(given, **more))
    return captured.get()


@pytest.mark.parametrize("width", [80, 120, 200])
@pytest.mark.parametrize("state", [holding(), failed(), promoted()])
def test_no_line_is_wider_than_the_terminal_and_every_metric_is_there(width: int, state: Any) -> None:
    text = shown(facts(state), width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert state.analysis is not None
    for one in state.analysis.metrics:
        (line,) = [line for line in text.splitlines() if line.startswith(one.name.replace("_", " "))]
        assert one.verdict in line
        assert f" {one.canary_n} / {one.stable_n} " in line
    assert "…" not in text


def test_who_answers_whom_where_it_stands_and_what_is_missing() -> None:
    text = shown(facts(holding()))
    assert [line.split()[:3] for line in text.splitlines()[:2]] == [
        ["stable", STABLE.served_name, "70%"],
        ["canary", CANARY.served_name, "30%"],
    ]
    assert "20% ✓ → [35%] → 50%" in text
    # 7 of the canary by now, 4 of them before this step; the step needs 8.
    assert "3 requests in this step, at least 8" in text
    assert "ended in 4 min if still undecided" in text
    assert "5 more requests of the canary (7 of 12 in this step)." in text
    assert "(ann)" in text


def test_what_was_counted_in_the_shadow_is_no_request_of_a_user() -> None:
    shadow = event(2.5, "pass", 0, verdict="pass", analysis=analysis(metric(canary_n=17)))
    state = holding(events=(shadow, *holding().events))
    assert facts(state).samples() == (3, 8)
    first = holding(step=0, since=BEGUN + 3, events=(shadow, event(3, "raise", 10)))
    assert facts(first).samples() == (7, 4)
    assert facts(holding(phase="baking")).samples() is None


def test_a_long_look_takes_one_line_while_it_is_watched_and_all_of_it_in_the_status() -> None:
    state = holding(events=(*holding().events, event(16, "look", 30, "word " * 60 + "finis", verdict="pass")))
    assert "finis" not in shown(facts(state))
    assert "finis" in shown(facts(state), events=0)


def test_time_left_is_that_of_the_phase() -> None:
    step, policy = default_policy().steps[1], default_policy()
    early = facts(holding(spent_s=1.0)).time_left()
    assert (early.passes, early.ends) == (step.minimum_time_s - 1, step.maximum_time_s - 1)
    baking = facts(holding(phase="baking", spent_s=1.0)).time_left()
    assert (baking.passes, baking.ends) == (policy.bake_s - 1, None)
    assert facts(holding(spent_s=9e9)).time_left().ends == 0
    assert facts(failed()).time_left().ends is None


def test_a_verdict_reads_without_colour_and_a_metric_that_only_shows_is_in_parentheses() -> None:
    text = shown(facts(failed()))
    line = {one.name: next(row for row in text.splitlines() if row.startswith(one.name.replace("_", " ")))
            for one in failed().analysis.metrics}  # type: ignore[union-attr]  # fmt: skip
    assert "✕ fail" in line["thumbs_down"]
    assert "✓ pass" in line["time_to_first_token"]
    assert "? inconclusive" in line["error_rate"]
    assert "(? inconclusive)" in line["truncated_answers"]
    assert "Why it failed: Thumbs down: 6 of 9" in text


def test_the_interval_stands_where_its_figures_are() -> None:
    plain = interval_line(metric(low=-0.1, estimate=0.0, high=0.1), 40).plain
    assert len(plain) == 40
    assert plain.index("─") < plain.index("●") < plain.rindex("─") < plain.index("║")
    beyond = interval_line(metric(low=-5.0, estimate=0.0, high=5.0), 40).plain
    assert (beyond[0], beyond[-1]) == ("◀", "▶")
    assert set(interval_line(metric(low=None, estimate=None, high=None), 40).plain) == set(" │┆║")


def test_what_is_not_as_it_should_be_is_said() -> None:
    text = shown(
        facts(
            holding(paused=True),
            drift=("30% in Envoy, 10% decided.",),
            cool_down=CoolDown(CANARY.release, "slow", BEGUN + 102.5),
            lease=LeaseFacts("another", 8, False, ("release on host-2",)),
            undelivered=3,
            webhook="HTTP 503",
        )
    )
    for words in (
        "No controller is at work",
        "paused: it keeps this share",
        "The gateway differs: 30% in Envoy, 10% decided.",
        "no other rollout begins for 1 min (slow)",
        "Waiting for their turn: release on host-2",
        "HTTP 503; 3 wait for it",
    ):
        assert words in text


def test_without_gateway_rollout_or_figures() -> None:
    assert "does not say who answers: no address" in shown(facts(routes=None, gateway="no address"))
    assert "No rollout yet" in shown(facts())
    assert "No rollout yet" not in shown(facts(holding(analysis=None), policy=None))
    assert "probing" in shown(facts(holding(phase="probing", analysis=analysis(), events=())))


def test_other_peoples_words_are_no_markup() -> None:
    assert "[red]x[/red]" in shown(facts(holding(phase="failed", reason="[red]x[/red]")))
