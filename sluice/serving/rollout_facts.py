"""What people are shown of an application's rollouts: one picture of store, gateway and lease at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sluice.serving.analysis import AnalysisResult
from sluice.serving.policy import RolloutPolicy, StepPolicy
from sluice.serving.rollout_state import RolloutState
from sluice.serving.rollout_store import CoolDown
from sluice.serving.routes import RouteState


@dataclass(frozen=True)
class LeaseFacts:
    """Who moves the weights. `holder` took the lease last, `held`: it still has it; `waiting` are those next."""

    holder: str = ""
    token: int = 0
    held: bool = False
    waiting: tuple[str, ...] = ()


@dataclass(frozen=True)
class TimeLeft:
    """Of the running phase, in seconds; None where nothing limits it. `passes`: the earliest moment at which it may
    pass; `ends`: when it is over whatever the figures say."""

    passes: float | None = None
    ends: float | None = None


@dataclass(frozen=True)
class RolloutFacts:
    """`rollout` is the one under way, else the latest; `states` are all, latest change last. `policy` is the one that
    the rollout runs by. `gateway` says why the routes are not known, empty when they are; `drift` how the data plane
    differs from them. `active` counts requests by release; `slots` says of each server which adapters it holds for
    whom. `analysed` is when its figures were last looked at, `undelivered` events wait for the webhook, whose trouble
    is `webhook`. Times in seconds since the epoch."""

    application: str
    now: float
    routes: RouteState | None
    states: tuple[RolloutState, ...] = ()
    rollout: RolloutState | None = None
    policy: RolloutPolicy | None = None
    gateway: str = ""
    drift: tuple[str, ...] = ()
    active: Mapping[str, int] = field(default_factory=dict)
    slots: tuple[str, ...] = ()
    lease: LeaseFacts = LeaseFacts()
    cool_down: CoolDown | None = None
    analysed: float | None = None
    undelivered: int = 0
    webhook: str = ""

    @property
    def under_way(self) -> bool:
        return self.rollout is not None and not self.rollout.ended

    @property
    def step(self) -> StepPolicy | None:
        """The running step's policy, where both are known."""
        if self.policy is None or self.rollout is None or self.rollout.step >= len(self.policy.steps):
            return None
        return self.policy.steps[self.rollout.step]

    @property
    def spent_s(self) -> float:
        """Seconds of the running phase that a controller watched."""
        return 0.0 if self.rollout is None else self.rollout.spent_s

    def time_left(self) -> TimeLeft:
        """By the policy; nothing where it is not known."""
        if self.rollout is None or self.policy is None:
            return TimeLeft()
        phase, spent = self.rollout.phase, self.spent_s
        if phase == "holding" and self.step is not None:
            return TimeLeft(max(self.step.minimum_time_s - spent, 0), max(self.step.maximum_time_s - spent, 0))
        if phase == "shadowing" and self.policy.shadow is not None:
            return TimeLeft(None, max(self.policy.shadow.maximum_time_s - spent, 0))
        if phase == "baking":
            return TimeLeft(max(self.policy.bake_s - spent, 0), None)
        return TimeLeft()

    def samples(self) -> tuple[int, int] | None:
        """The canary's requests in the running step, and how many it needs at least; None outside of a step."""
        state = self.rollout
        if state is None or state.phase != "holding" or self.step is None or state.analysis is None:
            return None
        # Since users are asked: what was counted in the shadow before is another count.
        within = [event for event in state.events if state.begun <= event.time <= state.since]
        before = [event.analysis for event in within if event.analysis is not None]
        seen = _requests(state.analysis) - (_requests(before[-1]) if before else 0)
        return max(seen, 0), self.step.minimum.requests

    def cooling_s(self) -> float:
        """Seconds in which no other rollout begins."""
        if self.cool_down is None or self.cool_down.ended_by:
            return 0.0
        return max(self.cool_down.until - self.now, 0.0)

    def to_json(self) -> dict[str, Any]:
        left, cooling = self.time_left(), self.cooling_s()
        return {
            "application": self.application,
            "time": self.now,
            "routes": self.routes.to_json() if self.routes else None,
            "gateway": self.gateway,
            "drift": list(self.drift),
            "active": dict(self.active),
            "slots": list(self.slots),
            "under_way": self.under_way,
            "rollout": self.rollout.to_json() if self.rollout else None,
            "time_left": vars(left),
            "samples": self.samples(),
            "lease": vars(self.lease),
            "cool_down": {**vars(self.cool_down), "left_s": cooling} if self.cool_down else None,
            "events": {"undelivered": self.undelivered, "trouble": self.webhook},
        }


def _requests(analysis: AnalysisResult) -> int:
    """Of the canary: each gives one value of every metric that the gateway knows, where it applies."""
    return max((one.canary_n for one in analysis.metrics), default=0)
