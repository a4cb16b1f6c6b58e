"""audit: who asked for what destroys or promotes, and whether it was allowed."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from sluice.infra.settings import load_settings
from sluice.pipelines.cli.output import JsonFlag, console, show_json, show_table


def add_to(app: typer.Typer) -> None:
    app.command("audit")(audit)


def audit(
    limit: Annotated[int, typer.Option(help="How many lines, newest last; 0 for all")] = 30, as_json: JsonFlag = False
) -> None:
    """Show who asked for what destroys or promotes: identity, verb, subject, allowed or refused, and why.

    The lines of this home, and of every home that shares the object store where it answers.
    """
    from dataclasses import asdict

    from sluice.components.workspace import open_workspace
    from sluice.infra.audit import merge, read, read_shipped, ship
    from sluice.infra.errors import UnavailableError

    settings = load_settings()
    lines, note = read(settings.home), ""
    try:
        objects = open_workspace(settings).objects
        ship(settings.home, objects)
        lines = merge(lines, read_shipped(objects))
    except UnavailableError as error:
        note = f"Only what this home knows: {error.message}"
    shown = lines[-limit:] if limit else lines
    if as_json:
        show_json([asdict(line) for line in shown])
        return
    show_table(
        "audit",
        ["time (UTC)", "who", "verb", "subject", "outcome", "why"],
        [[line.time[:19], line.identity, line.verb, line.subject, line.outcome, line.reason] for line in shown],
    )
    if note:
        console.print(f"[yellow]{escape(note)}[/]")
