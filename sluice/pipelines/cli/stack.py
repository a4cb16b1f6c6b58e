"""up, down, status, logs, doctor, config: the local parts and what they need."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sluice.infra.access import require
from sluice.infra.errors import InputError, UnavailableError
from sluice.infra.settings import Settings, load_settings
from sluice.pipelines.cli.output import JsonFlag, console, show_json, show_table

config_app = typer.Typer(no_args_is_help=True, help="Look at the settings in force.")


def add_to(app: typer.Typer) -> None:
    app.command("up")(up)
    app.command("down")(down)
    app.command("status")(status)
    app.command("logs")(logs)
    app.command("doctor")(doctor)
    app.add_typer(config_app, name="config")


def up(as_json: JsonFlag = False) -> None:
    """Start the local parts: object store, MLflow, Milvus, vLLM, Envoy. Run it at any time: it mends what is not well.

    Everything binds to 127.0.0.1. Ports are chosen once and kept; addresses are in `sluice status`.
    """
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from sluice.pipelines.stack import bring_up, require_local

    settings = load_settings()
    require_local(settings)
    require(settings, "up")
    if as_json:
        show_json([_service_row(item) for item in bring_up(settings)])
        return
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as progress:
        bar = progress.add_task("starting", total=None)

        def report(completed: float, total: float, message: str) -> None:
            progress.update(bar, completed=completed, total=total or None, description=message)

        services = bring_up(settings, report)
    _show_services(services)
    _show_repairs(settings)


def down(as_json: JsonFlag = False) -> None:
    """Stop the local parts. Their state stays; `sluice up` goes on with it."""
    from sluice.pipelines.stack import require_local, take_down

    settings = load_settings()
    require_local(settings)
    require(settings, "down")
    take_down(settings)
    if as_json:
        show_json({"stopped": True})
    else:
        console.print("All local parts are stopped; their state is kept.")


def status(as_json: JsonFlag = False) -> None:
    """Show each local part: state, process, address, health."""
    from sluice.pipelines.stack import part_status

    settings = load_settings()
    services = part_status(settings)
    if as_json:
        show_json([_service_row(item) for item in services])
    else:
        _show_services(services)
        _show_repairs(settings)


def _show_repairs(settings: Settings) -> None:
    from rich.markup import escape

    from sluice.pipelines.history import repairs

    for sentence in repairs(settings)[-3:]:
        console.print(f"[yellow]{escape(sentence)}[/]")


def _service_row(item: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(item)


def _show_services(services: list[Any]) -> None:
    rows = []
    for item in services:
        row = _service_row(item)
        healthy = {True: "yes", False: "no", None: ""}[row["healthy"]]
        rows.append([row["name"], row["state"], healthy, row["pid"] or "", row["url"] or "", row["detail"] or ""])
    show_table(
        "local parts", ["part", "state", "healthy", "pid", "address", ""], rows, empty="none; `sluice up` starts them"
    )


def logs(
    name: Annotated[str, typer.Argument(help="A part (s3, mlflow, milvus, vllm, gateway) or a run (id or `last`)")],
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the last lines")] = 40,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines are added")] = False,
) -> None:
    """Show the log of a part or of a run."""
    import time
    from collections import deque

    from sluice.pipelines.runs import find_run

    settings = load_settings()
    path = settings.logs / f"{name}.log"
    if not path.is_file():
        known = sorted(item.stem for item in settings.logs.glob("*.log"))
        try:
            path = find_run(settings, name).log
        except InputError as error:
            raise InputError(
                f"NAME = {name!r} is neither a part nor a run.",
                hint=f"Parts: {', '.join(known) or 'none started yet'}.",
            ) from error
    with path.open(errors="replace") as stream:
        for line in deque(stream, maxlen=lines):
            console.out(line.rstrip("\n"), highlight=False)
        while follow:
            line = stream.readline()
            if line:
                console.out(line.rstrip("\n"), highlight=False)
            else:
                time.sleep(0.3)


def doctor(as_json: JsonFlag = False) -> None:
    """Check this machine before anything starts: Python, memory, disk, ports, binaries, packages."""
    from dataclasses import asdict

    from sluice.infra.doctor import check, inspect

    checks = check(inspect(load_settings()))
    if as_json:
        show_json([asdict(one) for one in checks])
    else:
        rows = [["✔" if c.ok else "✘", c.name, c.detail, "" if c.ok else c.way_out] for c in checks]
        show_table("doctor", ["", "check", "found", "way out"], rows)
    failed = [one.name for one in checks if not one.ok]
    if failed:
        raise UnavailableError(
            f"{len(failed)} check(s) failed: {', '.join(failed)}.", hint="The way out is beside each."
        )


@config_app.command("show")
def config_show(as_json: JsonFlag = False) -> None:
    """Show every setting with its value, its variable and its meaning. Secrets stay hidden."""
    settings = load_settings()
    if as_json:
        show_json(settings.model_dump(mode="json"))
        return
    rows = list(_settings_rows(type(settings), settings, ()))
    show_table("settings", ["setting", "value", "environment variable", "meaning"], rows)


def _settings_rows(kind: Any, values: Any, path: tuple[str, ...]) -> list[list[Any]]:
    from pydantic import BaseModel

    rows: list[list[Any]] = []
    for name, field in kind.model_fields.items():
        value = getattr(values, name)
        here = (*path, name)
        if isinstance(value, BaseModel) and not isinstance(value, Settings):
            rows += _settings_rows(type(value), value, here)
        else:
            shown = "" if value is None else value
            rows.append([".".join(here), shown, "SLUICE_" + "__".join(here).upper(), field.description or ""])
    return rows
