"""why, diff: why a step ran or was a hit, and where two runs parted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.tree import Tree

from sluice.pipelines.cli.output import JsonFlag, console, show_json

if TYPE_CHECKING:
    from sluice.pipelines.explain import TaskDifference
    from sluice.provenance.explain import Difference, Why

_SIGNS = {"added": "[green]+[/]", "removed": "[red]-[/]", "changed": "[yellow]~[/]"}
_COLOURS = {"hit": "cyan", "computed": "green", "unfinished": "yellow"}
_LONGEST = 60


def add_to(app: typer.Typer) -> None:
    app.command("why")(why)
    app.command("diff")(diff)


def why(
    step: Annotated[str, typer.Argument(metavar="STEP", help="A step or task name, RUN/TASK, or a key's digest")],
    as_json: JsonFlag = False,
) -> None:
    """Tell why a step ran or was a hit: its key, and what differs from the nearest earlier step of its name.

    Examples: [bold]sluice why train[/], [bold]sluice why last/evaluate[/], [bold]sluice why 3f2a90cc[/]
    """
    from sluice.components.workspace import open_workspace
    from sluice.pipelines.explain import explain_step

    found = explain_step(open_workspace(), step)
    if as_json:
        show_json([_why_as_json(one) for one in found])
        return
    for one in found:
        console.print(_why_tree(one))


def diff(
    run_a: Annotated[str, typer.Argument(metavar="RUN_A", help="A run: its id or the end of it, or `last`")],
    run_b: Annotated[str, typer.Argument(metavar="RUN_B", help="The run to compare with")],
    as_json: JsonFlag = False,
) -> None:
    """Name the first input that differs between two runs, in the order of the DAG, and then all others.

    What merely follows from another difference says so. `sluice runs` lists the runs.
    """
    from dataclasses import asdict

    from sluice.components.workspace import open_workspace
    from sluice.pipelines.explain import compare_runs

    found = compare_runs(open_workspace(), run_a, run_b)
    if as_json:
        show_json(asdict(found))
        return
    if not found.tasks:
        console.print(f"{found.before} and {found.after} differ in nothing: same parameters, same keys, same results.")
        return
    if found.first is not None:
        console.print(f"[bold]First difference[/]  {_place(found.first)}")
        console.print(_tree(f"[dim]{found.before} → {found.after}[/]", found.first.differences))
    root = Tree("[bold]All differences[/], in the order of the DAG", guide_style="dim")
    for one in found.tasks:
        _grow(root.add(f"[cyan]{escape(_place(one))}[/]"), one.differences)
    console.print(root)


def _place(one: TaskDifference) -> str:
    if not one.task:
        return "parameters of the run"
    return one.task if one.step in ("", one.task) else f"{one.task} (step {one.step})"


def _why_tree(one: Why) -> Tree:
    head = f"[bold]{escape(one.key.name)}[/] [{_COLOURS[one.outcome]}]{one.outcome}[/]: {escape(one.sentence)}"
    root = Tree(head, guide_style="dim")
    if one.differences and one.earlier is not None:
        finished = one.earlier.finished[:19].replace("T", " ")
        compared = root.add(f"compared with [dim]{_short(one.earlier.key_digest)}[/], finished {finished} UTC")
        _grow(compared, one.differences)
    key = root.add(f"key [dim]{_short(one.key.digest)}[/]")
    key.add(f"code [dim]{_short(one.key.code)}[/]")
    for name, value in sorted(one.key.parameters.items()):
        key.add(f"parameter {escape(name)} = {_shown(value)}")
    for name, digest in sorted(one.key.inputs.items()):
        key.add(f"input {escape(name)} [dim]{_short(digest)}[/]")
    return root


def _tree(label: str, differences: tuple[Difference, ...]) -> Tree:
    root = Tree(label, guide_style="dim")
    _grow(root, differences)
    return root


def _grow(tree: Tree, differences: tuple[Difference, ...]) -> None:
    for one in differences:
        values = _values(one)
        label = f"{_SIGNS[one.change]} {one.part} {escape(one.name)}".rstrip() + (f"  {values}" if values else "")
        if one.follows:
            label += f"  [dim](follows from {escape(one.follows)})[/]"
        branch = tree.add(label)
        if not one.follows:
            _grow(branch, one.inside)


def _values(one: Difference) -> str:
    if one.part == "file" and not isinstance(one.before or one.after, int):
        return ""  # A source file: its two digests tell nobody anything.
    unit = " bytes" if one.part == "file" else ""
    if one.change == "changed":
        return f"{_shown(one.before)}{unit} → {_shown(one.after)}{unit}"
    return f"{_shown(one.after if one.change == 'added' else one.before)}{unit}"


def _shown(value: Any) -> str:
    if isinstance(value, str) and value.startswith("sha256:"):
        return f"[dim]{_short(value)}[/]"
    text = value if isinstance(value, str) else repr(value)
    return escape(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...") or "''"


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]


def _why_as_json(one: Why) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "step": one.key.name,
        "digest": one.key.digest,
        "outcome": one.outcome,
        "sentence": one.sentence,
        "key": one.key.to_json(),
        "record": one.record.to_json() if one.record else None,
        "earlier": one.earlier.to_json() if one.earlier else None,
        "differences": [asdict(difference) for difference in one.differences],
    }
