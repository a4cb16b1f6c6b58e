"""history: who was champion when, and who put it there."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from sluice.pipelines.cli.output import JsonFlag, console, show_json, show_table

if TYPE_CHECKING:
    from sluice.provenance.release_state import Reign


def add_to(app: typer.Typer) -> None:
    app.command("history")(history)


def history(
    at: Annotated[
        str, typer.Option("--at", metavar="TIME", help="Only the champion of that moment (ISO 8601, with an offset)")
    ] = "",
    as_json: JsonFlag = False,
) -> None:
    """Show who was champion when: from, until, how it came, by whom, who approved it, what the gate said.

    All of it comes from the signed ledger. MLflow adds the version's number where it answers.

    Example: [bold]sluice history --at 2026-11-21T12:00:00Z[/]
    """
    from sluice.components.workspace import open_workspace
    from sluice.pipelines.history import champions, repairs
    from sluice.provenance.canonical import short
    from sluice.provenance.times import parse_time

    moment = parse_time(at, "--at") if at else None
    workspace = open_workspace()
    found, note = champions(workspace)
    if moment is not None:
        found = [one for one in found if one.reign.covers(moment)]
    mended = repairs(workspace.settings) if moment is None else []
    if as_json:
        show_json([{**asdict(one.reign), "version": one.version} for one in found])
        return
    show_table(
        f"champion at {at}" if at else "champions, the latest first",
        ["since (UTC)", "release", "version", "how it came"],
        [[one.reign.since[:16], short(one.reign.release), one.version, _story(one.reign)] for one in reversed(found)],
        empty="there was none" if at else "none yet; `sluice up` makes the base model the first",
    )
    for line in mended:
        console.print(f"[yellow]{escape(line)}[/]")
    if note:
        console.print(f"[dim]{escape(note)}[/]")


def _story(reign: Reign) -> str:
    """How a champion came to be one, and until when it was."""
    words = [f"{reign.how} by {reign.by}"]
    if reign.verdict:
        words.append(f"gate: {reign.verdict}")
    if reign.approver:
        words.append(f"approved by {reign.approver}")
    if reign.reason:
        words.append(reign.reason)
    return "; ".join(words) + (f" (until {reign.until[:16]})" if reign.until else " (serves now)")
