"""Orders, the queue, fencing, and what hangs: who moves the weights, and when nobody does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from sluice.infra.errors import ConflictError, GateRefused, InputError, IntegrityError, UnavailableError
from sluice.serving.control import Order, OrderKind
from sluice.serving.rollout_state import RolloutState
from sluice.serving.rollout_store import CoolDown
from sluice.serving.routes import RouteState, StaleToken
from tests.serving.fakes import BROKEN, HEALTHY, Hung, Killed, Memory, quick
from tests.serving.samples import target

STABLE, CANARY, OTHER = target("a"), target("c"), target("d")


@pytest.fixture(autouse=True)
def _without_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut would lose is not asked here, and flushing costs more than all the rest."""
    monkeypatch.setattr("os.fsync", lambda _: None)


def memory(folder: Path) -> Memory:
    return Memory(STABLE, CANARY, folder)


def when(application: Memory, moment: float, act: Callable[[], object]) -> None:
    """Do something once the clock shows `moment`."""
    sleep, due = application.clock.sleep, [act]

    def slept(seconds: float) -> None:
        sleep(seconds)
        if due and application.clock.time >= moment:
            due.pop()()

    application.clock.sleep = slept  # type: ignore[method-assign]


def order(application: Memory, kind: OrderKind, moment: float, reason: str = "because") -> None:
    def place() -> None:
        application.store.place_order(CANARY.release, Order(kind, "ada", reason, application.clock.now()))

    when(application, moment, place)


def test_a_paused_rollout_holds_its_weight_and_goes_on_when_it_is_told(tmp_path: Path) -> None:
    application = memory(tmp_path)
    order(application, "pause", 1001.5)
    order(application, "resume", 1100)
    result = application.rollout().run()
    assert result.verdict == "promote"
    paused, resumed = (event for event in result.events if event.kind == "order")
    # Obeyed within a second; the time of a pause counts for no maximum.
    assert paused.time - 1001.5 <= 1
    assert resumed.time - 1100 <= 1
    assert (paused.actor, "because" in paused.sentence) == ("ada", True)
    assert next(event.time for event in result.events if event.weight == 30) >= 1100


def test_a_paused_rollout_still_loses_its_users_when_it_fails(tmp_path: Path) -> None:
    application = memory(tmp_path)
    order(application, "pause", 1001.5)
    application.figures = lambda release, known: {
        **HEALTHY,
        **(BROKEN if release == CANARY.release and known > 1090 else {}),
    }
    assert application.rollout().run().verdict == "failed"
    assert application.clock.now() < 1097


def test_an_order_promotes_without_waiting_and_is_recorded_in_its_name(tmp_path: Path) -> None:
    application = memory(tmp_path)
    application.policy = quick(minimum_time_s=50.0)
    order(application, "promote", 1002, "the old one leaks")
    result = application.rollout().run()
    assert result.verdict == "promote"
    assert application.clock.now() < 1004
    assert "step 0 pass by ada" in application.log
    assert "Promoted by order of ada: the old one leaks" in result.events[-1].sentence
    # Leave was asked as always, and the promotion itself asks again.
    application.allowed = False
    with pytest.raises(GateRefused):
        application.rollout().finish()


def test_an_order_does_not_promote_what_fails(tmp_path: Path) -> None:
    application = memory(tmp_path)
    application.figures = lambda release, _: {
        **HEALTHY,
        **(BROKEN if release == CANARY.release and application.router.now.weight else {}),
    }
    order(application, "promote", 1000.5)
    assert application.rollout().run().verdict == "failed"
    assert application.router.now == RouteState(STABLE)


def test_an_order_before_the_first_user_skips_no_leave(tmp_path: Path) -> None:
    application = memory(tmp_path)
    application.mirrored.per_s = 0.01
    order(application, "promote", 1003)
    assert application.rollout().run().verdict == "promote"
    assert application.weights() == [0, 10]
    assert application.log.count("authorize") == 2


def test_orders_need_somebody_and_a_rollout_under_way(tmp_path: Path) -> None:
    store = memory(tmp_path).store
    with pytest.raises(ConflictError, match="has no rollout"):
        store.place_order(CANARY.release, Order("pause", "ada", "", 0.0))
    with pytest.raises(InputError, match="actor"):
        store.place_order(CANARY.release, Order("pause", " ", "", 0.0))
    with pytest.raises(InputError, match="reason"):
        store.place_order(CANARY.release, Order("promote", "ada", "", 0.0))
    application = memory(tmp_path)
    application.rollout().run()
    application.rollout().finish()
    with pytest.raises(ConflictError, match="has ended"):
        store.place_order(CANARY.release, Order("pause", "ada", "", 0.0))


def test_killed_at_any_write_orders_are_obeyed_once(tmp_path: Path) -> None:
    def ordered(folder: Path) -> Memory:
        application = memory(folder)
        application.policy = quick(minimum_time_s=30.0)
        order(application, "pause", 1001.5)
        order(application, "promote", 1003)
        return application

    counted = ordered(tmp_path / "count")
    counted.rollout().run()
    for point in range(1, counted.writes + 1):
        application = ordered(tmp_path / str(point))
        application.kill_at = point
        try:
            result = application.rollout().run()
        except Killed:
            result = application.rollout().run()
        assert result.verdict == "promote", point
        assert [event.kind for event in result.events].count("order") == 2, point


def test_a_second_release_waits_its_turn_and_is_refused_when_the_champion_changed(tmp_path: Path) -> None:
    application = memory(tmp_path)
    application.router.now = RouteState(STABLE, OTHER, 25)

    def promoted() -> None:
        application.router.now = RouteState(OTHER)
        application.allowed = False

    when(application, 1020, promoted)
    said: list[str] = []
    rollout = application.rollout()
    rollout._report = lambda _done, _total, message: said.append(message)
    with pytest.raises(GateRefused):
        rollout.run()
    assert said[0] == f"waiting for the rollout of {OTHER.served_name} (25%)"
    assert application.log == ["authorize"]


def test_after_a_failure_nothing_begins_until_it_cooled_down_or_somebody_ends_that(tmp_path: Path) -> None:
    application = memory(tmp_path)
    application.policy = application.policy.model_copy(update={"cool_down_s": 600.0})
    application.probes_pass = False
    assert application.rollout().run().verdict == "failed"
    cooling = application.store.cool_down()
    assert cooling == CoolDown(CANARY.release, "probe: It does not answer.", 1600.0)
    application.probes_pass = True
    said: list[str] = []
    rollout = application.rollout(OTHER)
    rollout._report = lambda _done, _total, message: said.append(message)
    when(application, 1100, lambda: application.store.end_cool_down("ada", "it was the probe's fault"))
    assert rollout.run().verdict == "promote"
    assert "the end of the cool-down at" in said[0]
    assert 1100 <= application.events[-1].time < 1120
    ended = application.store.cool_down()
    assert ended is not None
    assert (ended.ended_by, ended.ended_why) == ("ada", "it was the probe's fault")


def test_the_cool_down_ends_by_itself(tmp_path: Path) -> None:
    application = memory(tmp_path)
    application.store.set_cool_down(CoolDown(OTHER.release, "errors", 1050.0))
    assert application.rollout().run().verdict == "promote"
    assert 1050 <= application.events[0].time < 1053


def test_a_controller_that_lost_its_lease_touches_nothing(tmp_path: Path) -> None:
    application = memory(tmp_path)

    def taken() -> None:
        application.lease.taken = True

    when(application, 1002, taken)
    application.figures = lambda release, known: {
        **HEALTHY,
        **(BROKEN if release == CANARY.release and known > 1002 else {}),
    }
    with pytest.raises(ConflictError, match="took over"):
        application.rollout().run()
    assert application.router.now.weight == 10
    assert not application.router.refused


def test_a_stale_token_changes_neither_routes_nor_state(tmp_path: Path) -> None:
    application = memory(tmp_path)
    when(application, 1001.5, lambda: setattr(application.router, "token", 7))
    with pytest.raises(ConflictError, match="took over"):
        application.rollout().run()
    saved = application.store.load(CANARY.release)
    assert saved is not None
    assert (saved.token, application.weights()) == (1, [0, 10])
    # The newer controller goes on where it was; what the stale one writes afterwards is refused.
    application.lease.token = 7
    assert application.rollout().run().verdict == "promote"
    with pytest.raises(StaleToken):
        application.store.save(saved)


@pytest.mark.parametrize("how", ["hangs", "raises"])
def test_a_ledger_that_does_not_answer_holds_the_weight_and_says_so(tmp_path: Path, how: str) -> None:
    application = memory(tmp_path)
    down = Hung if how == "hangs" else UnavailableError("S3 is down")
    when(application, 1002, lambda: setattr(application, "ledger_down", down))
    when(application, 1090, lambda: setattr(application, "ledger_down", None))
    result = application.rollout().run()
    # Longer than the step may take: off users, without having failed.
    assert result.verdict == "inconclusive"
    assert application.weights() == [0, 10, 0]
    held = next(event for event in result.events if event.kind == "hold")
    assert ("S3 is down" if how == "raises" else "without an answer") in held.sentence


@pytest.mark.parametrize("how", [Hung, UnavailableError("S3 is down")])
def test_a_ledger_that_does_not_answer_holds_no_rollback(tmp_path: Path, how: type[Hung] | UnavailableError) -> None:
    application = memory(tmp_path)
    application.figures = lambda release, known: {
        **HEALTHY,
        **(BROKEN if release == CANARY.release and known > 1004 else {}),
    }
    when(application, 1002, lambda: setattr(application, "ledger_down", how))
    with pytest.raises(UnavailableError, match="ledger was not told"):
        application.rollout().run()
    back = next(event for event in application.events if event.kind == "rollback")
    assert back.time < 1010
    saved = application.store.load(CANARY.release)
    assert saved is not None
    assert saved.phase == "failing"
    application.ledger_down = None
    assert application.rollout().run().verdict == "failed"
    assert any(entry.startswith("failure") for entry in application.log)


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_a_clock_that_jumps_passes_no_step_and_loses_no_figures(tmp_path: Path, jump: float) -> None:
    application = memory(tmp_path)
    application.policy = quick(minimum_time_s=20.0)
    when(application, 1005, lambda: application.clock.jump(jump))
    result = application.rollout().run()
    assert result.verdict == "promote"
    # Three steps of 20 s each, by the clock that does not jump.
    assert application.clock.time >= 1060
    assert any("jumped" in event.sentence for event in result.events)
    analysed = result.state.analysis
    assert analysed is not None
    rate = next(one for one in analysed.metrics if one.name == "error_rate")
    made = [one for one in application.traffic.log if one.metric == "error_rate" and one.release == CANARY.release]
    assert abs(rate.canary_n - len(made)) <= 8


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_a_clock_that_jumps_hides_no_failures(tmp_path: Path, jump: float) -> None:
    application = memory(tmp_path)
    application.policy = quick(minimum_time_s=20.0)

    def figures(release: str, known: float) -> dict[str, float]:
        return {**HEALTHY, **(BROKEN if release == CANARY.release and application.clock.time > 1010 else {})}

    application.figures = figures
    when(application, 1005, lambda: application.clock.jump(jump))
    assert application.rollout().run().verdict == "failed"
    assert application.clock.time < 1017


def test_windows_of_one_source_tile_time(tmp_path: Path) -> None:
    application = memory(tmp_path)
    application.rollout().run()
    windows = application.traffic.asked
    assert len(windows) > 10
    assert all(before[1] == after[0] for before, after in pairwise(windows))


def test_what_nobody_watched_counts_for_no_time(tmp_path: Path) -> None:
    application = memory(tmp_path)
    application.policy = quick(minimum_time_s=10.0)

    def die() -> None:
        raise Killed

    when(application, 1003, die)
    with pytest.raises(Killed):
        application.rollout().run()
    assert application.router.now.weight == 10
    application.clock.sleep(100)
    resumed = application.clock.now()
    result = application.rollout().run()
    assert result.verdict == "promote"
    assert next(event.time for event in result.events if event.weight == 30) - resumed >= 8


def test_a_listener_that_breaks_changes_nothing(tmp_path: Path) -> None:
    application = memory(tmp_path)
    rollout = application.rollout()

    class Broken:
        def emit(self, *_: object) -> None:
            raise RuntimeError("no network")

    rollout._sinks = (Broken(),)
    assert rollout.run().verdict == "promote"


def test_after_a_clock_was_set_back_each_step_needs_samples_of_its_own(tmp_path: Path) -> None:
    application = memory(tmp_path)
    application.policy = quick(minimum_time_s=20.0)

    def set_back() -> None:
        application.clock.jump(-3600.0)
        # And then nobody asks anything any more.
        application.traffic.per_s = 0.0

    when(application, 1015, set_back)
    result = application.rollout().run()
    assert result.verdict == "inconclusive"
    assert max(application.weights()) == 30


def test_a_clock_that_jumps_ahead_makes_no_request_hang(tmp_path: Path) -> None:
    application = memory(tmp_path)
    application.policy = quick(maximum_time_s=40.0)
    application.traffic.active = {CANARY.release: 1}
    # Its first answer takes longer than this step: no reason to fail, before the 60 s of a silence are over.
    application.traffic.figures = lambda release, _: {} if release == CANARY.release else HEALTHY
    when(application, 1010, lambda: application.clock.jump(3600.0))
    assert application.rollout().run().verdict == "inconclusive"


def test_a_ledger_that_others_fill_takes_the_users_back(tmp_path: Path) -> None:
    application = memory(tmp_path)
    step = application.step

    def crowded(release: str, number: int, *said: object) -> None:
        if number == 1:
            raise ConflictError("The ledger grew 50 times meanwhile.")
        step(release, number, *said)  # type: ignore[arg-type]

    application.step = crowded  # type: ignore[assignment, method-assign]
    with pytest.raises(ConflictError, match="grew"):
        application.rollout().run()
    assert application.router.now == RouteState(STABLE)
    saved = application.store.load(CANARY.release)
    assert saved is not None
    assert saved.phase == "withdrawn"


def test_users_of_a_step_that_cannot_be_saved_are_watched(tmp_path: Path) -> None:
    application = memory(tmp_path)
    application.figures = lambda release, _: {**HEALTHY, **(BROKEN if release == CANARY.release else {})}
    application.mirrored.figures = lambda *_: HEALTHY
    rollout = application.rollout()
    save = application.store.save

    def refuse(state: RolloutState) -> None:
        if application.router.now.weight:
            raise UnavailableError("no space left on device")
        save(state)

    rollout._store.save = refuse  # type: ignore[method-assign]
    assert rollout.run().verdict == "failed"
    raised = next(entry for entry in application.traffic.log if entry.release == CANARY.release)
    assert application.clock.now() - raised.known < 5


def test_users_of_a_step_that_a_killed_controller_began_are_watched_without_the_ledger(tmp_path: Path) -> None:
    application = memory(tmp_path)
    application.figures = lambda release, _: {**HEALTHY, **(BROKEN if release == CANARY.release else {})}
    application.mirrored.figures = lambda *_: HEALTHY
    apply = application.router.apply

    def die(state: RouteState, **how: object) -> RouteState:
        apply(state, **how)  # type: ignore[arg-type]
        if state.weight:
            raise Killed
        return state

    application.router.apply = die  # type: ignore[method-assign]
    with pytest.raises(Killed):
        application.rollout().run()
    assert application.router.now.weight == 10
    application.router.apply = apply  # type: ignore[method-assign]
    application.ledger_down = Hung
    begun = application.clock.now()
    with pytest.raises(UnavailableError, match="ledger was not told"):
        application.rollout().run()
    assert application.router.now == RouteState(STABLE)
    off = next(event for event in application.events if event.kind == "rollback")
    assert off.time - begun < 5


@pytest.mark.parametrize("killed", ["rolling back", "raising"])
def test_a_gateway_that_was_not_told_before_a_kill_is_told_by_the_next_controller(tmp_path: Path, killed: str) -> None:
    """The decision is on disk, and the process died before the data plane heard of it."""
    application = memory(tmp_path)
    router, told = application.router, [True]
    apply, rollback = router.apply, router.rollback

    def apply_half(state: RouteState, **how: object) -> RouteState:
        apply(state, **how)  # type: ignore[arg-type]
        if killed == "raising" and state.weight == 30:
            told[0] = False
            raise Killed
        return state

    def rollback_half(reason: str, **how: object) -> RouteState:
        rollback(reason, **how)  # type: ignore[arg-type]
        told[0] = False
        raise Killed

    def reconcile() -> RouteState:
        told[0] = True
        return router.now

    router.drift = lambda: () if told[0] else ("The gateway's routes are of an earlier revision.",)  # type: ignore[method-assign]
    router.reconcile = reconcile  # type: ignore[method-assign]
    router.apply, router.rollback = apply_half, rollback_half  # type: ignore[method-assign]
    if killed == "rolling back":
        application.figures = lambda release, _: {**HEALTHY, **(BROKEN if release == CANARY.release else {})}
    with pytest.raises(Killed):
        application.rollout().run()
    assert not told[0]
    router.apply, router.rollback = apply, rollback  # type: ignore[method-assign]
    assert application.rollout().run().verdict == ("failed" if killed == "rolling back" else "promote")
    assert told[0]


def test_damaged_routes_do_not_keep_users_on_the_canary(tmp_path: Path) -> None:
    application = memory(tmp_path)
    router, damaged = application.router, [False]
    state, rollback = router.state, router.rollback

    def read() -> RouteState:
        if damaged[0]:
            raise IntegrityError("The gateway's state is damaged.")
        return state()

    def mend(reason: str, **how: object) -> RouteState:
        damaged[0] = False
        return rollback(reason, **how)  # type: ignore[arg-type]

    router.state, router.rollback = read, mend  # type: ignore[method-assign]
    when(application, 1005, lambda: damaged.__setitem__(0, True))
    with pytest.raises(IntegrityError):
        application.rollout().run()
    assert router.now == RouteState(STABLE)


def test_a_cancelled_rollout_leaves_nobody_on_a_canary_that_nobody_watches(tmp_path: Path) -> None:
    application = memory(tmp_path)

    def cancel() -> None:
        raise KeyboardInterrupt

    when(application, 1005, cancel)
    with pytest.raises(KeyboardInterrupt):
        application.rollout().run()
    assert max(application.weights()) > 0
    assert application.router.now == RouteState(STABLE)
    assert application.rollout().run().verdict == "inconclusive"
    assert any(entry.startswith("withdrawal") for entry in application.log)
    assert application.router.refusal(CANARY.release) is None
