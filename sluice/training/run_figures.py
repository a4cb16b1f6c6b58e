"""What a run's journal adds up to: its attempts, what they cost, how long it still takes. Pure; no torch.

Terminal line, MLflow and report take their figures from here, so that they agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

from sluice.training.journal import Event, Line, StepMetrics, Validation

WINDOW = 20
"""Steps whose median stands for "now": a validation or a slow checkpoint in between does not shake it."""


@dataclass
class RunFigures:
    """Grows with the journal. `dollars_per_hour` is the price of all nodes together, None where nobody knows it.

    `paid_s` are the seconds of all attempts, each from its launch to its last line.
    """

    max_steps: int
    devices: int
    dollars_per_hour: float | None = None
    step: StepMetrics | None = None
    validation: Validation | None = None
    event: Event | None = None
    paid_s: float = 0.0
    attempts: int = 0
    _done: int = 0
    _last_time: float | None = None
    _recent: list[StepMetrics] = field(default_factory=list)

    def see(self, lines: Iterable[Line]) -> None:
        """Lines in the order in which they were written."""
        for line in lines:
            self._count(line)
            if isinstance(line, StepMetrics):
                self.step, self._done = line, line.step
                # After a restart or on other hardware steps take another time.
                same = [one for one in self._recent if one.attempt == line.attempt]
                self._recent = [*same[1 - WINDOW :], line]
            elif isinstance(line, Validation):
                self.validation = line
            elif isinstance(line, Event):
                self.event = line
                if line.kind == "resumed":
                    self._done = line.step

    def _count(self, line: Line) -> None:
        """Time between lines is paid, but for the pause before a launch; restarts by torchrun keep their nodes."""
        kind = line.kind if isinstance(line, Event) else ""
        self.attempts += kind == "started"
        if self._last_time is not None and kind != "launched":
            self.paid_s += max(0.0, line.time - self._last_time)
        self._last_time = max(line.time, self._last_time or 0.0)

    @property
    def steps_done(self) -> int:
        """Where the run is: after a roll-back or a resume this is less than it was before."""
        return self._done

    @property
    def step_seconds(self) -> float | None:
        """Median wall time of the last steps; None before the first."""
        return median(one.seconds for one in self._recent) if self._recent else None

    @property
    def tokens_per_second_per_device(self) -> float | None:
        """Median over the last steps; tokens are all but padding."""
        return median(one.tokens_per_second for one in self._recent) / self.devices if self._recent else None

    @property
    def seconds_left(self) -> float | None:
        """Time for the steps that are left, as the last ones went; None before the first."""
        seconds = self.step_seconds
        return None if seconds is None else max(0, self.max_steps - self.steps_done) * seconds

    @property
    def dollars(self) -> float | None:
        """What all attempts cost so far."""
        return None if self.dollars_per_hour is None else self.paid_s / 3600 * self.dollars_per_hour


def number_text(value: float) -> str:
    """Four figures that people can read: 0.8312, 1.204, 3.0e-05, 41,200, not a number."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if abs(value) < 0.001 else f"{value:#.4g}"


def loss_text(value: float) -> str:
    """A loss or gradient norm: three decimals while that says something."""
    return f"{value:.3f}" if 0.001 <= abs(value) < 1000 else number_text(value)
