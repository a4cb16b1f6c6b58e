from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from sluice.infra.errors import ConflictError, GateRefused, UnavailableError
from sluice.serving.analysis import ReleaseSamples
from sluice.serving.policy import default_policy
from sluice.serving.rollout_interfaces import RolloutResult
from sluice.serving.rollout_state import FileRolloutStore
from sluice.serving.routes import RouteState
from tests.serving.fakes import Figures, Killed, Memory, healthy, unlike
from tests.serving.samples import samples, target

STABLE, CANARY = target("a"), target("c")


def memory(folder: Path, figures: Figures = healthy) -> Memory:
    return Memory(STABLE, CANARY, FileRolloutStore(folder), figures)


def test_a_healthy_release_rises_step_by_step_and_becomes_stable(tmp_path: Path) -> None:
    application = memory(tmp_path)
    rollout = application.rollout()
    result = rollout.run()
    assert result.verdict == "promote"
    assert application.weights() == [0, 5, 25, 50, 100]
    # Leave was asked directly before every increase.
    for weight in (5, 25, 50, 100):
        assert application.log[application.log.index(f"weight {weight}") - 1] == "authorize"
    assert [entry for entry in application.log if entry.endswith("pass")] == [f"step {n} pass" for n in range(4)]
    assert application.router.now.weight == 100
    assert rollout.finish().phase == "promoted"
    assert application.router.now == RouteState(CANARY)
    assert application.rollout().finish().phase == "promoted"
    kinds = [event.kind for event in result.events]
    assert kinds[0] == "start"
    assert kinds.count("raise") == 4
    assert kinds[-1] == "pass"


def test_each_step_keeps_its_minimum_time(tmp_path: Path) -> None:
    application = memory(tmp_path)
    application.policy = default_policy()
    events = application.rollout().run().events
    raised = [event.time for event in events if event.kind == "raise"]
    passed = [event.time for event in events if event.kind == "pass"]
    for begun, ended, step in zip(raised, passed, application.policy.steps, strict=False):
        assert ended - begun >= step.minimum_time_s


def test_a_bad_release_is_out_at_the_first_look_and_stays_out(tmp_path: Path) -> None:
    application = memory(tmp_path, unlike(STABLE.release, samples(CANARY.release, 3, errors=3)))
    result = application.rollout().run()
    assert result.verdict == "failed"
    assert application.weights() == [0, 5, 0]
    # Users first, then the record.
    assert application.log.index("rollback") < next(i for i, e in enumerate(application.log) if e.startswith("failure"))
    assert "3 of 3 on the canary" in result.sentence
    # Absorbing: healthy figures later change nothing.
    application.figures = healthy
    again = application.rollout().run()
    assert again.verdict == "failed"
    assert max(application.weights()[2:]) == 0
    with pytest.raises(ConflictError, match="has not passed"):
        application.rollout().finish()


def test_a_release_that_fails_late_goes_from_100_to_0(tmp_path: Path) -> None:
    application = memory(tmp_path)

    def late(release: str, since: float, until: float) -> ReleaseSamples:
        if release == CANARY.release and application.router.now.weight == 100:
            return samples(release, 20, errors=15)
        return healthy(release, since, until)

    application.figures = late
    assert application.rollout().run().verdict == "failed"
    assert application.weights() == [0, 5, 25, 50, 100, 0]


@pytest.mark.parametrize("kind", ["nothing", "few", "nan", "down"])
def test_no_figures_hold_and_then_go_back(tmp_path: Path, kind: str) -> None:
    def figures(release: str, since: float, until: float) -> ReleaseSamples:
        if release == STABLE.release:
            return healthy(release, since, until)
        if kind == "down":
            raise UnavailableError("the log cannot be read")
        if kind == "nan":
            return dataclasses.replace(healthy(release, since, until), ttft_ms=(math.nan,) * 20)
        return samples(release, 0 if kind == "nothing" else 1)

    application = memory(tmp_path, figures)
    begun = application.clock.now()
    result = application.rollout().run()
    assert result.verdict == "failed"
    assert "inconclusive after 120 s at 5%" in result.sentence
    assert application.clock.now() - begun >= application.policy.steps[0].maximum_time_s
    assert application.weights() == [0, 5, 0]


def test_a_failing_probe_never_gets_a_user(tmp_path: Path) -> None:
    application = memory(tmp_path)
    application.probes_pass = False
    result = application.rollout().run()
    assert result.verdict == "failed"
    assert "It does not answer" in result.sentence
    assert application.weights() == [0, 0]
    assert "authorize" not in application.log


def test_without_leave_no_user_stays_and_a_new_approval_may_begin_again(tmp_path: Path) -> None:
    application = memory(tmp_path)
    application.allowed = False
    with pytest.raises(GateRefused, match="withdrawn"):
        application.rollout().run()
    assert application.weights() == [0, 0]
    application.allowed = True
    assert application.rollout().run().verdict == "promote"


def test_leave_withdrawn_on_the_way_takes_the_users_back(tmp_path: Path) -> None:
    application = memory(tmp_path)

    def figures(release: str, since: float, until: float) -> ReleaseSamples:
        application.allowed = application.router.now.weight < 25
        return healthy(release, since, until)

    application.figures = figures
    with pytest.raises(GateRefused):
        application.rollout().run()
    assert application.weights() == [0, 5, 25, 0]


def test_a_rollback_by_hand_ends_the_rollout(tmp_path: Path) -> None:
    application = memory(tmp_path)

    def figures(release: str, since: float, until: float) -> ReleaseSamples:
        if application.router.now.weight == 25:
            application.router.rollback("by hand")
        return healthy(release, since, until)

    application.figures = figures
    result = application.rollout().run()
    assert (result.verdict, result.sentence) == ("failed", "by hand")
    assert application.weights() == [0, 5, 25, 0]
    assert "failure by hand" in application.log


def test_two_rollouts_at_once_are_refused(tmp_path: Path) -> None:
    application = memory(tmp_path)
    application.router.now = RouteState(STABLE, target("b"), 25)
    with pytest.raises(ConflictError, match="Another rollout"):
        application.rollout().run()


def run_with_kills(application: Memory) -> RolloutResult:
    """Run, die where the memory says, run again as a new process would."""
    try:
        return application.rollout().run()
    except Killed:
        application.clock.sleep(7)
        return application.rollout().run()


def writes_of(folder: Path, figures: Figures) -> int:
    application = memory(folder, figures)
    application.rollout().run()
    return application.writes


def test_killed_at_any_write_a_healthy_rollout_converges(tmp_path: Path) -> None:
    for point in range(1, writes_of(tmp_path / "count", healthy) + 1):
        application = memory(tmp_path / str(point), healthy)
        application.kill_at = point
        assert run_with_kills(application).verdict == "promote", point
        weights = application.weights()
        assert weights == sorted(weights), point
        assert set(weights) == {0, 5, 25, 50, 100}, point
        assert {f"step {n} pass" for n in range(4)} <= set(application.log), point


def test_killed_at_any_write_a_failing_rollout_never_rises_again(tmp_path: Path) -> None:
    def figures(release: str, since: float, until: float) -> ReleaseSamples:
        bad = release == CANARY.release and since > 1000
        return samples(release, 10, errors=9) if bad else healthy(release, since, until)

    for point in range(1, writes_of(tmp_path / "count", figures) + 1):
        application = memory(tmp_path / str(point), figures)
        application.kill_at = point
        assert run_with_kills(application).verdict == "failed", point
        weights = application.weights()
        assert weights[-1] == 0, point
        assert weights.count(0) >= 2, point
        assert max(weights) <= 25, point
        assert any(entry.startswith("failure") for entry in application.log), point
        # After the way back there is no way up, however often it is run.
        application.figures = healthy
        assert application.rollout().run().verdict == "failed", point
        assert application.weights() == weights, point


def test_a_refused_promotion_leaves_nobody_on_the_canary(tmp_path: Path) -> None:
    application = memory(tmp_path)
    assert application.rollout().run().verdict == "promote"
    assert application.router.now.weight == 100
    with pytest.raises(GateRefused, match="expired"):
        application.rollout().step_aside(GateRefused("The decision has expired."))
    assert application.router.now == RouteState(STABLE)
    # Not a failure: with a new decision it may begin again, from the first step.
    assert application.rollout().run().verdict == "promote"
    assert application.weights()[-5:] == [0, 5, 25, 50, 100]


def test_a_pass_is_not_believed_when_the_routes_say_otherwise(tmp_path: Path) -> None:
    application = memory(tmp_path)
    assert application.rollout().run().verdict == "promote"
    application.router.now = RouteState(STABLE)
    again = application.rollout().run()
    assert again.verdict == "failed"
    assert "changed from outside" in again.sentence
