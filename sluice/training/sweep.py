"""A sweep: a few values of a recipe as trials, and which of them go on. Pure.

Trials are stopped early by successive halving: all train to the first rung, the share `keep` with the lowest validation
loss goes on to the next, and so on; only what is left trains to the end.
Sources: Jamieson and Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter Optimization (AISTATS 2016,
arXiv:1502.07943), Algorithm 1; the rungs as in Li et al., A System for Massively Parallel Hyperparameter Tuning (2018,
arXiv:1810.05934), but synchronous: a rung is judged when all its trials are there, so the result does not depend on
which was faster. Of n trials ceil(keep x n) go on, never fewer than one.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from sluice.infra.errors import InputError, StepFailed
from sluice.provenance.canonical import Json, canonical_json, digest_json
from sluice.training.recipe import Recipe, load_recipe

MOST_TRIALS = 32
"""Each is a few tasks of a pipeline and a training: more is another kind of search."""


@dataclass(frozen=True)
class Trial:
    """One point of the grid: the sweep's overrides and its own."""

    number: int
    overrides: Mapping[str, Json]
    label: str

    @property
    def name(self) -> str:
        return f"trial-{self.number}"

    @property
    def overrides_text(self) -> str:
        """As a pipeline parameter: JSON."""
        return canonical_json(dict(self.overrides)).decode()


@dataclass(frozen=True)
class SweepPlan:
    """Trials of a recipe, in the grid's order, and the steps at which the worse ones are stopped."""

    recipe: str
    trials: tuple[Trial, ...]
    rungs: tuple[int, ...]
    keep: float
    max_steps: int

    @property
    def digest(self) -> str:
        return digest_json(json.loads(self.to_text()))

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole sweep, when nothing was trained before."""
        total, alive, done = 0, len(self.trials), 0
        for rung in (*self.rungs, self.max_steps):
            total += alive * (rung - done)
            alive, done = kept(alive, self.keep), rung
        return total

    def to_text(self) -> str:
        """The plan as JSON text, the same for equal plans."""
        return canonical_json({**asdict(self), "trials": [asdict(trial) for trial in self.trials]}).decode()

    @classmethod
    def from_text(cls, text: str) -> SweepPlan:
        """The plan in a text of `to_text`."""
        values = json.loads(text)
        trials = tuple(Trial(**trial) for trial in values.pop("trials"))
        return cls(**values | {"trials": trials, "rungs": tuple(values["rungs"])})


def plan_sweep(
    recipe: str, given: Sequence[str], *, overrides: Mapping[str, Json] | None = None, rungs: int = 2, keep: float = 0.5
) -> SweepPlan:
    """The grid of `FIELD=VALUE,VALUE,...` over a recipe. Raises `InputError` naming what is wrong."""
    if not 0 < keep < 1:
        raise InputError(f"--keep {keep} must be between 0 and 1.", hint="0.5 stops half of the trials at each rung.")
    if rungs < 0:
        raise InputError(f"--rungs {rungs} must not be negative.", hint="0 trains every trial to the end.")
    axes = dict(_parse_axis(text) for text in given)
    if len(axes) < len(given):
        raise InputError(f"-s names a field twice: {', '.join(given)}.", hint="Give all its values in one -s.")
    common, base = dict(overrides or {}), load_recipe(recipe)
    if both := sorted(axes.keys() & common.keys()):
        raise InputError(f"{both[0]} is both swept and set by -p.")
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if not 2 <= len(points) <= MOST_TRIALS:
        raise InputError(
            f"The grid has {len(points)} trial{'s' * (len(points) != 1)}; a sweep has 2 to {MOST_TRIALS}.",
            hint="For example -s optimizer.learning_rate=1e-3,3e-3 -s lora.rank=4,8",
        )
    chosen: dict[str, tuple[Trial, Recipe]] = {}
    for number, point in enumerate(points, start=1):
        trial = Trial(number, common | point, " ".join(f"{_short(name, axes)}={_text(point[name])}" for name in axes))
        made = base.with_overrides(trial.overrides)
        if made.digest in chosen:
            raise InputError(f"The trials {chosen[made.digest][0].label!r} and {trial.label!r} are the same recipe.")
        chosen[made.digest] = (trial, made)
    lengths = {made.schedule.max_steps for _, made in chosen.values()}
    if len(lengths) > 1:
        raise InputError("Trials of different schedule.max_steps cannot be compared at a rung.", hint="Sweep another.")
    (max_steps,) = lengths
    return SweepPlan(
        recipe, tuple(trial for trial, _ in chosen.values()), rung_steps(max_steps, rungs, keep), keep, max_steps
    )


def rung_steps(max_steps: int, rungs: int, keep: float) -> tuple[int, ...]:
    """max_steps x keep^rungs, ..., max_steps x keep, without the end; fewer when steps are too few to tell apart."""
    steps = {max(1, round(max_steps * keep ** (rungs - number))) for number in range(rungs)}
    return tuple(sorted(step for step in steps if step < max_steps))


def kept(trials: int, keep: float) -> int:
    """How many of so many trials go on."""
    # 0.1 x 30 is a little more than 3 in floating point.
    return max(1, min(trials, math.ceil(keep * trials - 1e-9)))


def survivors(losses: Mapping[int, float | None], keep: float) -> tuple[int, ...]:
    """The numbers of the trials that go on, lowest loss first; of equal ones the earlier in the grid.

    A loss that is missing or not finite never goes on. Raises `StepFailed` when there is no other.
    """
    finite = {number: loss for number, loss in losses.items() if loss is not None and math.isfinite(loss)}
    if not finite:
        raise StepFailed(
            "No trial of the sweep has a validation loss that is a number.",
            hint="Lower optimizer.learning_rate, or see that the dataset has a validation split.",
        )
    ranked = sorted(finite, key=lambda number: (finite[number], number))
    return tuple(ranked[: kept(len(losses), keep)])


def _parse_axis(text: str) -> tuple[str, list[Json]]:
    name, separator, values = text.partition("=")
    parts = _split(values)
    if not separator or not name or not all(parts):
        raise InputError(f"-s {text!r} is not FIELD=VALUE,VALUE,...", hint="For example -s lora.rank=4,8,16")
    return name, [_value(part) for part in parts]


def _split(text: str) -> list[str]:
    """At commas that are not inside brackets: a value may be a list."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _value(text: str) -> Json:
    try:
        found: Json = json.loads(text)
    except ValueError:
        return text
    return found


def _short(name: str, axes: Mapping[str, object]) -> str:
    last = name.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in axes) == 1 else name


def _text(value: Json) -> str:
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
