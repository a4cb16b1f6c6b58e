"""The way up: probes, shadow, steps, bake. A loop looks at the canary four times a second, and moves when it may."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sluice.infra.errors import ConflictError, IntegrityError, UnavailableError
from sluice.infra.progress import Report
from sluice.serving.analysis import AnalysisResult
from sluice.serving.control import Order
from sluice.serving.errand import SLOW_S, Asking
from sluice.serving.observations import SampleSource
from sluice.serving.policy import AnalysisPolicy, Minimum, RolloutPolicy, StepPolicy
from sluice.serving.probes import ProbeReport
from sluice.serving.rollout_interfaces import Clock, Recorder
from sluice.serving.rollout_journal import Journal
from sluice.serving.rollout_state import EventKind, Phase, RolloutState
from sluice.serving.rollout_store import RolloutStore
from sluice.serving.rollout_watch import Watch, progress, shadow_policy, verdict_of
from sluice.serving.routes import Router, RouteState, StaleToken

TICK_S = 0.25
_JUMP_S = 2.0
_LOOKS = 20
"""Events of looks a step at most, beside those where a verdict changed."""


@dataclass(frozen=True)
class End:
    """Why the way up ends: the release `failed`, or nothing could be said about it."""

    failed: bool
    reason: str


class Steps:
    """Walks one rollout up from where its journal is. `require_lease` raises `StaleToken` when another controller is at
    work, `token` goes with every change of the routes."""

    def __init__(
        self,
        journal: Journal,
        *,
        policy: RolloutPolicy,
        router: Router,
        store: RolloutStore,
        source: SampleSource,
        shadow: SampleSource | None,
        recorder: Recorder,
        authorize: Callable[[], None],
        probe: Callable[[], ProbeReport],
        require_lease: Callable[[], None],
        token: int,
        clock: Clock,
        report: Report,
    ) -> None:
        self._journal = journal
        self._policy = policy
        self._router = router
        self._store = store
        self._source = source
        self._shadow_source = shadow
        self._recorder = recorder
        self._authorize = authorize
        self._probe = probe
        self._require_lease = require_lease
        self._token = token
        self._clock = clock
        self._report = report
        self._wall, self._monotonic = clock.now(), clock.monotonic()
        self._watch: Watch | None = None
        self._watched_shadow = False
        self._result: AnalysisResult | None = None
        self._next_check = self._next_shown = 0.0
        self._shown: tuple[object, ...] = ()
        self._asking = Asking(clock.monotonic)

    def walk(self) -> End | None:
        """Until it has passed (None), or ends. Raises what `authorize` and the recorder raise, except that what does
        not answer only holds it."""
        while self._state.phase != "passed":
            before = self._state.phase
            self._require_lease()
            self._pass_time()
            # Looked at first and by itself: nothing that is down may stand between the evidence and the way back.
            end = self._looked()
            if end is None:
                try:
                    self._obey()
                    end = self._checked() or self._advance()
                except UnavailableError as error:
                    if before == "probing":
                        raise
                    self._journal.hold("down", f"It holds: {error.message}")
                    end = self._timed_out()
            if end is not None:
                return end
            if self._state.phase == before:
                requests = self._watch.requests if self._watch else 0
                self._report(*progress(self._state, self._policy, requests, self._result))
                self._clock.sleep(TICK_S)
        return None

    @property
    def _state(self) -> RolloutState:
        return self._journal.state

    @property
    def _step(self) -> StepPolicy:
        return self._policy.steps[self._state.step]

    def _pass_time(self) -> None:
        """Count the time since the last round; a jump of the wall clock moves what was written by it."""
        wall, monotonic = self._clock.now(), self._clock.monotonic()
        passed = monotonic - self._monotonic
        jump = wall - self._wall - passed
        self._wall, self._monotonic = wall, monotonic
        state = self._state
        if abs(jump) > _JUMP_S:
            moved = replace(state, since=state.since + jump, begun=min(state.begun, state.begun + jump))
            self._journal.state = moved
            if self._watch is not None:
                self._watch.moved(jump)
            self._journal.try_save("note", f"This machine's clock jumped by {jump:+.0f} s.")
        if not state.paused:
            self._journal.state = replace(self._state, spent_s=self._state.spent_s + passed)

    def _looked(self) -> End | None:
        watch = self._watching()
        if watch is None:
            return None
        trip = watch.look()
        if trip is not None:
            self._result = verdict_of(trip, self._result)
        elif self._clock.monotonic() >= self._next_check:
            self._analyse(watch)
        if self._result is None or self._result.verdict != "fail":
            return None
        self._journal.state = replace(self._state, analysis=self._result)
        return End(True, self._result.sentence)

    def _watching(self) -> Watch | None:
        """The watch of this phase: of the shadow, then of users' requests; None while the canary is asked nothing."""
        state = self._state
        shadow = state.phase == "shadowing"
        if not state.weight and not (shadow and state.shadow):
            return None
        if self._watch is None or self._watched_shadow != shadow:
            source = self._shadow_source if shadow else self._source
            assert source is not None
            self._watch = Watch(
                state.release,
                state.stable.release,
                analysis=self._analysis_policy(shadow=shadow),
                trip=self._policy.trip,
                source=source,
                since=min(state.begun, self._clock.now()),
                clock=self._clock,
            )
            self._watch.count_from(state.since)
            self._watched_shadow = shadow
        return self._watch

    def _analysis_policy(self, *, shadow: bool) -> AnalysisPolicy:
        """The chance of a false rollback is that of the whole rollout: shadow and users' requests share it."""
        policy = self._policy.analysis
        if self._policy.shadow is not None:
            policy = policy.model_copy(update={"false_rollback": policy.false_rollback / 2})
        return shadow_policy(policy) if shadow else policy

    def _analyse(self, watch: Watch) -> None:
        """One analysis; the timeline gets it when a verdict changed, or when there was nothing to tell for long."""
        now = self._clock.monotonic()
        self._next_check = now + self._policy.check_interval_s
        state = self._state
        shadow = self._policy.shadow if state.phase == "shadowing" else None
        minimum = Minimum(requests=shadow.requests) if shadow else self._step.minimum
        self._result = result = watch.analyse(minimum, state.since)
        if result.verdict == "fail" or state.phase == "raising":
            # Users go first; and between two steps there is nothing to wait for.
            return
        said = (state.phase, state.step, result.verdict, *((one.name, one.verdict) for one in result.metrics))
        if said != self._shown or now >= self._next_shown:
            self._shown, self._next_shown = said, now + max(30.0, (shadow or self._step).maximum_time_s / _LOOKS)
            self._journal.try_save("look", result.sentence, verdict=result.verdict, analysis=result)
        self._journal.keep(analysis=result)

    def _checked(self) -> End | None:
        """Whether the routes are still those that this rollout made."""
        if self._watching() is None:
            return None
        routes = self._router.state()
        # Killed, or without a disk, between the change of the routes and its record: it is done again.
        if routes in (self._state.routes, self._wanted()):
            return None
        return self._changed(routes)

    def _changed(self, routes: RouteState) -> End:
        release = self._state.release
        refusal = self._router.refusal(release)
        return End(True, refusal or f"the routes were changed from outside: {routes.share(release)}% on it")

    def _obey(self) -> None:
        """Carry out the orders given since. The later word counts."""
        try:
            orders = self._store.orders(self._state.release)
        except IntegrityError as error:
            self._journal.hold("orders", f"Orders cannot be read: {error.message}")
            return
        for order in orders[self._state.obeyed :]:
            ordered = order if order.kind == "promote" else None if order.kind == "pause" else self._state.ordered
            said = {
                "pause": "paused; it is analysed all the same",
                "resume": "it goes on",
                "promote": "promote without waiting for minimum samples and times",
            }[order.kind]
            self._journal.save(
                "order",
                f"{order.actor}: {said}{f' ({order.reason})' if order.reason else ''}",
                actor=order.actor,
                paused=order.kind == "pause",
                ordered=ordered,
                obeyed=self._state.obeyed + 1,
            )

    def _advance(self) -> End | None:
        phase = self._state.phase
        if phase == "probing":
            return self._probed()
        if self._state.paused:
            return None
        if phase == "shadowing":
            return self._shadow()
        if phase == "raising":
            return self._raise()
        return self._hold() if phase == "holding" else self._bake()

    def _probed(self) -> End | None:
        state = self._state
        if self._router.refusal(state.release):
            return End(True, "it was rolled back before")
        self._router.apply(RouteState(state.stable, state.target, 0), token=self._token)
        report = self._probe()
        self._journal.save("probe", report.sentence, verdict="pass" if report.passed else "fail")
        if not report.passed:
            return End(True, f"probe: {report.sentence}")
        shadowed = self._policy.shadow is not None and self._shadow_source is not None
        self._enter("shadowing" if shadowed else "raising", "note", "Its probes passed.")
        return None

    def _shadow(self) -> End | None:
        state, shadow = self._state, self._policy.shadow
        assert shadow is not None
        wanted = self._wanted()
        if not state.shadow:
            before = self._clock.now()
            if end := self._set_routes(wanted):
                return end
            sentence = f"Asked {wanted.shadow}% of what {state.stable.served_name} is asked; nobody sees the answers."
            self._enter("shadowing", "shadow", sentence, shadow=wanted.shadow, begun=before, since=before)
            return None
        watch = self._watch
        if watch is None:
            return None
        if watch.requests < shadow.requests and state.ordered is None:
            return self._timed_out()
        self._analyse(watch)
        if self._result is not None and self._result.verdict == "fail":
            return End(True, self._result.sentence)
        sentence = f"{watch.requests} answers in the shadow, and none of their rates failed."
        self._enter("raising", "pass", sentence, verdict="pass", analysis=self._result)
        return None

    def _raise(self) -> End | None:
        state, wanted = self._state, self._wanted()
        # Killed after the change of the routes, it had leave: its users wait for nobody before they are watched.
        if self._router.state() != wanted and not self._asked(self._leave, "leave to raise the weight"):
            return self._timed_out()
        self._require_lease()
        before = self._clock.now()
        if end := self._set_routes(wanted):
            return end
        begun = before if state.step == 0 else state.begun
        sentence = f"Step {state.step + 1} of {len(self._policy.steps)}: {wanted.weight}% of sessions."
        self._enter("holding", "raise", sentence, weight=wanted.weight, shadow=0, since=before, begun=begun)
        return None

    def _leave(self) -> None:
        state = self._state
        self._authorize()
        self._recorder.step(state.release, state.step, self._step.weight, "inconclusive", None)

    def _hold(self) -> End | None:
        state, result = self._state, self._result
        if result is None:
            return None
        ready = result.verdict == "pass" and state.spent_s >= self._step.minimum_time_s
        if not ready and state.ordered is None:
            return self._timed_out()

        def passed() -> None:
            self._recorder.step(state.release, state.step, state.weight, "pass", result, state.ordered)

        if not self._asked(passed, "the record of the step's end"):
            return self._timed_out()
        self._enter_next(result, state.ordered)
        return None

    def _enter_next(self, result: AnalysisResult, ordered: Order | None) -> None:
        state = self._state
        if ordered is not None:
            sentence = f"Promoted by order of {ordered.actor}: {ordered.reason}. {result.sentence}"
            self._enter("passed", "pass", sentence, verdict=result.verdict, actor=ordered.actor, analysis=result)
        elif state.step == len(self._policy.steps) - 1:
            # Its samples count on: the same window, for the time of the bake.
            self._enter("baking", "pass", result.sentence, verdict="pass", analysis=result)
            self._journal.try_save("bake", f"{state.weight}% on the release for {self._policy.bake_s:g} s more.")
        else:
            self._enter("raising", "pass", result.sentence, verdict="pass", analysis=result, step=state.step + 1)

    def _bake(self) -> End | None:
        state, result = self._state, self._result
        if result is None:
            return None
        if state.ordered is not None:
            self._enter_next(result, state.ordered)
        # What passed before says nothing about a server that hangs since: it has to finish a request in the bake.
        elif state.spent_s >= self._policy.bake_s and result.verdict == "pass" and self._finished():
            self._enter("passed", "pass", "Baked without a failing metric.", verdict="pass", analysis=result)
        else:
            return self._timed_out()
        return None

    def _finished(self) -> bool:
        watch = self._watching()
        return watch is not None and watch.requests > 0

    def _timed_out(self) -> End | None:
        """Whether the phase took longer than it may. What is undecided although everything was there is a failure; what
        lacks figures, users or the ledger says nothing about the release."""
        state = self._state
        if state.paused or state.phase == "probing":
            return None
        shadow = self._policy.shadow if state.phase == "shadowing" else None
        limit = (shadow or self._step).maximum_time_s + (self._policy.bake_s if state.phase == "baking" else 0)
        if state.spent_s < limit:
            return None
        lacking = self._lacking()
        says = lacking or (self._result.sentence if self._result else "nothing was analysed")
        where = "in the shadow" if shadow else f"at {state.weight}%"
        reason = f"inconclusive after {state.spent_s:.0f} s {where}: {says}"
        return End(state.phase in ("holding", "baking") and not lacking, reason)

    def _lacking(self) -> str:
        """What is missing for a verdict, in a sentence; empty when nothing is."""
        state, watch, result = self._state, self._watch, self._result
        if state.phase == "raising" or watch is None or result is None or result.verdict == "pass":
            return "it could not go on; the events say why it was held"
        least = self._policy.shadow.requests if state.phase == "shadowing" and self._policy.shadow else None
        least = least or self._step.minimum.requests
        if watch.requests < least:
            return f"{watch.requests} of {least} requests"
        gating = [name for name, limits in self._policy.analysis.metrics.items() if limits.gating]
        missing = [watch.missing[name] for name in gating if name in watch.missing]
        return missing[0] if missing else ""

    def _wanted(self) -> RouteState:
        """The routes that this phase is after."""
        state, weight, shadow = self._state, self._state.weight, 0
        if state.phase == "raising":
            weight = self._step.weight
        elif state.phase == "shadowing" and self._policy.shadow is not None:
            shadow = self._policy.shadow.percent
        return RouteState(state.stable, state.target, weight, shadow)

    def _set_routes(self, wanted: RouteState) -> End | None:
        routes = self._router.state()
        if routes == wanted:
            # Decided before; a process that was killed then may not have told the data plane.
            if self._router.drift():
                self._router.reconcile()
            return None
        if routes != self._state.routes:
            return self._changed(routes)
        try:
            self._router.apply(wanted, expected=routes, token=self._token)
        except StaleToken:
            raise
        except ConflictError:
            return self._changed(self._router.state())
        return None

    def _enter(self, phase: Phase, kind: EventKind, sentence: str, **changes: Any) -> None:
        """Go to a phase, or begin one anew: its time starts now, and its figures are still to come."""
        # The routes have changed whether that can be saved or not: from now on users are watched. What was not saved is
        # done again after a crash.
        save = self._journal.try_save if kind == "raise" else self._journal.save
        save(kind, sentence, phase=phase, spent_s=0.0, **changes)
        self._result = None
        if self._watch is not None and phase in ("holding", "baking"):
            self._watch.count_from(self._state.since if phase == "holding" else self._clock.now())

    def _asked(self, ask: Callable[[], None], what: str) -> bool:
        """Whether `ask`, called beside the watching, has returned in time; raises what it raised."""
        answered = self._asking.answered(ask, (self._state.phase, self._state.step))
        if not answered and self._asking.waited_s > SLOW_S:
            waited = f"{self._asking.waited_s:.0f} s"
            self._journal.hold("ledger", f"It holds: {what} was asked for {waited} ago, without an answer.")
        return answered
