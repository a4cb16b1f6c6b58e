"""A rollout: a release gains users step by step while it is no worse than stable, and loses all of them when it is.

The order of writes makes a kill at any moment safe:
- Raising: the intention is saved, leave is asked, the gateway is changed, the new step is saved. Killed in between,
  the next run does the same again.
- Failing: the gateway goes back first (its own files then refuse the release for ever), then the failure is saved,
  recorded by the caller, and saved as done. Killed in between, the next run finds the refusal and finishes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sluice.infra.errors import ConflictError, GateRefused, UnavailableError
from sluice.infra.progress import Report, no_report
from sluice.serving.analysis import AnalysisResult, Verdict, analyse
from sluice.serving.policy import RolloutPolicy, StepPolicy
from sluice.serving.probes import ProbeReport
from sluice.serving.rollout_interfaces import Clock, Recorder, RolloutResult, SampleSource, SystemClock
from sluice.serving.rollout_state import EventKind, RolloutEvent, RolloutState, RolloutStore
from sluice.serving.routes import Router, RouteState, Target


class Rollout:
    """One release's way to 100 percent.

    `authorize` is called before *every* increase of the weight and raises `GateRefused` when the release has no valid
    decision and approval; `probe` is called at weight 0. Running again continues from what the store holds.
    """

    def __init__(
        self,
        target: Target,
        *,
        policy: RolloutPolicy,
        router: Router,
        store: RolloutStore,
        source: SampleSource,
        recorder: Recorder,
        authorize: Callable[[], None],
        probe: Callable[[], ProbeReport],
        clock: Clock | None = None,
        report: Report = no_report,
    ) -> None:
        self._target = target
        self._policy = policy
        self._router = router
        self._store = store
        self._source = source
        self._recorder = recorder
        self._authorize = authorize
        self._probe = probe
        self._clock = clock or SystemClock()
        self._report = report
        self._state: RolloutState
        self._analysis: AnalysisResult | None = None

    def run(self) -> RolloutResult:
        """Roll out until it passes or fails. Raises `GateRefused` (users back on stable, nothing recorded as failed)
        and `UnavailableError` (the gateway does not answer; run again when it does)."""
        self._state = self._begin()
        if self._state.phase == "failed":
            return self._failed_result()
        if self._state.phase == "passed":
            routes = self._router.state()
            if routes.stable.release != self._target.release and routes != self._expected(100):
                return self._fail(self._changed(routes))
        refusal = self._router.refusal(self._target.release)
        if refusal or self._state.phase == "failing":
            return self._fail(self._state.reason or refusal or "it was rolled back")
        try:
            while self._state.phase not in ("passed", "promoted"):
                if failure := self._advance():
                    return self._fail(failure)
        except GateRefused as error:
            return self._step_aside(error)
        except (ConflictError, UnavailableError):
            raise
        except Exception as error:
            # Nobody watches the canary any more: users first, the cause afterwards.
            self._fail(f"the rollout broke: {error or type(error).__name__}")
            raise
        return RolloutResult("promote", f"The release passed all {len(self._policy.steps)} steps.", self._state)

    def step_aside(self, error: GateRefused | ConflictError) -> RolloutResult:
        """The promotion was refused: no user stays on the canary. Raises `error`, unless the release had failed."""
        saved = self._store.load(self._target.release)
        if saved is None:
            raise error
        self._state = saved
        return self._step_aside(error)

    def finish(self) -> RolloutState:
        """After the promotion is recorded: the release becomes the gateway's stable. Safe to repeat."""
        saved = self._store.load(self._target.release)
        if saved is None or saved.phase not in ("passed", "promoted"):
            raise ConflictError(f"The rollout of {self._target.release} has not passed; it cannot become stable.")
        self._state = saved
        routes = self._router.state()
        if routes.stable.release != self._target.release:
            if routes != self._expected(100):
                raise ConflictError(
                    f"The release {self._target.release} cannot become stable: {self._changed(routes)}."
                )
            self._authorize()
            self._router.apply(RouteState(self._target), expected=routes)
        if saved.phase != "promoted":
            self._save("promote", 100, "pass", "The release is stable now.", phase="promoted")
        return self._state

    def _begin(self) -> RolloutState:
        saved = self._store.load(self._target.release)
        if saved is not None and saved.phase not in ("probing", "promoted"):
            stable = self._router.state().stable
            # The server's address may have changed since; who is stable may not.
            same = stable.release == saved.stable.release
            self._state = saved = replace(saved, stable=stable) if same else saved
            if saved.phase != "failed":
                self._save("resume", saved.weight, None, f"Going on at step {saved.step + 1} ({saved.phase}).")
            return self._state
        routes = self._router.state()
        if saved is not None and saved.phase == "promoted" and routes.stable.release == self._target.release:
            return saved
        if routes.stable.release == self._target.release:
            raise ConflictError(f"The release {self._target.release} is stable already.")
        if routes.canary is not None and routes.canary.release != self._target.release:
            raise ConflictError(
                f"Another rollout is under way: {routes.canary.served_name} has {routes.weight}%.",
                hint="Let it end, or `sluice rollback` it first.",
            )
        self._state = RolloutState(self._target, routes.stable, "probing", 0, 0, self._clock.now())
        if saved is not None:
            self._state = replace(self._state, events=saved.events)
        self._save("start", 0, None, f"Rollout of {self._target.served_name} beside {routes.stable.served_name}.")
        return self._state

    def _advance(self) -> str | None:
        """One move. Returns why the release fails, or None."""
        if self._state.phase == "probing":
            return self._probed()
        if self._state.phase == "raising":
            return self._raise_weight()
        if self._state.phase == "holding":
            return self._hold(self._policy.steps[self._state.step])
        return self._bake()

    def _probed(self) -> str | None:
        if self._router.refusal(self._target.release):
            return "it was rolled back before"
        self._router.apply(RouteState(self._state.stable, self._target, 0))
        report = self._probe()
        self._save("probe", 0, "pass" if report.passed else "fail", report.sentence)
        if not report.passed:
            return f"probe: {report.sentence}"
        self._state = replace(self._state, phase="raising", step=0)
        self._store.save(self._state)
        return None

    def _raise_weight(self) -> str | None:
        state = self._state
        weight = self._policy.steps[state.step].weight
        routes = self._router.state()
        wanted = RouteState(state.stable, self._target, weight)
        if routes != wanted:
            if routes != self._expected(state.weight):
                return self._changed(routes)
            self._authorize()
            try:
                self._router.apply(wanted, expected=routes)
            except ConflictError:
                return self._changed(self._router.state())
        self._recorder.step(state.release, state.step, weight, "inconclusive", None)
        self._state = replace(state, phase="holding", weight=weight, since=self._clock.now())
        self._save("raise", weight, None, f"Step {state.step + 1} of {len(self._policy.steps)}: {weight}% of sessions.")
        return None

    def _hold(self, step: StepPolicy) -> str | None:
        state = self._state
        said = ""
        while True:
            routes = self._router.state()
            if routes != self._expected(state.weight):
                return self._changed(routes)
            elapsed = self._clock.now() - state.since
            result, sentence = self._look(step, state.since)
            if result is not None and result.verdict == "fail":
                return sentence
            if result is not None and result.verdict == "pass" and elapsed >= step.minimum_time_s:
                return self._passed(step, result)
            if elapsed >= step.maximum_time_s:
                return f"inconclusive after {elapsed:.0f} s at {state.weight}%: {sentence}"
            if sentence != said:
                self._save("look", state.weight, result.verdict if result else "inconclusive", sentence)
                said = sentence
            seen = result.canary.requests if result else 0
            self._report(
                min(seen, step.minimum.requests),
                step.minimum.requests,
                f"{state.weight}% on the canary, {elapsed:.0f} of at most {step.maximum_time_s:.0f} s: {sentence}",
            )
            self._clock.sleep(self._policy.check_interval_s)

    def _passed(self, step: StepPolicy, result: AnalysisResult) -> str | None:
        state = self._state
        self._recorder.step(state.release, state.step, state.weight, "pass", result)
        now = self._clock.now()
        reference = (state.since, now) if state.weight < 100 else state.reference
        last = state.step == len(self._policy.steps) - 1
        self._state = replace(
            state,
            reference=reference,
            phase="baking" if last else "raising",
            step=state.step if last else state.step + 1,
            since=state.since if last else now,
        )
        self._save("pass", state.weight, "pass", result.sentence)
        return None

    def _bake(self) -> str | None:
        step = self._policy.steps[-1]
        begun = self._clock.now()
        self._save("bake", 100, None, f"Everybody on the release for {self._policy.bake_s:g} s more.")
        while (elapsed := self._clock.now() - begun) < self._policy.bake_s:
            if failure := self._baked(step):
                return failure
            self._report(elapsed, self._policy.bake_s, "baking at 100%")
            self._clock.sleep(min(self._policy.check_interval_s, self._policy.bake_s))
        if failure := self._baked(step):
            return failure
        self._save("pass", 100, "pass", "Baked without a failing metric.", phase="passed")
        return None

    def _baked(self, step: StepPolicy) -> str | None:
        routes = self._router.state()
        if routes != self._expected(100):
            return self._changed(routes)
        result, sentence = self._look(step, self._state.since)
        return sentence if result is not None and result.verdict == "fail" else None

    def _look(self, step: StepPolicy, since: float) -> tuple[AnalysisResult | None, str]:
        """One analysis of the running window; None when the figures cannot be had, which is never a pass."""
        now = self._clock.now()
        reference = self._state.reference if self._state.weight == 100 else (since, now)
        if reference is None:
            return None, "There is no window to compare with."
        try:
            canary = self._source.samples(self._target.release, since, now)
            stable = self._source.samples(self._state.stable.release, *reference)
        except UnavailableError as error:
            return None, f"No figures: {error.message}"
        self._analysis = analyse(canary, stable, self._policy.analysis, step.minimum)
        return self._analysis, self._analysis.sentence

    def _fail(self, reason: str) -> RolloutResult:
        """Users first, then the record. Absorbing."""
        unconfirmed = ""
        routes = self._router.state()
        if routes.canary is not None and routes.canary.release == self._target.release:
            try:
                self._router.rollback(reason)
            except UnavailableError as error:
                unconfirmed = f" (the gateway has not confirmed yet: {error.message})"
        stable = self._router.state().stable
        if self._state.phase not in ("failing", "failed"):
            sentence = f"Everybody is back on {stable.served_name}{unconfirmed}."
            self._save("rollback", 0, "fail", sentence, phase="failing", reason=reason)
        self._recorder.failure(self._target.release, stable.release, reason, self._analysis)
        self._save("fail", 0, "fail", f"Failed for good: {reason}", phase="failed", reason=reason)
        return self._failed_result()

    def _step_aside(self, error: GateRefused | ConflictError) -> RolloutResult:
        """Leave was refused: no user stays on the canary. A new approval may begin again, from the first step."""
        if refusal := self._router.refusal(self._target.release):
            return self._fail(refusal)
        routes = self._router.state()
        if routes.canary is not None and routes.canary.release == self._target.release:
            self._router.rollback(error.message, absorb=False)
        self._state = replace(self._state, step=0, weight=0, reference=None)
        self._save("rollback", 0, None, f"Not allowed: {error.message}", phase="probing")
        raise error

    def _expected(self, weight: int) -> RouteState:
        return RouteState(self._state.stable, self._target, weight)

    def _changed(self, routes: RouteState) -> str:
        refusal = self._router.refusal(self._target.release)
        return refusal or f"the routes were changed from outside: {routes.weight}% on the canary instead of ours"

    def _failed_result(self) -> RolloutResult:
        return RolloutResult("failed", self._state.reason, self._state)

    def _save(self, kind: EventKind, weight: int, verdict: Verdict | None, sentence: str, **changes: object) -> None:
        event = RolloutEvent(self._clock.now(), kind, weight, verdict, sentence)
        updated = replace(self._state, weight=weight, events=(*self._state.events, event), **changes)  # type: ignore[arg-type]
        self._store.save(updated)
        self._state = updated
