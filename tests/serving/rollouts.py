"""States of rollouts as a controller leaves them, for the tests of whatever shows them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sluice.serving.analysis import AnalysisResult, Conviction, MetricResult
from sluice.serving.policy import default_policy
from sluice.serving.rollout_facts import LeaseFacts, RolloutFacts
from sluice.serving.rollout_state import EventKind, RolloutEvent, RolloutState
from sluice.serving.routes import RouteState, Target

BEGUN = 1_795_300_000.0
STABLE, CANARY = (
    Target(f"sha256:{sign * 64}", f"sha256:{sign * 64}", f"assistant-{sign * 12}", ("127.0.0.1:8000",)) for sign in "5c"
)
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
USERS_WORDS = "<script>my door is broken</script>"


def metric(name: str = "error_rate", **changes: Any) -> MetricResult:
    one = MetricResult(
        name, "rate", True, "inconclusive", "Failed answers: 1 of 7.", 0.02, -0.2, 0.21, 7, 16, 0.14, 0.12,
        0.4, 0.3, 0.05, 0.4,
    )  # fmt: skip
    return replace(one, **changes)


def analysis(*metrics: MetricResult) -> AnalysisResult:
    return AnalysisResult("inconclusive", "5 more requests of the canary (7 of 12 in this step).", metrics)


FIGURES = analysis(
    metric(),
    metric(
        "time_to_first_token", kind="ratio", verdict="pass", estimate=1.1, low=0.9, high=1.4, canary_mean=120.0,
        stable_mean=110.0, bound_fail=1.5, bound_margin=2.0,
    ),
    metric("judge_score", kind="score", estimate=None, low=None, high=None, canary_n=0, canary_mean=None),
    metric("truncated_answers", gating=False),
)  # fmt: skip


def event(at: float, kind: EventKind, weight: int, sentence: str = "Something.", **more: Any) -> RolloutEvent:
    return RolloutEvent(BEGUN + at, kind, weight, more.pop("verdict", None), sentence, **more)


def holding(**changes: Any) -> RolloutState:
    """In its second step, with figures."""
    events = (
        event(0, "start", 0, f"Rollout of {CANARY.served_name}."),
        event(2, "probe", 0, "3 of 3 prompts answered.", verdict="pass"),
        event(3, "raise", 10, "Step 1 of 3: 10% of sessions."),
        event(9, "pass", 10, "No worse than stable.", verdict="pass", analysis=analysis(metric(canary_n=4))),
        event(9.5, "raise", 30, "Step 2 of 3: 30% of sessions.", step=1),
        event(12, "order", 30, "ann: paused (is it the mail?)", actor="ann", step=1),
        event(15, "look", 30, "7 of 12 requests.", verdict="inconclusive", analysis=FIGURES, step=1),
    )
    state = RolloutState(
        CANARY, STABLE, "holding", 1, 30, BEGUN + 9.5, begun=BEGUN + 3, spent_s=33.0, analysis=FIGURES, token=7,
        events=events,
    )  # fmt: skip
    return replace(state, **changes)


def failed(**changes: Any) -> RolloutState:
    """Rolled back by thumbs, with the requests behind it."""
    thumbs = metric(
        "thumbs_down", verdict="fail", sentence="Thumbs down: 6 of 9 on the canary, 1 of 20 on stable.", estimate=0.62,
        low=0.26, high=0.99, canary_n=9, stable_n=20, p_fail=0.0002, bound_fail=0.15, bound_margin=0.5,
    )  # fmt: skip
    requests = (
        Conviction(TRACE, "s-1", "thumbs_down", 1.0, "thumbs down", BEGUN + 20),
        Conviction("8f1d2c3a-0001-4aaa-9bbb-0123456789ab", USERS_WORDS, "thumbs_down", 1.0, "", BEGUN + 21),
    )
    found = AnalysisResult("fail", thumbs.sentence, (thumbs, *FIGURES.metrics), requests)
    before = holding()
    ends = (
        event(22, "rollback", 0, f"Everybody is back on {STABLE.served_name}.", verdict="fail", analysis=found, step=1),
        event(23, "fail", 0, f"Failed for good: {thumbs.sentence}", verdict="fail", step=1),
    )
    state = replace(
        before, phase="failed", weight=0, reason=thumbs.sentence, analysis=found, events=(*before.events, *ends)
    )
    return replace(state, **changes)


def promoted(**changes: Any) -> RolloutState:
    before = holding()
    end = event(60, "promote", 100, "The release is stable now.", verdict="pass", step=2)
    return replace(before, phase="promoted", weight=100, step=2, events=(*before.events, end), **changes)


def facts(state: RolloutState | None = None, **changes: Any) -> RolloutFacts:
    """What is gathered of a healthy gateway while `state` is under way."""
    found = RolloutFacts(
        "assistant",
        BEGUN + 42.5,
        RouteState(STABLE, CANARY, 30) if state and not state.ended else RouteState(STABLE),
        states=(state,) if state else (),
        rollout=state,
        policy=default_policy(),
        active={STABLE.release: 5, CANARY.release: 2},
        slots=("http://127.0.0.1:8000 holds 2 of 4 adapters.",),
        lease=LeaseFacts("release on host-1", 7, state is not None and not state.ended),
    )
    return replace(found, **changes)
