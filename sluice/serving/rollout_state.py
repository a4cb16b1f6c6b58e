"""What a rollout remembers: enough that a killed one goes on where it was, and never further than it may."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from sluice.serving.control import Order
from sluice.serving.routes import RouteState, Target

if TYPE_CHECKING:
    from sluice.serving.analysis import AnalysisResult, Verdict

Phase = Literal[
    "probing", "shadowing", "raising", "holding", "baking", "passed", "promoted",
    "withdrawing", "withdrawn", "failing", "failed",
]  # fmt: skip
"""`raising`: about to set this step's weight. `failing`: off the routes, the failure not yet recorded. `withdrawing`:
about to leave the routes without having failed. `promoted`, `withdrawn` and `failed` are ends; only a withdrawn release
may begin again, and nothing follows `failed`."""

ENDS: tuple[Phase, ...] = ("promoted", "withdrawn", "failed")

EventKind = Literal[
    "start", "resume", "probe", "shadow", "raise", "look", "pass", "bake", "promote", "hold", "order", "rollback",
    "withdraw", "fail", "note",
]  # fmt: skip
"""`look`: what the analysis says. `hold`: why it does not go on. `order`: a person's word (`actor`). `resume`: another
controller went on. `rollback`: users are back on stable. `withdraw`, `fail`, `promote`: the ends. `note`: the rest."""


@dataclass(frozen=True)
class RolloutEvent:
    """One line of a rollout's timeline. `time` in seconds since the epoch; `weight` in percent after the event; `step`
    counts from 0; `actor` is who ordered it, empty for the controller itself; `analysis` what the event was decided on.
    """

    time: float
    kind: EventKind
    weight: int
    verdict: Verdict | None
    sentence: str
    actor: str = ""
    step: int = 0
    analysis: AnalysisResult | None = None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "analysis": self.analysis.to_json() if self.analysis else None}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RolloutEvent:
        """The inverse of `to_json`. Raises `KeyError`, `TypeError` or `ValueError` on foreign content."""
        return cls(**{**content, "analysis": _analysis(content["analysis"])})


@dataclass(frozen=True)
class RolloutState:
    """Where a rollout is. Times in seconds since the epoch by this machine's clock, durations in seconds.

    `weight` and `shadow` are the routes as this rollout last set them, in percent. `begun` is when it first asked the
    canary for users' requests: its evidence counts from there. `since` is when the running step began, and `spent_s`
    for how long a controller has watched it: what nobody watched counts neither for its minimum nor for its maximum
    time. `reason` says why it failed or was withdrawn. `obeyed` orders were carried out; `ordered` is the promotion
    that a person ordered, while it is not reached. `token` is that of the controller that wrote this.
    """

    target: Target
    stable: Target
    phase: Phase
    step: int
    weight: int
    since: float
    shadow: int = 0
    begun: float = 0.0
    spent_s: float = 0.0
    paused: bool = False
    reason: str = ""
    analysis: AnalysisResult | None = None
    obeyed: int = 0
    ordered: Order | None = None
    token: int = 0
    events: tuple[RolloutEvent, ...] = field(default=())

    @property
    def release(self) -> str:
        return self.target.release

    @property
    def ended(self) -> bool:
        """Whether nothing more happens to it by itself."""
        return self.phase in ENDS

    @property
    def goes_on(self) -> bool:
        """Whether it is continued when the release is rolled out again (a failure: told again), not begun anew."""
        return self.phase not in ("probing", "withdrawn", "promoted")

    @property
    def routes(self) -> RouteState:
        """The routes as this rollout last set them, while it has the canary's place."""
        return RouteState(self.stable, self.target, self.weight, self.shadow)

    def after(self, event: RolloutEvent, **changes: Any) -> RolloutState:
        """This state with one event more, its weight, and `changes`."""
        return replace(self, weight=event.weight, events=(*self.events, event), **changes)

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "target": vars(self.target),
            "stable": vars(self.stable),
            "analysis": self.analysis.to_json() if self.analysis else None,
            "ordered": vars(self.ordered) if self.ordered else None,
            "events": [event.to_json() for event in self.events],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RolloutState:
        """The inverse of `to_json`. Raises `KeyError`, `TypeError` or `ValueError` on foreign content."""
        fields = {
            **content,
            "target": Target.from_json(content["target"]),
            "stable": Target.from_json(content["stable"]),
            "analysis": _analysis(content["analysis"]),
            "ordered": Order(**content["ordered"]) if content["ordered"] else None,
            "events": tuple(RolloutEvent.from_json(event) for event in content["events"]),
        }
        return cls(**fields)


def _analysis(content: Mapping[str, Any] | None) -> AnalysisResult | None:
    if content is None:
        return None
    from sluice.serving.analysis import AnalysisResult

    return AnalysisResult.from_json(content)
