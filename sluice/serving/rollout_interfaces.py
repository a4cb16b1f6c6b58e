"""What a rollout needs from outside: figures, a place for facts, and time; and what it hands back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal, Protocol

from sluice.serving.analysis import AnalysisResult, ReleaseSamples, Verdict
from sluice.serving.rollout_state import RolloutEvent, RolloutState


class SampleSource(Protocol):
    """Where a rollout's figures come from."""

    def samples(self, release: str, since: float, until: float) -> ReleaseSamples:
        """What `release` did for requests begun in [since, until), epoch seconds. Raises `UnavailableError`."""


class Recorder(Protocol):
    """Where a rollout's facts are kept for good (the ledger). Each call may come twice after a crash."""

    def step(self, release: str, step: int, weight: int, verdict: Verdict, analysis: AnalysisResult | None) -> None:
        """A step began (verdict inconclusive, no analysis) or ended."""

    def failure(self, release: str, stable: str, reason: str, analysis: AnalysisResult | None) -> None:
        """The release failed and everybody is back on `stable`: absorbing."""


class Clock(Protocol):
    """Time, so that tests need not wait."""

    def now(self) -> float:
        """Seconds since the epoch."""

    def sleep(self, seconds: float) -> None:
        """Wait."""


class SystemClock:
    """`Clock` of this machine."""

    def now(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(frozen=True)
class RolloutResult:
    """How a rollout ended: `promote` (the caller writes the promotion, then calls `finish`) or `failed`."""

    verdict: Literal["promote", "failed"]
    sentence: str
    state: RolloutState

    @property
    def events(self) -> tuple[RolloutEvent, ...]:
        return self.state.events
