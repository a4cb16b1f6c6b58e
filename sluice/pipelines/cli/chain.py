"""lineage, ledger: the chain behind an answer, and the history of what users got."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.tree import Tree

from sluice.pipelines.cli.output import JsonFlag, console, show_json, show_table


def add_to(app: typer.Typer) -> None:
    app.command("lineage")(lineage)
    app.command("ledger")(ledger)


def lineage(
    subject: Annotated[str, typer.Argument(help="A digest (sha256:...), a version number, or an answer's trace id")],
    reverse: Annotated[bool, typer.Option("--reverse", help="What came of it, instead of what it came from")] = False,
    limit: Annotated[int, typer.Option(help="Show at most so many children of one node; 0 for all")] = 6,
    as_json: JsonFlag = False,
) -> None:
    """Show what something came from: an answer to its release, data, traces, code; or with --reverse what came of it.

    Examples: [bold]sluice lineage 2[/] (version 2), [bold]sluice lineage TRACE_ID --reverse[/]
    """
    from dataclasses import asdict

    from sluice.components.workspace import open_workspace
    from sluice.pipelines.lineage import find_lineage

    node = find_lineage(open_workspace(), subject, reverse=reverse)
    if as_json:
        show_json(asdict(node))
    else:
        console.print(tree_of(node, limit or 10**9))


def ledger(
    limit: Annotated[int, typer.Option(help="How many entries, newest last; 0 for all")] = 30, as_json: JsonFlag = False
) -> None:
    """Show the signed, hash-chained history of decisions, approvals, rollouts and promotions, verified now."""
    from sluice.components.workspace import open_workspace
    from sluice.provenance.canonical import short

    entries = open_workspace().ledger.entries()
    shown = entries[-limit:] if limit else entries
    if as_json:
        show_json(
            [
                {
                    "sequence": e.sequence,
                    "digest": e.digest,
                    "kind": e.kind,
                    "actor": e.actor,
                    "time": e.time,
                    "body": e.body,
                }
                for e in shown
            ]
        )
        return
    rows = []
    for entry in shown:
        about = entry.body.get("release") or entry.body.get("adapter")
        rows.append(
            [
                entry.sequence,
                entry.time[:19],
                entry.kind,
                short(about) if about else "",
                entry.actor,
                _words(entry.body),
            ]
        )
    show_table(
        f"ledger: {len(entries)} entries, chain and signatures verified",
        ["#", "time (UTC)", "kind", "release", "by", ""],
        rows,
    )


def _words(body: Any) -> str:
    words = [str(body[key]) for key in ("verdict", "reason", "comment") if body.get(key)]
    if "weight" in body:
        words.insert(0, f"{body['weight']:g}%")
    return ", ".join(words)


def tree_of(node: Any, limit: int) -> Tree:
    """A lineage node as a tree for the terminal."""
    root = Tree(_label(node), guide_style="dim")
    _grow(root, node, limit)
    return root


def _grow(tree: Tree, node: Any, limit: int) -> None:
    for child in node.children[:limit]:
        _grow(tree.add(_label(child)), child, limit)
    if len(node.children) > limit:
        tree.add(f"[dim]and {len(node.children) - limit} more[/]")


def _label(node: Any) -> str:
    digest = node.digest.removeprefix("sha256:")[:12] if node.digest else ""
    style = {"step": "cyan", "artifact": "bold", "trace": "green"}.get(node.kind, "")
    label = f"[{style}]{escape(node.label)}[/]" if style else escape(node.label)
    return f"{label} [dim]{digest}[/]" if digest and digest not in node.label else label
