"""What the commands print: tables for people, one JSON document on request, errors in one shape."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sluice.infra.errors import SluiceError
from sluice.infra.progress import Report, no_report

console = Console(highlight=False)
error_console = Console(stderr=True, highlight=False)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]


def show_json(value: Any) -> None:
    """One JSON document on standard output; what is not JSON is shown as its text."""
    print(json.dumps(value, indent=2, default=str, ensure_ascii=False))


def show_table(title: str, columns: list[str], rows: list[list[Any]], *, empty: str = "nothing yet") -> None:
    """A table; cells are shown as text, without markup of their own."""
    if not rows:
        console.print(f"{title}: {empty}")
        return
    table = Table(*columns, title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(escape("" if cell is None else str(cell)) for cell in row))
    console.print(table)


def show_error(error: SluiceError, *, as_json: bool) -> None:
    """A failure that we can name."""
    if as_json:
        show_json({"error": error.message, "hint": error.hint, "exit_code": error.exit_code})
        return
    error_console.print(f"[red]✘[/] {escape(error.message)}")
    if error.hint:
        error_console.print(f"  [dim]→[/] {escape(error.hint)}")


def show_unexpected(error: Exception, *, as_json: bool) -> int:
    """Wrong use of a command (exit code 2), or a defect (exit code 1; the trace is shown with SLUICE_DEBUG=1)."""
    usage = getattr(error, "format_message", None)
    if usage is not None:
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "sluice"
        if as_json:
            show_json({"error": usage(), "hint": f"{path} --help", "exit_code": 2})
        else:
            error_console.print(f"[red]✘[/] {escape(usage())}\n  [dim]→[/] `{path} --help` explains the command.")
        return 2
    if os.environ.get("SLUICE_DEBUG"):
        traceback.print_exc(file=sys.stderr)
    message = f"{type(error).__name__}: {error}"
    if as_json:
        show_json({"error": message, "hint": "This is a defect. SLUICE_DEBUG=1 shows the stack trace.", "exit_code": 1})
    else:
        error_console.print(f"[red]✘[/] This is a defect: {escape(message)}")
        error_console.print("  [dim]→[/] Run again with SLUICE_DEBUG=1 and report the stack trace it shows.")
    return 1


@contextmanager
def progress_line(quiet: bool) -> Iterator[Report]:
    """A report that people see as one changing line on standard error."""
    if quiet or not error_console.is_terminal:
        yield no_report
        return
    with error_console.status("") as status:
        yield lambda done, total, words: status.update(f"{words} {f'{done}/{total}' if total else ''}")


def size_text(count: float) -> str:
    """A number of bytes as people read it, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
