"""A rollout: a release gains users step by step while it is no worse than stable, and loses all of them when it is.

The order of writes makes a kill at any moment safe:
- Raising: the intention is saved, leave is asked and the step recorded as begun, the gateway is changed, the new step
  is saved. Killed in between, the next run does the same again.
- Passing: the step is recorded as passed, then saved as passed; killed in between, it is analysed and recorded again.
- The ways back: `retreat.py`.

One thread watches and moves; what may hang (the ledger, the traces) runs beside it, so that a failing release loses its
users whatever else is down. Durations are of the monotonic clock: what the wall clock does passes no step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime

from sluice.infra.errors import ConflictError, GateRefused, UnavailableError
from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import short
from sluice.serving.controller_lease import ControllerLease, Held
from sluice.serving.observations import SampleSource
from sluice.serving.policy import RolloutPolicy
from sluice.serving.probes import ProbeReport
from sluice.serving.retreat import Retreat
from sluice.serving.rollout_interfaces import Clock, EventSink, Recorder, RolloutResult, SystemClock
from sluice.serving.rollout_journal import Journal
from sluice.serving.rollout_state import RolloutState
from sluice.serving.rollout_steps import Steps
from sluice.serving.rollout_store import RolloutStore
from sluice.serving.routes import Router, RouteState, StaleToken, Target

_TURN_S = 1.0


class Rollout:
    """One release's way to its users.

    `authorize` is called before *every* increase of the weight and raises `GateRefused` when the release has no valid
    decision and approval; `probe` is called at weight 0. `source` is read several times a second and must answer at
    once; `shadow` tells of requests that the canary was asked in the shadow of stable's, and of those. `confirm`
    watches requests for a moment after a rollback, and says in a sentence whom they reached. Running again continues
    from what the store holds.
    """

    def __init__(
        self,
        target: Target,
        *,
        policy: RolloutPolicy,
        router: Router,
        store: RolloutStore,
        lease: ControllerLease,
        source: SampleSource,
        shadow: SampleSource | None = None,
        recorder: Recorder,
        authorize: Callable[[], None],
        probe: Callable[[], ProbeReport],
        confirm: Callable[[RouteState], str] | None = None,
        sinks: Sequence[EventSink] = (),
        clock: Clock | None = None,
        report: Report = no_report,
    ) -> None:
        self._target = target
        self._policy = policy
        self._router = router
        self._store = store
        self._lease = lease
        self._source = source
        self._shadow = shadow
        self._recorder = recorder
        self._authorize = authorize
        self._probe = probe
        self._confirm = confirm
        self._sinks = sinks
        self._clock = clock or SystemClock()
        self._report = report

    def run(self) -> RolloutResult:
        """Roll out until it passes or ends; waits for its turn first.

        Raises `GateRefused` (leave was refused: users back on stable, nothing recorded as failed), `ConflictError`
        (another controller took over, or the release is stable already) and `UnavailableError` (it could not begin, or
        users are back and the ledger could not be told).
        """
        while True:
            with self._leading() as held:
                ahead = self._ahead()
                if ahead is None:
                    return self._led(held)
            # The lease is free while we wait: whoever is ahead may need it to go on.
            self._report(0, 0, f"waiting for {ahead}")
            self._clock.sleep(_TURN_S)

    def finish(self) -> RolloutState:
        """After the promotion is recorded: the release becomes the gateway's stable. Safe to repeat."""
        with self._leading() as held:
            saved = self._store.load(self._target.release)
            if saved is None or saved.phase not in ("passed", "promoted"):
                raise ConflictError(f"The rollout of {self._target.release} has not passed; it cannot become stable.")
            journal = self._journal(saved, held)
            routes = self._router.state()
            if routes.stable.release != self._target.release:
                if routes != self._ours(saved, routes).routes:
                    raise ConflictError(
                        f"The release {self._target.release} cannot become stable: {self._changed(routes)}."
                    )
                self._authorize()
                self._router.apply(RouteState(self._target), expected=routes, token=held.token)
            if saved.phase != "promoted":
                journal.save("promote", "The release is stable now.", weight=100, verdict="pass", phase="promoted")
            return journal.state

    def step_aside(self, error: GateRefused | ConflictError) -> RolloutResult:
        """The promotion was refused: no user stays on the canary. Raises `error`, unless the release had failed."""
        with self._leading() as held:
            saved = self._store.load(self._target.release)
            if saved is None:
                raise error
            return self._refused(self._journal(saved, held), held, error)

    @contextmanager
    def _leading(self) -> Iterator[Held]:
        held = self._lease.acquire(self._report)
        try:
            yield held
        except StaleToken as error:
            raise ConflictError(
                f"Another controller took over the rollout of {self._target.served_name}; this one changed nothing.",
                hint="`sluice release status` shows how it goes on.",
            ) from error
        finally:
            held.release()

    def _ahead(self) -> str | None:
        """What must end before this rollout may begin, or None. One that has begun goes on."""
        saved = self._store.load(self._target.release)
        if saved is not None and saved.goes_on:
            return None
        canary = self._router.state().canary
        if canary is not None and canary.release != self._target.release:
            return f"the rollout of {canary.served_name} ({self._router.state().weight}%)"
        cooling = self._store.cool_down()
        if cooling is None or cooling.ended_by or self._clock.now() >= cooling.until:
            return None
        until = datetime.fromtimestamp(cooling.until).strftime("%H:%M:%S")
        return f"the end of the cool-down at {until}: {short(cooling.release)} failed ({cooling.reason})"

    def _led(self, held: Held) -> RolloutResult:
        self._follow()
        journal = self._begin(held)
        state = journal.state
        if state.phase == "failed":
            return RolloutResult("failed", state.reason, state)
        if state.phase in ("passed", "promoted"):
            routes = self._router.state()
            if routes.stable.release == self._target.release or routes == state.routes:
                return self._passed(journal)
            return self._failed(journal, held, self._changed(routes))
        refusal = self._router.refusal(self._target.release)
        if refusal or state.phase == "failing":
            return self._failed(journal, held, state.reason or refusal or "it was rolled back")
        if state.phase == "withdrawing":
            return self._withdrawn(journal, held, state.reason)
        steps = Steps(
            journal,
            policy=self._policy,
            router=self._router,
            store=self._store,
            source=self._source,
            shadow=self._shadow,
            recorder=self._recorder,
            authorize=self._authorize,
            probe=self._probe,
            require_lease=lambda: _require(held),
            token=held.token,
            clock=self._clock,
            report=self._report,
        )
        try:
            end = steps.walk()
        except (StaleToken, UnavailableError):
            raise
        except (GateRefused, ConflictError) as error:
            return self._refused(journal, held, error)
        except KeyboardInterrupt:
            # Cancelled, and nobody said that another controller comes: users do not stay where nobody looks.
            if self._router.state().share(self._target.release):
                self._retreat(journal, held).leave("its controller was cancelled")
            raise
        except Exception as error:
            # Nobody watches the canary any more: users first, the cause afterwards.
            self._failed(journal, held, f"the rollout broke: {error or type(error).__name__}")
            raise
        if end is None:
            return self._passed(journal)
        return self._failed(journal, held, end.reason) if end.failed else self._withdrawn(journal, held, end.reason)

    def _follow(self) -> None:
        """A controller that was killed after its decision and before the data plane heard of it: users, and what is
        seen of them, follow the decision again. A gateway that does not answer is asked again by what comes next."""
        if self._store.load(self._target.release) is not None:
            with suppress(UnavailableError):
                if self._router.drift():
                    self._router.reconcile()

    def _begin(self, held: Held) -> Journal:
        saved = self._store.load(self._target.release)
        routes = self._router.state()
        if saved is not None and saved.goes_on:
            journal = self._journal(self._ours(saved, routes), held)
            if not saved.ended:
                journal.try_save("resume", f"Going on at step {saved.step + 1} ({saved.phase}).")
            return journal
        if routes.stable.release == self._target.release:
            if saved is not None and saved.phase == "promoted":
                return self._journal(saved, held)
            raise ConflictError(f"The release {self._target.release} is stable already.")
        # Whoever waited for others may have lost its leave meanwhile: its gate compared it with an older champion.
        self._authorize()
        state = RolloutState(self._target, routes.stable, "probing", 0, 0, self._clock.now())
        if saved is not None:
            state = replace(state, events=saved.events, obeyed=len(self._store.orders(state.release)))
        journal = self._journal(state, held)
        journal.save("start", f"Rollout of {self._target.served_name} beside {routes.stable.served_name}.")
        return journal

    def _journal(self, state: RolloutState, held: Held) -> Journal:
        return Journal(state, store=self._store, sinks=self._sinks, clock=self._clock, token=held.token)

    def _ours(self, saved: RolloutState, routes: RouteState) -> RolloutState:
        """The saved state at today's addresses: those of a server may have changed, who is stable may not."""
        stable = routes.stable if routes.stable.release == saved.stable.release else saved.stable
        return replace(saved, stable=stable, target=self._target)

    def _passed(self, journal: Journal) -> RolloutResult:
        return RolloutResult("promote", "The release passed every step of its rollout.", journal.state)

    def _failed(self, journal: Journal, held: Held, reason: str) -> RolloutResult:
        """Users first, then the record. Absorbing."""
        self._retreat(journal, held).fail(reason)
        return RolloutResult("failed", reason, journal.state)

    def _withdrawn(self, journal: Journal, held: Held, reason: str) -> RolloutResult:
        if refusal := self._router.refusal(self._target.release):
            return self._failed(journal, held, refusal)
        self._retreat(journal, held).withdraw(reason)
        return RolloutResult("inconclusive", reason, journal.state)

    def _refused(self, journal: Journal, held: Held, error: GateRefused | ConflictError) -> RolloutResult:
        """Leave was refused: no user stays on the canary. A new approval may begin again, from the first step."""
        try:
            result = self._withdrawn(journal, held, f"not allowed: {error.message}")
        except UnavailableError as unavailable:
            raise error from unavailable
        if result.verdict == "failed":
            return result
        raise error

    def _retreat(self, journal: Journal, held: Held) -> Retreat:
        return Retreat(
            journal,
            router=self._router,
            store=self._store,
            recorder=self._recorder,
            cool_down_s=self._policy.cool_down_s,
            confirm=self._confirm,
            require_lease=lambda: _require(held),
            clock=self._clock,
            report=self._report,
        )

    def _changed(self, routes: RouteState) -> str:
        return changed(self._router, self._target, routes)


def changed(router: Router, target: Target, routes: RouteState) -> str:
    """Why the routes are not what the rollout of `target` made them."""
    refusal = router.refusal(target.release)
    return refusal or f"the routes were changed from outside: {routes.share(target.release)}% on it instead of ours"


def _require(held: Held) -> None:
    if held.lost():
        raise StaleToken(f"The lease with token {held.token} is lost.")
