"""A rollout on a terminal: who answers whom, where it stands, how every metric looks. Colour is never the only sign.

metric           n       difference                 better ←   → worse            verdict
error rate       7 / 16  +1.2 pts  -3.0 to +5.1    ──●──│──    ┆           ║     ? inconclusive
"""

from __future__ import annotations

import time

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from sluice.infra.progress import duration_text
from sluice.serving.analysis import AnalysisResult, MetricResult
from sluice.serving.interval_scale import SAME, difference_text, interval_text, place_of
from sluice.serving.rollout_facts import RolloutFacts
from sluice.serving.rollout_state import RolloutEvent, RolloutState

MARKS = {"pass": ("✓", "green"), "fail": ("✕", "red"), "inconclusive": ("?", "yellow")}
PHASES = {
    "probing": "probed before any user sees it", "shadowing": "asked what stable is asked; nobody sees its answers",
    "raising": "about to get its next share", "holding": "compared with stable at this share",
    "baking": "passed all steps; compared for some time more", "passed": "about to become stable",
    "promoted": "it answers everybody", "withdrawing": "about to leave, without having failed",
    "withdrawn": "it left without having failed: after a new approval it may begin again",
    "failing": "everybody is back on stable; about to be recorded",
    "failed": "everybody is back on stable, and it may not rise again",
}  # fmt: skip
PAUSED = "paused: it keeps this share, is compared with stable, and is rolled back if it fails"
LEGEND = "│ as stable   ┆ fails when all is right of it   ║ passes when all is left of it   ( ) shown, not deciding"
SHORT_LEGEND = "│ as stable  ┆ fails right of it  ║ passes left of it  ( ) not deciding"
_NARROW, _WIDE = 116, 160
_EVENTS = 6


class RolloutView:
    """Rendered for the width it gets; `events` is how many of the last events are shown, 0 for all."""

    def __init__(self, facts: RolloutFacts, *, events: int = _EVENTS) -> None:
        self._facts = facts
        self._events = events

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        yield self._answering(width)
        state = self._facts.rollout
        if state is None:
            yield Text("\nNo rollout yet: `sluice approve VERSION` starts one.")
        else:
            yield Text("")
            yield from self._standing(state)
            if state.analysis is not None and state.analysis.metrics:
                yield Text("")
                yield metrics_table(state.analysis, width)
            yield Text("")
            yield self._told(state)
        yield from self._notes()

    def _answering(self, width: int) -> RenderableType:
        """Who answers whom: a bar for each release."""
        routes = self._facts.routes
        if routes is None:
            return Text(f"The gateway does not say who answers: {self._facts.gateway}", style="yellow")
        table = Table.grid(padding=(0, 2))
        bar = max(width - 60, 12)
        for one in routes.targets():
            share, role = routes.share(one.release), "stable" if one is routes.stable else "canary"
            style = "cyan" if role == "stable" else "magenta"
            asked = f"asked in {routes.shadow}% of the shadow" if role == "canary" and routes.shadow else ""
            active = self._facts.active.get(one.release)
            running = "" if active is None else f"{active} running"
            table.add_row(
                Text(role, style="bold"), Text(one.served_name, overflow="ellipsis", no_wrap=True),
                Text(f"{share}%", style="bold"), _bar(share, bar, style), Text(asked or running, style="dim"),
            )  # fmt: skip
        return table

    def _standing(self, state: RolloutState) -> list[RenderableType]:
        facts = self._facts
        lines: list[RenderableType] = [
            Text.assemble("rollout of ", (state.target.served_name, "bold"), "  ", (state.phase, "bold"))
        ]
        lines.append(Text(f"       {PAUSED if state.paused else PHASES[state.phase]}"))
        if facts.policy is not None:
            lines.append(self._steps(state))
        if (samples := facts.samples()) is not None:
            seen, needed = samples
            bar = _bar(min(100 * seen // needed, 100), 24, "cyan")
            lines.append(Text.assemble("asked  ", bar, f"  {seen} requests in this step, at least {needed}"))
        if facts.under_way and (left := self._time(state)):
            lines.append(Text(left))
        if facts.under_way and not facts.lease.held:
            lines.append(Text("! No controller is at work: users stay as they are; run the release again.", "yellow"))
        if state.reason:
            failed = state.phase in ("failing", "failed")
            lines.append(Text(f"{'Why it failed' if failed else 'Why'}: {state.reason}", "red" if failed else "yellow"))
        elif state.analysis is not None and facts.under_way:
            mark, style = MARKS[state.analysis.verdict]
            lines.append(Text(f"{mark} {state.analysis.verdict}: {state.analysis.sentence}", style=style))
        return lines

    def _steps(self, state: RolloutState) -> Text:
        """`probe ✓ → shadow ✓ → 10% ✓ → [30%] → 50% → bake → 100%`."""
        policy = self._facts.policy
        assert policy is not None
        names = ["probe", *(["shadow"] if policy.shadow else []), *(f"{step.weight}%" for step in policy.steps)]
        first = len(names) - len(policy.steps)
        names += ["bake", "100%"]
        here = {
            "probing": 0, "shadowing": 1, "baking": len(names) - 2, "passed": len(names) - 1, "promoted": len(names),
        }.get(state.phase, first + state.step)  # fmt: skip
        line = Text("steps  ")
        for number, name in enumerate(names):
            if number:
                line.append(" → ", style="dim")
            if number < here:
                line.append(f"{name} ✓", style="green")
            elif number == here:
                ended = state.phase in ("failing", "failed")
                line.append(f"{name} ✕" if ended else f"[{name}]", style="bold red" if ended else "bold")
            else:
                line.append(name, style="dim")
        return line

    def _time(self, state: RolloutState) -> str:
        left = self._facts.time_left()
        parts = []
        if left.passes is not None:
            earliest = f"passes in {duration_text(left.passes)} at the earliest"
            parts.append(earliest if left.passes else "passes as soon as the figures say so")
        if left.ends is not None:
            parts.append(f"ended in {duration_text(left.ends)} if still undecided")
        return f"time   {', '.join(parts)}" if parts else ""

    def _told(self, state: RolloutState) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column()
        for event in state.events[-self._events :]:
            *cells, said = _event(event)
            if event.kind == "look" and self._events:
                # Each look says all that is missing; the latest one stands above.
                said.no_wrap, said.overflow = True, "ellipsis"
            table.add_row(*cells, said)
        return table

    def _notes(self) -> list[RenderableType]:
        facts = self._facts
        notes = [f"The gateway differs: {sentence} (`sluice release drift --repair`)" for sentence in facts.drift]
        if facts.routes is not None and facts.gateway:
            notes.append(f"The gateway does not answer: {facts.gateway}")
        if facts.cooling_s():
            assert facts.cool_down is not None
            notes.append(
                f"Cool-down: no other rollout begins for {duration_text(facts.cooling_s())} ({facts.cool_down.reason})"
            )
        if facts.lease.waiting:
            notes.append(f"Waiting for their turn: {', '.join(facts.lease.waiting)}")
        if facts.webhook:
            notes.append(f"The events' webhook: {facts.webhook}; {facts.undelivered} wait for it")
        lines: list[RenderableType] = [Text(f"! {note}", style="yellow") for note in notes]
        lines += [Text(sentence, style="dim") for sentence in facts.slots]
        return [Text(""), *lines] if lines else []


def metrics_table(analysis: AnalysisResult, width: int) -> RenderableType:
    """Each metric with its interval on the scale of `interval_scale`; narrower terminals get fewer columns."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("metric", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    if width >= _NARROW:
        table.add_column("difference", justify="right", no_wrap=True)
    plot = 28 if width < _NARROW else 34 if width < _WIDE else 48
    table.add_column(_scale(plot), no_wrap=True, width=plot)
    table.add_column("verdict", no_wrap=True)
    if width >= _WIDE:
        table.add_column("")
    for metric in analysis.metrics:
        row: list[RenderableType] = [
            Text(metric.name.replace("_", " "), style="" if metric.gating else "dim"),
            Text.assemble(f"{metric.canary_n}", (f" / {metric.stable_n}", "dim")),
        ]
        if width >= _NARROW:
            row.append(Text(f"{difference_text(metric, metric.estimate)}  {interval_text(metric)}"))
        row += [interval_line(metric, plot), _verdict(metric)]
        if width >= _WIDE:
            row.append(Text(metric.sentence, style="dim"))
        table.add_row(*row)
    return Group(table, Text(LEGEND if width >= _NARROW else SHORT_LEGEND, style="dim"))


def interval_line(metric: MetricResult, width: int) -> Text:
    """`──●──│──  ┆   ║` in so many cells; ◀ and ▶ where it goes on beyond the edge."""
    place = place_of(metric)
    cells = [(" ", "")] * width

    def column(share: float) -> int:
        return min(int(share * width), width - 1)

    cells[column(SAME)] = ("│", "dim")
    cells[column(place.fail)] = ("┆", "red")
    cells[column(place.margin)] = ("║", "green")
    style = MARKS[metric.verdict][1] if metric.gating else "dim"
    if place.low is not None and place.middle is not None and place.high is not None:
        left, right = column(place.low), column(place.high)
        for index in range(left, right + 1):
            under = cells[index][0]
            cells[index] = ({"┆": "┼", "║": "╫", "│": "┼"}.get(under, "─"), style)
        if place.cut_low:
            cells[left] = ("◀", style)
        if place.cut_high:
            cells[right] = ("▶", style)
        cells[column(place.middle)] = ("●", style)
    return Text.assemble(*cells)


def _scale(width: int) -> str:
    """The plot's heading: which way is worse."""
    return f"{'better ←':>{int(SAME * width) - 1}}   → worse"


def _verdict(metric: MetricResult) -> Text:
    mark, style = MARKS[metric.verdict]
    return (
        Text(f"{mark} {metric.verdict}", style=style)
        if metric.gating
        else Text(f"({mark} {metric.verdict})", style="dim")
    )


def event_line(event: RolloutEvent) -> Text:
    """An event as one line, where there is no terminal to draw on."""
    return Text("  ").join(_event(event))


def _event(event: RolloutEvent) -> tuple[Text, ...]:
    mark, style = MARKS[event.verdict] if event.verdict else ("·", "dim")
    who = f" ({event.actor})" if event.actor else ""
    return (
        Text(time.strftime("%H:%M:%S", time.localtime(event.time))), Text(f"{event.weight}%"),
        Text(f"{mark} {event.kind}", style=style), Text(f"{event.sentence}{who}"),
    )  # fmt: skip


def _bar(share: int, width: int, style: str) -> Text:
    filled = round(share * width / 100)
    return Text.assemble(("█" * filled, style), ("░" * (width - filled), "dim"))
