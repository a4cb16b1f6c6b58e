"""The report of a training run: one HTML page, self-contained, made of the run's journal whenever somebody asks.

page = training_page(work_dir, recipe)        # also of a run that failed, or still runs
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from sluice.infra.page_style import page_style
from sluice.infra.progress import duration_text
from sluice.provenance.canonical import Json
from sluice.training.curves import Curves, gradient_svg, loss_svg, rate_svg, speed_svg
from sluice.training.journal import Event, Journal, Line, Sample, StepMetrics, Validation
from sluice.training.recipe import Recipe
from sluice.training.run_figures import RunFigures, loss_text, number_text

SAMPLES_SIDE_BY_SIDE = 4
CHECKPOINTS_SHOWN = 20
EVENTS_SHOWN = 100
_ROUTINE = ("checkpoint", "uploaded")
"""Listed under checkpoints, not among the events, unless something was wrong."""
_STATES = ("started", "paused", "interrupted", "stopped", "failed", "finished")
"""The last of these says how a run stands."""


@dataclass(frozen=True)
class Outcome:
    """How the run stands, in a word, a sentence, and the page's colours."""

    word: str
    sentence: str
    tone: str
    mark: str


def training_page(folder: Path, recipe: Recipe, *, dollars_per_hour: float | None = None, outcome: str = "") -> str:
    """The page's HTML for the run in the work folder `folder`.

    `dollars_per_hour` is the price of all nodes together. `outcome` says why it ended, where the journal does not.
    """
    import jinja2
    from markupsafe import Markup

    journal = Journal(folder)
    lines, steps = journal.read(StepMetrics), journal.steps()
    validations, samples, events = journal.read(Validation), journal.read(Sample), journal.read(Event)
    figures = RunFigures(recipe.schedule.max_steps, recipe.parallelism.world_size, dollars_per_hour)
    told: list[Line] = [*lines, *validations, *samples, *events]
    figures.see(sorted(told, key=lambda line: line.time))
    by_step = {one.step: one for one in validations}
    validations = [by_step[step] for step in sorted(by_step)]
    kept = {id(one) for one in steps}
    values = {one.step: one.loss for one in steps}
    curves = Curves(
        steps,
        validations,
        [one for one in lines if id(one) not in kept and not _same(one.loss, values[one.step])],
        [one.step for one in events if one.kind == "resumed"],
        [one.step for one in events if one.kind == "guard" and one.level != "info"],
    )
    noted = [one for one in events if one.kind not in _ROUTINE or one.level != "info"]
    checkpoints = _checkpoints(events, steps, validations)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((files("sluice.training") / "report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        style=Markup(page_style()),
        recipe=recipe,
        method=_method(recipe),
        outcome=_outcome(events, figures, outcome),
        times=_times(lines, events, figures),
        tiles=_tiles(steps, validations, figures),
        # Our own drawings of numbers.
        curves=[(kind, Markup(svg)) for kind, svg in _drawings(curves)] if steps else [],
        legend=_legend(curves),
        samples=_samples(samples),
        events=[_event(one) for one in _worth_most(noted)],
        events_left=max(0, len(noted) - EVENTS_SHOWN),
        checkpoints=checkpoints[-CHECKPOINTS_SHOWN:],
        checkpoints_left=max(0, len(checkpoints) - CHECKPOINTS_SHOWN),
        sections=_sections(recipe),
        hardware=_hardware(folder),
        digest=recipe.digest,
    )


def _outcome(events: Sequence[Event], figures: RunFigures, given: str) -> Outcome:
    last = next((one for one in reversed(events) if one.kind in _STATES), None)
    kind = last.kind if last else "started"
    done = f"{figures.steps_done:,} of {figures.max_steps:,} steps"
    if kind == "finished" and not given:
        return Outcome("finished", last.sentence if last else done, "pass", "✓")
    if kind == "interrupted" or (kind in ("paused", "started") and not given):
        words = last.sentence if last and kind != "started" else f"{done} so far."
        return Outcome("under way" if kind == "started" else kind, words, "inconclusive", "…")
    words = given.removeprefix("Training failed: ") or (last.sentence if last else "")
    return Outcome(
        "stopped" if kind == "stopped" else "failed", f"{words[:1].upper()}{words[1:]} {done} were done.", "fail", "✕"
    )


def _times(lines: Sequence[StepMetrics], events: Sequence[Event], figures: RunFigures) -> str:
    moments = [one.time for one in lines] + [one.time for one in events]
    if not moments:
        return ""
    attempts = f"{figures.attempts} attempts" if figures.attempts > 1 else "one attempt"
    return f"{_utc(min(moments))} to {_utc(max(moments))} UTC, {attempts}, {duration_text(figures.paid_s)} of training."


def _tiles(
    steps: Sequence[StepMetrics], validations: Sequence[Validation], figures: RunFigures
) -> list[tuple[str, str, str]]:
    tiles = [("Steps", f"{figures.steps_done:,}", f"of {figures.max_steps:,}")]
    if steps:
        tiles.append(("Loss", loss_text(steps[-1].loss), f"{loss_text(steps[0].loss)} at step {steps[0].step}"))
    finite = [one for one in validations if math.isfinite(one.loss)]
    if finite:
        best = min(finite, key=lambda one: one.loss)
        lowest = f"lowest {loss_text(best.loss)} at step {best.step}"
        tiles.append(("Validation loss", loss_text(validations[-1].loss), lowest))
    speed = figures.tokens_per_second_per_device
    if speed is not None and steps:
        total = sum(one.tokens for one in steps)
        tiles.append(("Tokens a second", f"{speed:,.0f}", f"a device, at the end; {_count(total)} tokens in all"))
        rates = [one.mfu for one in steps if one.mfu is not None]
        if rates:
            tiles.append(("MFU", f"{rates[-1]:.0%}", f"highest {max(rates):.0%}"))
        tiles.append(("Memory", f"{max(one.memory_gib for one in steps):.1f} GiB", "peak of the fullest device"))
    tiles.append(("Time", duration_text(figures.paid_s), f"of {figures.devices} processes"))
    if figures.dollars is not None:
        tiles.append(("Cost", f"${figures.dollars:,.2f}", f"at ${figures.dollars_per_hour:,.2f} an hour"))
    return tiles


def _drawings(curves: Curves) -> list[tuple[str, str]]:
    """SVG by its place on the page. The loss is drawn twice: on a narrow screen nobody could read the wide one."""
    small = [("small", draw(curves)) for draw in (rate_svg, gradient_svg, speed_svg)]
    return [("wide", loss_svg(curves)), ("narrow", loss_svg(curves, narrow=True)), *small]


def _legend(curves: Curves) -> list[tuple[str, str]]:
    found = []
    if curves.attempts:
        found.append(("┆", "resumed or restarted here"))
    if curves.guards:
        found.append(("▲", "a guard acted"))
    if any(not math.isfinite(value) for one in curves.steps for value in (one.loss, one.grad_norm)):
        found.append(("✕", "not a finite number"))
    return found


def _samples(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    by_prompt: dict[int, dict[int, Sample]] = defaultdict(dict)
    for one in samples:
        by_prompt[one.number][one.step] = one
    found = []
    for _, answers in sorted(by_prompt.items()):
        steps = sorted(answers)
        last = len(steps) - 1
        picked = {steps[round(n * last / (SAMPLES_SIDE_BY_SIDE - 1))] for n in range(SAMPLES_SIDE_BY_SIDE)}
        found.append(
            {
                "prompt": answers[steps[-1]].prompt,
                "reference": answers[steps[-1]].reference,
                "shown": [(step, answers[step].text) for step in sorted(picked)],
                "others": [(step, answers[step].text) for step in steps] if len(steps) > len(picked) else [],
            }
        )
    return found


def _worth_most(events: Sequence[Event]) -> list[Event]:
    """All, or when there are too many, the warnings and errors first; in order."""
    ranked = sorted(range(len(events)), key=lambda n: (events[n].level == "info", -n))
    return [events[n] for n in sorted(ranked[:EVENTS_SHOWN])]


def _event(one: Event) -> dict[str, Json]:
    return {"time": _utc(one.time), "step": one.step, "level": one.level, "sentence": one.sentence}


def _checkpoints(
    events: Sequence[Event], steps: Sequence[StepMetrics], validations: Sequence[Validation]
) -> list[dict[str, Json]]:
    """One row a step that was saved, or should have been; the state is the last word about it."""
    losses = {one.step: one.loss for one in steps}
    checked = {one.step: one.loss for one in validations}
    rows: dict[int, dict[str, Json]] = {}
    for one in events:
        if one.kind not in ("checkpoint", "checkpoint_failed", "checkpoint_damaged", "uploaded", "upload_failed"):
            continue
        row = rows.setdefault(one.step, {"step": one.step, "level": "info", "state": "", "time": _utc(one.time)})
        row["level"] = one.level
        row["state"] = f"{row['state']} {one.sentence}".strip() if one.kind.startswith("upload") else one.sentence
        row["loss"] = loss_text(losses[one.step]) if one.step in losses else ""
        row["validation"] = loss_text(checked[one.step]) if one.step in checked else ""
    return [rows[step] for step in sorted(rows)]


def _sections(recipe: Recipe) -> list[tuple[str, list[tuple[str, str]]]]:
    values = recipe.to_json()
    plain = {name: value for name, value in values.items() if not isinstance(value, dict)}
    sections = {"": plain, **{name: value for name, value in values.items() if isinstance(value, dict)}}
    if recipe.method == "full":
        sections.pop("lora", None)
    return [
        (section.replace("_", " "), [(name.replace("_", " "), text) for name, text in _entries(entries)])
        for section, entries in sections.items()
    ]


def _entries(values: dict[str, Json], prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _entries(value, f"{prefix}{name} ")
        elif value is not None:
            found.append((f"{prefix}{name}", _value(value)))
    return found


def _value(value: Json) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number_text(value) if 0 < abs(value) < 0.001 else f"{value:g}"
    return ", ".join(map(_value, value)) if isinstance(value, list) else str(value)


def _hardware(folder: Path) -> list[tuple[str, str]]:
    try:
        described = json.loads((folder / "hardware.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [(str(name).replace("_", " "), _value(value)) for name, value in described.items()]


def _method(recipe: Recipe) -> str:
    words = {"lora": "LoRA", "dora": "DoRA", "qlora": "QLoRA", "full": "all weights"}[recipe.method]
    return words if recipe.method == "full" else f"{words} of rank {recipe.lora.rank}"


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def _count(value: int) -> str:
    for size, unit in ((1e9, " billion"), (1e6, " million")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:,}"


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
