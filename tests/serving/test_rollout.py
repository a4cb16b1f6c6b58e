"""A rollout with a gateway, a clock and figures in memory: what rises, what goes back, and what a kill changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from sluice.infra.errors import ConflictError, GateRefused, UnavailableError
from sluice.serving.policy import default_policy
from sluice.serving.rollout_interfaces import RolloutResult
from sluice.serving.rollout_state import RolloutState
from sluice.serving.routes import RouteState
from tests.serving.fakes import BROKEN, HEALTHY, Figures, Killed, Memory, healthy, quick, unlike
from tests.serving.samples import target

STABLE, CANARY = target("a"), target("c")
ALL_STEPS = [0, 10, 30, 50]


@pytest.fixture(autouse=True)
def _without_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut would lose is not asked here, and flushing costs more than all the rest."""
    monkeypatch.setattr("os.fsync", lambda _: None)


def memory(folder: Path, figures: Figures = healthy) -> Memory:
    return Memory(STABLE, CANARY, folder, figures)


def broken_from(moment: float) -> Figures:
    return lambda release, known: {**HEALTHY, **BROKEN} if release == CANARY.release and known >= moment else HEALTHY


def test_a_healthy_release_rises_step_by_step_and_becomes_stable(tmp_path: Path) -> None:
    application = memory(tmp_path)
    rollout = application.rollout()
    result = rollout.run()
    assert result.verdict == "promote"
    assert application.weights() == ALL_STEPS
    # Leave was asked directly before every increase, and the step recorded as begun before any user was on it.
    for step, weight in enumerate(ALL_STEPS[1:]):
        before = application.log.index(f"weight {weight}")
        assert application.log[before - 2 : before] == ["authorize", f"step {step} inconclusive"]
    assert [entry for entry in application.log if entry.endswith("pass")] == [f"step {n} pass" for n in range(3)]
    # At 100% there would be nothing to compare with: the promotion brings it.
    assert application.router.now.weight == 50
    assert rollout.finish().phase == "promoted"
    assert application.router.now == RouteState(CANARY)
    assert application.rollout().finish().phase == "promoted"
    kinds = [event.kind for event in result.events]
    assert kinds[0] == "start"
    assert kinds.count("raise") == 3
    assert kinds[-1] == "pass"
    assert application.log.index("shadow 100") < application.log.index("weight 10")


def test_each_step_keeps_its_minimum_time(tmp_path: Path) -> None:
    application = memory(tmp_path)
    application.policy = default_policy()
    events = application.rollout().run().events
    raised = [event.time for event in events if event.kind == "raise"]
    passed = [event.time for event in events if event.kind == "pass" and event.weight]
    for begun, ended, step in zip(raised, passed, application.policy.steps, strict=False):
        assert ended - begun >= step.minimum_time_s


def test_a_bad_release_never_leaves_the_shadow(tmp_path: Path) -> None:
    application = memory(tmp_path, unlike(STABLE.release, BROKEN))
    result = application.rollout().run()
    assert result.verdict == "failed"
    assert application.weights() == [0, 0]
    assert "shadow 100" in application.log


def test_a_burst_of_failures_is_out_within_two_seconds_and_stays_out(tmp_path: Path) -> None:
    application = memory(tmp_path, broken_from(1002.0))
    result = application.rollout().run()
    assert result.verdict == "failed"
    back = next(event for event in result.events if event.kind == "rollback")
    evidence = sorted(one.known for one in application.traffic.log if one.value and one.metric == "error_rate")[4]
    assert back.time - evidence <= 2
    assert back.analysis is not None
    assert len(back.analysis.convicting) >= 5
    # Users first, then the record.
    assert application.log.index("rollback") < next(i for i, e in enumerate(application.log) if e.startswith("failure"))
    # Absorbing: healthy figures later change nothing.
    application.figures = healthy
    weights = application.weights()
    assert application.rollout().run().verdict == "failed"
    assert application.weights() == weights
    with pytest.raises(ConflictError, match="has not passed"):
        application.rollout().finish()


def test_a_release_that_fails_while_it_bakes_goes_back(tmp_path: Path) -> None:
    application = memory(tmp_path)
    application.policy = application.policy.model_copy(update={"bake_s": 30.0})
    application.figures = broken_from(1010.0)
    assert application.rollout().run().verdict == "failed"
    assert application.weights() == [*ALL_STEPS, 0]
    assert "bake" in application.kinds()


@pytest.mark.parametrize("kind", ["nothing", "nan", "down", "traces"])
def test_no_figures_hold_and_then_go_back_without_a_failure(tmp_path: Path, kind: str) -> None:
    def figures(release: str, known: float) -> Mapping[str, float]:
        if release == STABLE.release or application.router.now.weight == 0 or kind in ("down", "traces"):
            return HEALTHY
        return {} if kind == "nothing" else {**HEALTHY, "time_to_first_token": math.nan}

    application = memory(tmp_path, figures)
    if kind == "down":
        application.traffic.missing = {"error_rate": "The log cannot be read."}
    if kind == "traces":
        application.traffic.missing = {"thumbs_down": "The traces do not answer."}
        application.policy = quick(minimum=application.policy.steps[2].minimum)
    result = application.rollout().run()
    assert "inconclusive after 60 s at 10%" in result.sentence
    assert application.weights() == [0, 10, 0]
    # Values that are no numbers are the release's own doing; that nobody asked it, or nobody knows, is not.
    assert result.verdict == ("failed" if kind == "nan" else "inconclusive")
    if kind != "nan":
        assert any(entry.startswith("withdrawal") for entry in application.log)
        application.figures, application.traffic.missing = healthy, {}
        assert application.rollout().run().verdict == "promote"


def test_a_shadow_without_requests_ends_the_release_as_inconclusive(tmp_path: Path) -> None:
    application = memory(tmp_path)
    application.mirrored.per_s = 0.01
    result = application.rollout().run()
    assert result.verdict == "inconclusive"
    assert "in the shadow: 0 of 6 requests" in result.sentence
    assert application.weights() == [0, 0]


def test_a_failing_probe_never_gets_a_user(tmp_path: Path) -> None:
    application = memory(tmp_path)
    application.probes_pass = False
    result = application.rollout().run()
    assert result.verdict == "failed"
    assert "It does not answer" in result.sentence
    assert application.weights() == [0, 0]
    assert "shadow 100" not in application.log


def test_without_leave_nothing_begins(tmp_path: Path) -> None:
    application = memory(tmp_path)
    application.allowed = False
    with pytest.raises(GateRefused, match="withdrawn"):
        application.rollout().run()
    assert application.log == ["authorize"]
    application.allowed = True
    assert application.rollout().run().verdict == "promote"


def test_leave_withdrawn_on_the_way_takes_the_users_back(tmp_path: Path) -> None:
    application = memory(tmp_path)

    def figures(release: str, known: float) -> Mapping[str, float]:
        application.allowed = application.router.now.weight < 30
        return HEALTHY

    application.figures = figures
    with pytest.raises(GateRefused):
        application.rollout().run()
    assert application.weights() == [0, 10, 30, 0]
    # Not a failure: with a new approval it may begin again, from the first step.
    application.figures, application.allowed = healthy, True
    assert application.rollout().run().verdict == "promote"
    assert application.weights()[-4:] == ALL_STEPS


def test_a_rollback_by_hand_ends_the_rollout(tmp_path: Path) -> None:
    application = memory(tmp_path)

    def figures(release: str, known: float) -> Mapping[str, float]:
        if application.router.now.weight == 30:
            application.router.rollback("by hand")
        return HEALTHY

    application.figures = figures
    result = application.rollout().run()
    assert (result.verdict, result.sentence) == ("failed", "by hand")
    assert application.weights() == [0, 10, 30, 0]
    assert "failure by hand" in application.log


def short(folder: Path, figures: Figures) -> Memory:
    """Two steps: every kind of move, and as few points at which to die."""
    application = memory(folder, figures)
    application.policy = application.policy.model_copy(update={"steps": application.policy.steps[:2]})
    return application


def run_with_kills(application: Memory) -> RolloutResult:
    """Run, die where the memory says, run again as a new process would."""
    try:
        return application.rollout().run()
    except Killed:
        application.clock.sleep(0.5)
        return application.rollout().run()


def writes_of(folder: Path, figures: Figures) -> int:
    application = short(folder, figures)
    application.rollout().run()
    return application.writes


def test_killed_at_any_write_a_healthy_rollout_converges(tmp_path: Path) -> None:
    points = writes_of(tmp_path / "count", healthy)
    assert points > 25
    for point in range(1, points + 1):
        application = short(tmp_path / str(point), healthy)
        application.kill_at = point
        assert run_with_kills(application).verdict == "promote", point
        weights = application.weights()
        assert weights == sorted(weights), point
        assert set(weights) == {0, 10, 30}, point
        assert {f"step {n} pass" for n in range(2)} <= set(application.log), point


@pytest.mark.parametrize("moment", [1000.0, 1002.0])
def test_killed_at_any_write_a_failing_rollout_never_rises_again(tmp_path: Path, moment: float) -> None:
    for point in range(1, writes_of(tmp_path / "count", broken_from(moment)) + 1):
        application = short(tmp_path / str(point), broken_from(moment))
        application.kill_at = point
        assert run_with_kills(application).verdict == "failed", point
        weights = application.weights()
        assert weights[-1] == 0, point
        assert weights.count(0) >= 2, point
        assert max(weights) <= 30, point
        assert any(entry.startswith("failure") for entry in application.log), point
        # After the way back there is no way up, however often it is run.
        application.figures = healthy
        assert application.rollout().run().verdict == "failed", point
        assert application.weights() == weights, point


def test_killed_at_any_write_a_withdrawn_rollout_has_not_failed(tmp_path: Path) -> None:
    def few(folder: Path) -> Memory:
        application = memory(folder)
        application.traffic.per_s = 0.1
        application.policy = quick(maximum_time_s=2.0)
        return application

    counted = few(tmp_path / "count")
    assert counted.rollout().run().verdict == "inconclusive"
    for point in range(1, counted.writes + 1):
        application = few(tmp_path / str(point))
        application.kill_at = point
        assert run_with_kills(application).verdict == "inconclusive", point
        assert application.weights()[-1] == 0, point
        assert not application.router.refused, point


def test_a_refused_promotion_leaves_nobody_on_the_canary(tmp_path: Path) -> None:
    application = memory(tmp_path)
    assert application.rollout().run().verdict == "promote"
    assert application.router.now.weight == 50
    with pytest.raises(GateRefused, match="expired"):
        application.rollout().step_aside(GateRefused("The decision has expired."))
    assert application.router.now == RouteState(STABLE)
    assert application.rollout().run().verdict == "promote"
    assert application.weights()[-4:] == ALL_STEPS


def test_a_pass_is_not_believed_when_the_routes_say_otherwise(tmp_path: Path) -> None:
    application = memory(tmp_path)
    assert application.rollout().run().verdict == "promote"
    application.router.now = RouteState(STABLE)
    again = application.rollout().run()
    assert again.verdict == "failed"
    assert "changed from outside" in again.sentence


def test_a_gateway_that_does_not_answer_is_asked_until_users_are_back(tmp_path: Path) -> None:
    application = memory(tmp_path)

    def figures(release: str, known: float) -> Mapping[str, float]:
        application.router.down = 1002.5 < known < 1030
        return {**HEALTHY, **BROKEN} if release == CANARY.release and known > 1002 else HEALTHY

    application.figures = figures
    sleep = application.clock.sleep

    def slept(seconds: float) -> None:
        sleep(seconds)
        application.router.down = 1002.5 < application.clock.now() < 1030

    application.clock.sleep = slept  # type: ignore[method-assign]
    assert application.rollout().run().verdict == "failed"
    assert application.clock.now() >= 1030
    assert application.router.now == RouteState(STABLE)


def test_a_store_without_room_holds_and_does_not_hinder_the_way_back(tmp_path: Path) -> None:
    application = memory(tmp_path, broken_from(1006.0))
    save = application.store.save
    rollout = application.rollout()

    def refuse(state: RolloutState) -> None:
        if application.clock.now() > 1002:
            raise UnavailableError("no space left on device")
        save(state)

    rollout._store.save = refuse  # type: ignore[method-assign]
    with pytest.raises(UnavailableError, match="no space"):
        rollout.run()
    assert application.router.now == RouteState(STABLE)
    assert application.weights()[-1] == 0
    assert application.clock.now() < 1010
    # The disk has room again: what happened is found in the gateway, and told.
    assert application.rollout().run().verdict == "failed"
