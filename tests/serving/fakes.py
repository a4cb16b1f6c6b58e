"""Parts of a rollout that live in memory: a gateway, a clock, figures and a ledger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from sluice.infra.errors import ConflictError, GateRefused
from sluice.serving.analysis import AnalysisResult, ReleaseSamples, Verdict
from sluice.serving.policy import RolloutPolicy, default_policy
from sluice.serving.probes import ProbeCheck, ProbeReport
from sluice.serving.rollout import Rollout
from sluice.serving.rollout_state import FileRolloutStore
from sluice.serving.routes import RouteState, Target
from tests.serving.samples import samples


class Killed(BaseException):
    """The process dies here."""


@dataclass
class MemoryRouter:
    """The `Router` protocol with the gateway's own rule: what was rolled back does not rise."""

    now: RouteState
    log: list[str]
    refused: dict[str, str] = field(default_factory=dict)

    def state(self) -> RouteState:
        return self.now

    def apply(self, state: RouteState, *, expected: RouteState | None = None) -> RouteState:
        if expected is not None and expected != self.now:
            raise ConflictError("changed")
        for target in state.targets():
            if target.release in self.refused and state.share(target.release) > self.now.share(target.release):
                raise GateRefused(self.refused[target.release])
        self.log.append(f"weight {state.weight}" if state.canary else f"stable {state.stable.release[7]}")
        self.now = state
        return state

    def rollback(self, reason: str, *, absorb: bool = True) -> RouteState:
        if self.now.canary is not None:
            if absorb:
                self.refused[self.now.canary.release] = reason
            self.now = RouteState(self.now.stable)
            self.log.append("rollback")
        return self.now

    def refusal(self, release: str) -> str | None:
        return self.refused.get(release)

    def wait_idle(self, release: str, *, timeout_s: float) -> None:
        self.log.append(f"idle {release}")


@dataclass
class FakeClock:
    time: float = 1000.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


Figures = Callable[[str, float, float], ReleaseSamples]


def healthy(release: str, since: float, until: float) -> ReleaseSamples:
    """Twenty requests a second on each side, half of them judged well."""
    count = int(20 * (until - since))
    return samples(release, count, up=count // 2)


@dataclass
class Memory:
    """One application with a stable release and a candidate; `kill_at` dies at the n-th outside write."""

    stable: Target
    target: Target
    store: FileRolloutStore
    figures: Figures = healthy
    policy: RolloutPolicy = field(default_factory=lambda: with_limits(default_policy(), minimum_time_s=1))
    clock: FakeClock = field(default_factory=FakeClock)
    log: list[str] = field(default_factory=list)
    allowed: bool = True
    probes_pass: bool = True
    kill_at: int = -1
    writes: int = 0

    def __post_init__(self) -> None:
        self.router = MemoryRouter(RouteState(self.stable), self.log)

    def rollout(self) -> Rollout:
        return Rollout(
            self.target,
            policy=self.policy,
            router=_Dying(self, self.router),
            store=_DyingStore(self, self.store),
            source=self,
            recorder=self,
            authorize=self.authorize,
            probe=self.probe,
            clock=self.clock,
        )

    def samples(self, release: str, since: float, until: float) -> ReleaseSamples:
        return self.figures(release, since, until)

    def step(self, release: str, step: int, weight: int, verdict: Verdict, analysis: AnalysisResult | None) -> None:
        self.tick()
        self.log.append(f"step {step} {verdict}")
        self.tick()

    def failure(self, release: str, stable: str, reason: str, analysis: AnalysisResult | None) -> None:
        self.tick()
        self.log.append(f"failure {reason}")
        self.tick()

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


class _Dying:
    """A router whose writes are points at which the process may die, before and after."""

    def __init__(self, memory: Memory, router: MemoryRouter) -> None:
        self._memory, self._router = memory, router

    def state(self) -> RouteState:
        return self._router.state()

    def apply(self, state: RouteState, *, expected: RouteState | None = None) -> RouteState:
        self._memory.tick()
        self._router.apply(state, expected=expected)
        self._memory.tick()
        return state

    def rollback(self, reason: str, *, absorb: bool = True) -> RouteState:
        self._memory.tick()
        state = self._router.rollback(reason, absorb=absorb)
        self._memory.tick()
        return state

    def refusal(self, release: str) -> str | None:
        return self._router.refusal(release)

    def wait_idle(self, release: str, *, timeout_s: float) -> None:
        self._router.wait_idle(release, timeout_s=timeout_s)


class _DyingStore(FileRolloutStore):
    def __init__(self, memory: Memory, store: FileRolloutStore) -> None:
        super().__init__(store._folder)
        self._memory = memory

    def save(self, state: object) -> None:
        self._memory.tick()
        super().save(state)  # type: ignore[arg-type]


def with_limits(policy: RolloutPolicy, **changes: object) -> RolloutPolicy:
    """The policy with every step changed alike."""
    steps = tuple(step.model_copy(update=changes) for step in policy.steps)
    return policy.model_copy(update={"steps": steps, "bake_s": 1.0})


def unlike(stable: str, canary: ReleaseSamples) -> Figures:
    """Healthy figures for stable, these for everybody else."""
    return lambda release, since, until: (
        healthy(release, since, until) if release == stable else replace(canary, release=release)
    )
