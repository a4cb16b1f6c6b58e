"""What a rollout needs from outside: figures, a place for facts, time and listeners; and what it hands back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from sluice.serving.control import Order
from sluice.serving.rollout_state import RolloutEvent, RolloutState

if TYPE_CHECKING:
    from sluice.serving.analysis import AnalysisResult, Verdict


class Recorder(Protocol):
    """Where a rollout's facts are kept for good (the ledger). Each call may come twice after a crash, may hang, and may
    raise `UnavailableError`: it is then made again. `step` raises `GateRefused` when the facts forbid the step."""

    def step(
        self,
        release: str,
        step: int,
        weight: int,
        verdict: Verdict,
        analysis: AnalysisResult | None,
        ordered: Order | None = None,
    ) -> None:
        """A step is about to begin (verdict inconclusive, no analysis) or has ended; `ordered`: because a person said
        so before the figures did."""

    def failure(self, release: str, stable: str, reason: str, analysis: AnalysisResult | None) -> None:
        """The release failed and everybody is back on `stable`: absorbing."""

    def withdrawal(self, release: str, stable: str, reason: str) -> None:
        """Everybody is back on `stable` without the release having failed: it needs a new approval."""


class EventSink(Protocol):
    """Who wants to know. Each event comes after it was saved; after a crash the last one may come again."""

    def emit(self, event: RolloutEvent, state: RolloutState) -> None:
        """Take the event and return at once: what is slow about telling it happens elsewhere. Never raises."""


class Clock(Protocol):
    """Time, so that tests need not wait."""

    def now(self) -> float:
        """Seconds since the epoch. May jump."""

    def monotonic(self) -> float:
        """Seconds since some moment. Never jumps."""

    def sleep(self, seconds: float) -> None:
        """Wait."""


class SystemClock:
    """`Clock` of this machine."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(frozen=True)
class RolloutResult:
    """How a rollout ended: `promote` (the caller writes the promotion, then calls `finish`), `failed`, or
    `inconclusive` (everybody is back on stable, and the release may be tried again after a new approval)."""

    verdict: Literal["promote", "failed", "inconclusive"]
    sentence: str
    state: RolloutState

    @property
    def events(self) -> tuple[RolloutEvent, ...]:
        return self.state.events
