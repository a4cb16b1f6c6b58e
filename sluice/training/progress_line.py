"""A training run as one line of the terminal: step, loss, rate, speed, memory, time left, cost, and what went wrong.

    line = ProgressLine(report, max_steps=500, devices=8, dollars_per_hour=98.32)
    line.see(reader.new())          # an Observer of the journal: calls `report` once for each batch of lines

The text is facts with " · " between them, the most wanted first, so that a narrow terminal may wrap or cut at a fact.
"""

from __future__ import annotations

from collections.abc import Iterable

from sluice.infra.progress import Report, duration_text
from sluice.training.journal import Event, Line, StepMetrics
from sluice.training.run_figures import RunFigures, loss_text

WARNING_STEPS = 10
"""So many steps long a warning stays in the line; an error stays until the attempt after it begins."""


class ProgressLine:
    """Tells `report` how far a run is, as `figures` count it. `devices` are accelerators, or processes without any."""

    def __init__(self, report: Report, *, max_steps: int, devices: int, dollars_per_hour: float | None = None) -> None:
        self._report = report
        self.figures = RunFigures(max_steps, devices, dollars_per_hour)
        self._trouble: Event | None = None

    def see(self, lines: Iterable[Line]) -> None:
        seen = list(lines)
        self.figures.see(seen)
        for line in seen:
            if isinstance(line, Event) and line.level in ("warning", "error"):
                self._trouble = line
            elif isinstance(line, Event) and line.kind == "started":
                self._trouble = None
        if seen:
            self._report(self.figures.steps_done, self.figures.max_steps, self.text())

    def text(self) -> str:
        """The facts and, on a line of its own, the last warning or error while it is fresh."""
        figures = self.figures
        facts = _facts(figures, figures.step) if figures.step else _before_first_step(figures)
        trouble = self._trouble
        if trouble is not None and trouble.level == "warning" and figures.steps_done - trouble.step > WARNING_STEPS:
            trouble = None
        return " · ".join(facts) + (f"\n⚠ {trouble.sentence}" if trouble else "")


def _before_first_step(figures: RunFigures) -> list[str]:
    return [figures.event.sentence.rstrip(".")] if figures.event else ["starting"]


def _facts(figures: RunFigures, step: StepMetrics) -> list[str]:
    loss = f"loss {loss_text(step.loss)}"
    if figures.validation is not None:
        loss += f" (validation {loss_text(figures.validation.loss)})"
    facts = [loss]
    left, speed, dollars = figures.seconds_left, figures.tokens_per_second_per_device, figures.dollars
    if left:
        facts.append(f"{duration_text(left)} left")
    if speed is not None:
        facts.append(f"{speed:,.0f} tok/s/device")
    if step.mfu is not None:
        facts.append(f"MFU {step.mfu:.0%}")
    facts += [f"{step.memory_gib:.1f} GiB", f"lr {step.learning_rate:.1e}", f"grad {loss_text(step.grad_norm)}"]
    if dollars is not None:
        facts.append(f"${dollars:,.2f}")
    return facts
