"""lineage, ledger: the chain behind an answer, and the history of what users got."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.tree import Tree

from sluice.pipelines.cli.output import JsonFlag, console, progress_line, show_json, show_table

NAMED_IN_JSON = 1000
"""Traces named under one artifact in JSON, unless --limit says otherwise."""


STYLES = {
    "step": "cyan",
    "trace": "green",
    "score": "green",
    "user": "green",
    "document": "green",
    "unknown": "dim",
    "entry": "yellow",
}


def add_to(app: typer.Typer) -> None:
    app.command("lineage")(lineage)
    app.command("ledger")(ledger)


def lineage(
    subject: Annotated[
        str,
        typer.Argument(help="A digest (sha256:...), a version number, an answer's trace id, user:ID or document:ID"),
    ],
    reverse: Annotated[bool, typer.Option("--reverse", help="What came of it, instead of what it came from")] = False,
    limit: Annotated[
        int | None, typer.Option(help="Show at most so many children of one node; 0 for all", show_default="6")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Also draw the graph into this file")] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make the lineage index anew first")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show what something came from: an answer to its release, data, traces, code and the people who approved it.

    With --reverse: every dataset, adapter, release and index that saw a trace, a user or a document, and whether it
    answers users now.

    Examples: [bold]sluice lineage 2[/] (version 2), [bold]sluice lineage user:anna --reverse[/]
    """
    from sluice.components.workspace import open_workspace
    from sluice.pipelines.lineage import find_lineage

    chosen = (NAMED_IN_JSON if as_json else 6) if limit is None else limit
    with progress_line(as_json) as report:
        found = find_lineage(open_workspace(), subject, reverse=reverse, limit=chosen, rebuild=rebuild, report=report)
    if html is not None:
        from sluice.provenance.lineage_page import write_page

        write_page(found.tree, html, forward=reverse, serves={one.digest: one.serves for one in found.holders})
    if as_json:
        show_json(found.to_json())
        return
    console.print(tree_of(found.tree, chosen or 10**9))
    if reverse:
        rows = [[one.kind, one.digest.removeprefix("sha256:")[:12], one.serves or "no"] for one in found.holders]
        show_table("\nartifacts that saw it", ["kind", "digest", "serves users now"], rows, empty="none")
    if html is not None:
        console.print(f"[dim]drawn in[/] {escape(str(html))}")


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
    words = [str(body[key]) for key in ("verdict", "reason") if body.get(key)]
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
    left = max(0, len(node.children) - limit) + node.more
    if left:
        tree.add(f"[dim]and {left:,} more[/]")


def _label(node: Any) -> str:
    digest = node.digest.removeprefix("sha256:")[:12] if node.digest else ""
    style = STYLES.get(node.kind, "bold")
    label = f"[{style}]{escape(node.label)}[/]"
    short = f" [dim]{digest}[/]" if digest and digest not in node.label and node.kind != "entry" else ""
    again = " [dim](shown above)[/]" if node.repeated and node.kind not in ("trace", "score") else ""
    when = f" [dim]{node.detail['finished'][:16].replace('T', ' ')}[/]" if "finished" in node.detail else ""
    return label + short + when + again
