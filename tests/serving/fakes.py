"""Parts of a rollout that live in memory: a gateway, a clock, figures and a ledger."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from sluice.infra.errors import ConflictError, GateRefused, UnavailableError
from sluice.infra.progress import Report, no_report
from sluice.serving.analysis import AnalysisResult, Verdict
from sluice.serving.control import Order
from sluice.serving.observations import Observed, Sample
from sluice.serving.policy import RolloutPolicy, ShadowPolicy, default_policy
from sluice.serving.probes import ProbeCheck, ProbeReport
from sluice.serving.rollout import Rollout
from sluice.serving.rollout_state import RolloutEvent, RolloutState
from sluice.serving.rollout_store import FileRolloutStore
from sluice.serving.routes import RouteState, StaleToken, Target

HEALTHY: Mapping[str, float] = {
    "error_rate": 0,
    "empty_answers": 0,
    "truncated_answers": 0,
    "thumbs_down": 0,
    "time_to_first_token": 100.0,
}
"""What a good request shows."""
BROKEN = {"error_rate": 1.0}


class Killed(BaseException):
    """The process dies here."""


class Hung:
    """A call that does not return while this stands."""


@dataclass
class MemoryRouter:
    """The `Router` protocol with the gateway's own rules: what was rolled back does not rise, old tokens do nothing."""

    now: RouteState
    log: list[str]
    refused: dict[str, str] = field(default_factory=dict)
    token: int = 0
    down: bool = False

    def state(self) -> RouteState:
        return self.now

    def apply(self, state: RouteState, *, expected: RouteState | None = None, token: int = 0) -> RouteState:
        if self.down:
            raise UnavailableError("the gateway does not answer")
        if token and token < self.token:
            raise StaleToken(f"token {token} is behind {self.token}")
        if expected is not None and expected != self.now:
            raise ConflictError("changed")
        for target in state.targets():
            if target.release in self.refused and state.share(target.release) > self.now.share(target.release):
                raise GateRefused(self.refused[target.release])
        self.token = max(self.token, token)
        shown = f"shadow {state.shadow}" if state.shadow else f"weight {state.weight}"
        self.log.append(shown if state.canary else f"stable {state.stable.release[7]}")
        self.now = state
        return state

    def rollback(self, reason: str, *, absorb: bool = True) -> RouteState:
        if self.down:
            raise UnavailableError("the gateway does not answer")
        if self.now.canary is not None:
            if absorb:
                self.refused[self.now.canary.release] = reason
            self.now = RouteState(self.now.stable)
            self.log.append("rollback")
        return self.now

    def restore_previous(self, reason: str) -> RouteState:
        raise ConflictError("none")

    def previous(self) -> tuple[Target, ...]:
        return ()

    def refusal(self, release: str) -> str | None:
        return self.refused.get(release)

    def drift(self) -> tuple[str, ...]:
        return ()

    def reconcile(self) -> RouteState:
        return self.now

    def active_requests(self, release: str) -> int:
        return 0

    def wait_idle(self, release: str, *, timeout_s: float) -> None:
        self.log.append(f"idle {release}")


@dataclass
class FakeClock:
    """Both clocks; `jump` moves the wall clock alone."""

    time: float = 1000.0
    jumped: float = 0.0

    def now(self) -> float:
        return self.time + self.jumped

    def monotonic(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    def jump(self, seconds: float) -> None:
        self.jumped += seconds


Figures = Callable[[str, float], Mapping[str, float]]
"""(release, when) -> what the request that ended then shows."""


def healthy(release: str, known: float) -> Mapping[str, float]:
    return HEALTHY


@dataclass
class Traffic:
    """A `SampleSource`: each release that has users finishes `per_s` requests a second, stamped with `clock`.

    It makes them as time goes by, as a gateway does, and tells of any window afterwards. `missing` is told as it is;
    `asked` are the windows that somebody asked for.
    """

    clock: FakeClock
    router: MemoryRouter
    figures: Figures = healthy
    per_s: float = 8.0
    shadow: bool = False
    missing: dict[str, str] = field(default_factory=dict)
    active: dict[str, int] = field(default_factory=dict)
    log: list[Sample] = field(default_factory=list)
    asked: list[tuple[float, float]] = field(default_factory=list)
    _made: int | None = None

    def observe(self, canary: str, stable: str, since: float, until: float) -> Observed:
        self.asked.append((since, until))
        self._make()
        found = tuple(one for one in self.log if since <= one.known < until and one.release in (canary, stable))
        finished = {one.release: one.known for one in self.log}
        return Observed(found, dict(self.active), finished, dict(self.missing))

    def _make(self) -> None:
        """What ended since the last time, of whoever has users now."""
        end = math.floor(self.clock.monotonic() * self.per_s)
        begin = end if self._made is None else self._made
        self._made = end
        routes = self.router.now
        canary = routes.canary if (routes.shadow if self.shadow else routes.weight) else None
        for number in range(begin, end):
            known = number / self.per_s + self.clock.jumped
            for target in (routes.stable, canary):
                if target is not None:
                    for metric, value in self.figures(target.release, known).items():
                        request = f"{target.release[7]}{number}"
                        self.log.append(Sample(metric, target.release, value, known, request, f"session {number}"))


@dataclass
class MemoryLease:
    """`ControllerLease`: always free, its token grows; `taken` makes every holder lose it."""

    token: int = 0
    taken: bool = False

    def acquire(self, report: Report = no_report) -> MemoryHeld:
        self.token += 1
        return MemoryHeld(self, self.token)


@dataclass
class MemoryHeld:
    lease: MemoryLease
    token: int

    def lost(self) -> bool:
        return self.lease.taken

    def release(self) -> None:
        pass


@dataclass
class Memory:
    """One application with a stable release and a candidate; `kill_at` dies at the n-th outside write.

    `ledger_down` raises or, if it is `Hung`, never returns; `at` are things done when the time has come.
    """

    stable: Target
    target: Target
    folder: Path
    figures: Figures = healthy
    policy: RolloutPolicy = field(default_factory=lambda: quick())
    clock: FakeClock = field(default_factory=FakeClock)
    log: list[str] = field(default_factory=list)
    events: list[RolloutEvent] = field(default_factory=list)
    allowed: bool = True
    probes_pass: bool = True
    ledger_down: type[Hung] | UnavailableError | None = None
    kill_at: int = -1
    writes: int = 0

    def __post_init__(self) -> None:
        self.router = MemoryRouter(RouteState(self.stable), self.log)
        self.store = FileRolloutStore(self.folder)
        self.lease = MemoryLease()
        self.traffic = Traffic(self.clock, self.router, lambda release, known: self.figures(release, known))
        self.mirrored = replace(self.traffic, shadow=True, log=[], asked=[])

    def rollout(self, target: Target | None = None) -> Rollout:
        return Rollout(
            target or self.target,
            policy=self.policy,
            router=_Dying(self, self.router),
            store=_DyingStore(self, self.store),
            lease=self.lease,
            source=self.traffic,
            shadow=self.mirrored,
            recorder=self,
            authorize=self.authorize,
            probe=self.probe,
            sinks=(self,),
            clock=self.clock,
        )

    def emit(self, event: RolloutEvent, state: RolloutState) -> None:
        assert state.events[-1] == event
        self.events.append(event)

    def step(
        self,
        release: str,
        step: int,
        weight: int,
        verdict: Verdict,
        analysis: AnalysisResult | None,
        ordered: Order | None = None,
    ) -> None:
        self.ledger()
        self.tick()
        self.log.append(f"step {step} {verdict}{f' by {ordered.actor}' if ordered else ''}")
        self.tick()

    def failure(self, release: str, stable: str, reason: str, analysis: AnalysisResult | None) -> None:
        self.ledger()
        self.tick()
        self.log.append(f"failure {reason}")
        self.tick()

    def withdrawal(self, release: str, stable: str, reason: str) -> None:
        self.ledger()
        self.tick()
        self.log.append(f"withdrawal {reason}")
        self.tick()

    def ledger(self) -> None:
        if isinstance(self.ledger_down, UnavailableError):
            raise self.ledger_down
        if self.ledger_down is not None:
            threading.Event().wait()

    def authorize(self) -> None:
        self.log.append("authorize")
        if not self.allowed:
            raise GateRefused("the approval was withdrawn")

    def probe(self) -> ProbeReport:
        return ProbeReport(self.target.served_name, (ProbeCheck("answers", self.probes_pass, "It does not answer."),))

    def tick(self) -> None:
        """One point at which the process may die."""
        self.writes += 1
        if self.writes == self.kill_at:
            raise Killed

    def weights(self) -> list[int]:
        """Every weight that the gateway was given, in order; a rollback is 0."""
        return [
            0 if entry == "rollback" else int(entry.split()[1])
            for entry in self.log
            if entry == "rollback" or entry.startswith("weight")
        ]

    def kinds(self) -> Iterator[str]:
        return (event.kind for event in self.events)


class _Dying(MemoryRouter):
    """A router whose writes are points at which the process may die, before and after."""

    def __init__(self, memory: Memory, router: MemoryRouter) -> None:
        self._memory, self._router = memory, router

    def __getattribute__(self, name: str) -> object:
        if name.startswith("_") or name in ("apply", "rollback"):
            return object.__getattribute__(self, name)
        return getattr(self._router, name)

    def apply(self, state: RouteState, *, expected: RouteState | None = None, token: int = 0) -> RouteState:
        self._memory.tick()
        self._router.apply(state, expected=expected, token=token)
        self._memory.tick()
        return state

    def rollback(self, reason: str, *, absorb: bool = True) -> RouteState:
        self._memory.tick()
        state = self._router.rollback(reason, absorb=absorb)
        self._memory.tick()
        return state


class _DyingStore(FileRolloutStore):
    """A store whose writes of events are points at which the process may die."""

    def __init__(self, memory: Memory, store: FileRolloutStore) -> None:
        super().__init__(store._folder)
        self._memory = memory
        self._events = -1

    def save(self, state: RolloutState) -> None:
        if len(state.events) != self._events:
            self._events = len(state.events)
            self._memory.tick()
        super().save(state)


def quick(**changes: object) -> RolloutPolicy:
    """The policy of the demonstration with three short steps, and `changes` of its steps."""
    policy = default_policy()
    steps = tuple(
        step.model_copy(update={"weight": weight, "minimum_time_s": 1.0, "maximum_time_s": 60.0, **changes})
        for step, weight in zip(policy.steps, (10, 30, 50), strict=True)
    )
    shadow = ShadowPolicy(percent=100, requests=6, maximum_time_s=120)
    return policy.model_copy(update={"steps": steps, "bake_s": 1.0, "shadow": shadow})


def unlike(stable: str, canary: Mapping[str, float]) -> Figures:
    """Healthy figures for stable, these for everybody else."""
    return lambda release, _: HEALTHY if release == stable else {**HEALTHY, **canary}
