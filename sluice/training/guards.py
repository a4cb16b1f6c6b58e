"""Guards of a training run: what a step's loss and gradient norm, and a validation's loss, mean for going on.

    guards = Guards(recipe.guards, checkpoint_details["guards"], RollBacks(work_dir))
    verdict = guards.observe(step, loss, grad_norm)        # before the optimizer's update of that step
    verdict.action                                         # go, warn, skip, roll_back or stop
    details["guards"] = guards.state()                     # after the step; restored, decides as if never interrupted

Pure: equal inputs give equal verdicts, so processes that all see the reduced loss and norm need not agree on anything.

Statistics are those of the last `window` accepted steps: a step that was skipped or rolled back leaves no trace. The
median and the median absolute deviation (MAD) are used because one wild step does not move them (Huber, Robust
Statistics, 1981). The corridor is that of the lowest median so far, not of the latest: in the window's own terms a loss
that climbs a little each step takes its median and its deviation along and never leaves.

Measured with the default policies on simulated runs of 500 steps (tests/training/test_guards.py: decays with warm-up,
global batches of 4 to 64 rows with log-normal losses, in two of three runs a few rows up to 6 times as hard): in 200
runs no false alarm of the spike guard, and 4 runs with one of the corridor. Of 100 runs each, a gradient norm of 50
times its value was seen at once in 96, of 100 times in 100; a loss that stays at 3, 4 or 6 times its value was seen
within 50 steps in 86, 98 and 100. A spike factor of 10 gave 3 false alarms in 400 runs, one of 5 gave them in 66.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from sluice.provenance.canonical import Json
from sluice.training.recipe_sections import CorridorGuard, GuardSection, NotFiniteGuard, SpikeGuard
from sluice.training.roll_backs import RollBacks

Action = Literal["go", "warn", "skip", "roll_back", "stop"]
SEVERITY: tuple[Action, ...] = ("go", "warn", "skip", "roll_back", "stop")

ENOUGH = 20
"""Steps before a median and a deviation are worth judging by: with 20 the MAD of normal noise is good to about 25%."""

RELATIVE_FLOOR, ABSOLUTE_FLOOR = 0.02, 0.01
"""The least deviation the corridor reckons with: 2% of the median, and 0.01 nats. Large batches, or a model that knows
its examples by heart, have deviations near zero, and any change would be many of them."""


@dataclass(frozen=True)
class Verdict:
    """What to do after a step, which guard says so, and the sentence for log and journal ("" when there is nothing).

    `dropped`, with `roll_back` only: steps whose updates are left out from now on. The checkpoint to go back to must be
    older than the first of them.
    """

    action: Action = "go"
    guard: str = ""
    sentence: str = ""
    dropped: tuple[int, ...] = ()


class RollBack(Exception):
    """Go on from the last good checkpoint, without the updates that this verdict drops."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.sentence)
        self.verdict = verdict


class Stop(Exception):
    """End the run after `step`: a guard said so. Where it was the validation loss, what was trained is exported."""

    def __init__(self, verdict: Verdict, step: int, *, validation_loss: float | None = None) -> None:
        super().__init__(verdict.sentence)
        self.step, self.validation_loss = step, validation_loss


class Guards:
    """The guards of one run in one process. `state` is what `state()` gave when the checkpoint was made."""

    def __init__(self, section: GuardSection, state: Json = None, roll_backs: RollBacks | None = None) -> None:
        state = state or {}
        self._section = section
        self._roll_backs = roll_backs or RollBacks()
        self._losses = deque[float](state.get("losses", ()), maxlen=section.loss_corridor.window)
        self._norms = deque[float](state.get("norms", ()), maxlen=section.gradient_spike.window)
        # Median and deviation of the window with the lowest median so far, and the step it ended with.
        self._corridor: list[float] | None = state.get("corridor")
        # How many steps in a row each guard has spoken.
        self._rows: dict[str, int] = dict(state.get("rows", {}))
        self._best: list[float] | None = state.get("best")
        self._not_better = int(state.get("not_better", 0))

    def state(self) -> Json:
        """A few hundred numbers at most, all finite."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "corridor": self._corridor,
            "rows": dict(self._rows),
            "best": self._best,
            "not_better": self._not_better,
        }

    def observe(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """Judge a step (from 1) by its loss (nats per token) and gradient norm (before clipping), both over all
        processes. Where several guards speak, the gravest action counts."""
        if (why := self._roll_backs.dropped(step)) is not None:
            return Verdict("skip", "rolled_back", f"Step {step} is left out: the run went back because of it. {why}")
        verdicts = self._judge(step, loss, grad_norm)
        verdict = max(verdicts, key=lambda one: SEVERITY.index(one.action), default=self._first_words(step))
        spoke = {one.guard for one in verdicts}
        self._rows = {guard: row for guard, row in self._rows.items() if guard in spoke}
        if verdict.action in ("go", "warn"):
            self._accept(step, loss, grad_norm)
        return verdict

    def observe_validation(self, step: int, loss: float) -> Verdict:
        """Judge a validation loss. One that is not a finite number is no improvement, whatever came before."""
        section = self._section.validation_loss
        if math.isfinite(loss) and (self._best is None or loss < self._best[0] - section.minimum_change):
            self._best, self._not_better = [loss, step], 0
            return Verdict()
        self._not_better += 1
        if section.policy == "off" or self._not_better < section.patience:
            return Verdict()
        if section.policy == "warn" and self._not_better % section.patience:
            return Verdict()
        best = f"{self._best[0]:.4f} of step {self._best[1]:.0f}" if self._best else "any finite number"
        change = f" by more than {section.minimum_change:g}" if section.minimum_change else ""
        done = {
            "warn": "training goes on; the model may be learning its examples by heart",
            "stop": "training stops here; set schedule.result to best for the weights of the best step",
        }[section.policy]
        return Verdict(
            section.policy,
            "validation_loss",
            f"Step {step}: validation loss {loss:.4f}; the last {self._not_better} (limit {section.patience}) were not "
            f"lower than {best}{change}: {done}.",
        )

    def _judge(self, step: int, loss: float, grad_norm: float) -> list[Verdict]:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {grad_norm}"
            return [self._verdict(step, "not_finite", self._section.not_finite, f"{what} is not a finite number")]
        verdicts = []
        spike, corridor = self._section.gradient_spike, self._section.loss_corridor
        if spike.policy != "off" and len(self._norms) >= min(ENOUGH, spike.window):
            middle = median(self._norms)
            # A median of zero (nothing was trained yet) gives no scale to judge by.
            if middle > 0 and grad_norm > (limit := spike.factor * middle):
                finding = (
                    f"gradient norm {grad_norm:.4g} exceeds {limit:.4g} = {spike.factor:g} x {middle:.4g}, the median "
                    f"of {len(self._norms)} steps"
                )
                verdicts.append(self._verdict(step, "gradient_spike", spike, finding))
        if corridor.policy != "off" and self._corridor:
            middle, deviation, until = self._corridor
            if loss > (limit := middle + corridor.width * deviation):
                finding = (
                    f"loss {loss:.4f} is above the corridor's {limit:.4f} = median {middle:.4f} + {corridor.width:g} x "
                    f"deviation {deviation:.4f} of the steps up to {until:.0f}"
                )
                verdicts.append(self._verdict(step, "loss_corridor", corridor, finding))
        return verdicts

    def _verdict(
        self, step: int, guard: str, section: NotFiniteGuard | SpikeGuard | CorridorGuard, finding: str
    ) -> Verdict:
        """The guard's policy, or stop once its limit is reached."""
        policy: Action = "go" if section.policy == "off" else section.policy
        row = self._rows[guard] = self._rows.get(guard, 0) + 1
        times = self._roll_backs.count(guard) + 1
        told = f"Step {step}: {finding}"
        end = ""
        if policy == "roll_back" and times >= section.limit:
            end = f"this would be roll-back {times} (limit {section.limit})"
        elif row >= section.limit and not (guard == "loss_corridor" and policy == "warn"):
            end = f"it is number {row} in a row (limit {section.limit})"
        elif policy == "stop":
            end = "the recipe says so"
        if end:
            return Verdict("stop", guard, f"{told}: training stops, because {end}. {_look_at(step, row)}")
        if policy == "roll_back":
            # What a step shows was made by its own rows, or by the weights that the update before it left. A replay
            # without both is the only one that cannot end here again.
            dropped = (step - 1, step) if step > 1 else (step,)
            return Verdict(
                policy,
                guard,
                f"{told}: going back to the last checkpoint before step {dropped[0]} and on without the updates of "
                f"steps {' and '.join(map(str, dropped))} (roll-back {times}, stop at {section.limit}).",
                dropped,
            )
        if policy == "skip":
            return Verdict(policy, guard, f"{told}: this update is skipped ({row} in a row, stop at {section.limit}).")
        if policy == "warn" and row % ENOUGH == 1:
            return Verdict(policy, guard, f"{told}: training goes on, as the recipe says ({row} in a row).")
        # A warning at every step would be read by nobody.
        return Verdict("go", guard)

    def _first_words(self, step: int) -> Verdict:
        """On the first step, from when on the guards judge."""
        corridor, spike = self._section.loss_corridor, self._section.gradient_spike
        if self._losses or self._norms or (corridor.policy == "off" and spike.policy == "off"):
            return Verdict()
        needed = max(min(ENOUGH, one.window) for one in (corridor, spike) if one.policy != "off")
        return Verdict(
            sentence=f"Loss corridor and gradient spikes are judged after {needed} accepted steps: a median and a "
            f"deviation of fewer are chance. NaN and infinity are judged from step {step}."
        )

    def _accept(self, step: int, loss: float, grad_norm: float) -> None:
        self._losses.append(loss)
        self._norms.append(grad_norm)
        if len(self._losses) >= min(ENOUGH, self._section.loss_corridor.window):
            middle, deviation = _robust(self._losses)
            if self._corridor is None or middle < self._corridor[0]:
                self._corridor = [middle, deviation, step]


def _robust(values: Sequence[float]) -> tuple[float, float]:
    """Median and median absolute deviation, the latter not below the floor."""
    middle = median(values)
    deviation = median(abs(value - middle) for value in values)
    return middle, max(deviation, RELATIVE_FLOOR * abs(middle), ABSOLUTE_FLOOR)


def _look_at(step: int, row: int) -> str:
    steps = f"step {step}" if row == 1 else f"steps {step - row + 1} to {step}"
    return (
        f"Look at the rows of {steps} and the step before; if they are sound, lower optimizer.learning_rate or raise "
        "optimizer.warmup_steps."
    )
