"""A run as people see it move: the DAG with a state, a bar and a sentence for each task."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from sluice.components.task import TaskState
from sluice.infra.errors import SluiceError, StepFailed
from sluice.infra.progress import StepProgress, read_progress
from sluice.pipelines.runs import Run, cancel, finish

FACTS = " · "
"""Between the facts of a message that has several (a training's line)."""

ICONS = {
    "done": ("✔", "green"),
    "hit": ("↺", "cyan"),
    "failed": ("✘", "red"),
    "killed": ("✘", "red"),
    "waiting": ("·", "dim"),
}


def follow(run: Run, console: Console, *, title: str = "", refresh: Callable[[], RenderableType] | None = None) -> Run:
    """Show a run until it ends. Ctrl-C cancels it. Raises `StepFailed` with the real cause when it failed.

    `refresh` may add something below the DAG (the rollout's timeline, say).
    """
    label = title or run.pipeline
    try:
        if console.is_terminal:
            with Live(console=console, refresh_per_second=5, transient=True) as live:
                while run.alive:
                    live.update(Group(run_table(run, label), refresh() if refresh else Text("")))
                    time.sleep(0.2)
        else:
            _follow_plainly(run, console)
    except KeyboardInterrupt:
        cancel(run)
        console.print(f"[yellow]Run {run.id} cancelled; run it again and it goes on where it was.[/]")
        raise
    run = finish(run)
    console.print(run_table(run, label))
    if run.state != "done":
        raise outcome_error(run)
    return run


def outcome_error(run: Run) -> SluiceError:
    """The failure of a run as an error that carries the failed task's own exit code."""
    error = StepFailed(f"Run {run.id} {run.state}: {run.error}", hint=run.hint or f"`sluice logs {run.id}` shows all.")
    error.exit_code = run.exit_code or 7
    return error


def _follow_plainly(run: Run, console: Console) -> None:
    """Without a terminal: one line when a task starts, every ten seconds of a long one, and when it ends."""
    seen: dict[str, str] = {}
    spoken = time.monotonic()
    while run.alive:
        for name, state in run.tasks().items():
            if seen.get(name) != state.state:
                seen[name] = state.state
                console.print(
                    f"  {run.pipeline}/{name}: {state.state} {state.summary}".rstrip(), highlight=False, markup=False
                )
        if time.monotonic() - spoken > 10:
            spoken = time.monotonic()
            for name, progress in read_progress(run.folder).items():
                if seen.get(name) == "running":
                    done = f"{progress.completed:g}/{progress.total:g}" if progress.total else f"{progress.completed:g}"
                    said = progress.message.replace("\n", FACTS)
                    console.print(f"  {run.pipeline}/{name}: {done} {said}", highlight=False, markup=False)
        time.sleep(0.3)


def run_table(run: Run, title: str) -> RenderableType:
    """The DAG of a run: one row a task, in an order that respects what each waits for."""
    tasks, progress = run.tasks(), read_progress(run.folder)
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False, expand=False)
    table.add_column(width=2)
    table.add_column(min_width=20, no_wrap=True)
    table.add_column(min_width=8, justify="right", no_wrap=True)
    table.add_column(ratio=1)
    rows = _dag(run, tasks)
    depth: dict[str, int] = {}
    for name, after in rows:
        depth[name] = 1 + max([depth.get(other, 0) for other in after], default=-1)
        state = tasks.get(name)
        table.add_row(
            _icon(run, state),
            Text("  " * min(depth[name], 5) + name, style="bold" if state and state.state == "running" else ""),
            _elapsed(state),
            _detail(state, progress.get(name)),
        )
    ended = run.finished or time.time()
    head = Text.assemble((f"{title}  ", "bold"), (f"{run.id}  {ended - run.started:.0f} s", "dim"))
    return Group(head, table)


def _dag(run: Run, tasks: dict[str, TaskState]) -> list[tuple[str, list[str]]]:
    try:
        rows = [(row["name"], list(row["after"])) for row in json.loads((run.folder / "dag.json").read_text())]
    except (OSError, ValueError):
        rows = []
    known = {name for name, _ in rows}
    return rows + [(name, []) for name in tasks if name not in known]


def _icon(run: Run, state: TaskState | None) -> RenderableType:
    if state is None:
        return Text(*ICONS["waiting"])
    if state.state == "running":
        return Spinner("dots", style="yellow") if run.state == "running" else Text(*ICONS["killed"])
    if state.state == "done" and state.hit:
        return Text(*ICONS["hit"])
    return Text(*ICONS[state.state])


def _elapsed(state: TaskState | None) -> Text:
    if state is None:
        return Text("")
    return Text(f"{(state.finished or time.time()) - state.started:.1f} s", style="dim")


class _Message:
    """A task's own words: facts break between each other, never within; what follows on a new line is a warning."""

    def __init__(self, message: str) -> None:
        facts, _, self.trouble = message.partition("\n")
        self.facts = facts.split(FACTS)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = ""
        for fact in self.facts:
            longer = f"{line}{FACTS}{fact}" if line else fact
            if line and cell_len(longer) > options.max_width:
                yield Text(line, style="dim")
                longer = fact
            line = longer
        yield Text(line, style="dim")
        if self.trouble:
            yield Text(self.trouble, style="yellow")


def _detail(state: TaskState | None, progress: StepProgress | None) -> RenderableType:
    if state is None:
        return Text("")
    if state.state == "failed":
        return Text(state.error or "", style="red")
    if state.state == "running" and progress is not None:
        message = _Message(progress.message)
        if not progress.total:
            return message
        bar = ProgressBar(total=progress.total, completed=min(progress.completed, progress.total), width=24)
        grid = Table.grid(padding=(0, 1))
        count = Text(f"{progress.completed:g}/{progress.total:g}")
        if FACTS in progress.message:
            grid.add_row(bar, count)
            return Group(grid, message)
        grid.add_row(bar, count, message)
        return grid
    return Text(state.summary, style="dim" if state.hit else "")
