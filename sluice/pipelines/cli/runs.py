"""run, runs, cancel, compile: pipelines from the command line."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated

import typer

from sluice.infra.access import require
from sluice.infra.errors import InputError
from sluice.infra.secrets import refuse_secrets
from sluice.infra.settings import load_settings
from sluice.pipelines.cli.output import JsonFlag, console, show_json, show_table
from sluice.provenance.canonical import Json


def add_to(app: typer.Typer) -> None:
    app.command("run")(run)
    app.command("runs")(list_runs)
    app.command("cancel")(cancel)
    app.command("compile")(compile_pipelines)


def run(
    pipeline: Annotated[str, typer.Argument(help="retrain, release or reembed")],
    param: Annotated[list[str] | None, typer.Option("--param", "-p", help="NAME=VALUE; may be given often")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Start it and return; `sluice runs` shows it.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Run a pipeline and watch it move.

    A run that broke is simply run again: finished steps are found by their keys and not computed twice. Asking for a
    pipeline that is running with the same parameters attaches to it. Ctrl-C cancels.

    Example: [bold]sluice run retrain -p recipe=demo -p 'overrides={"schedule.max_steps": 8}'[/]
    """
    from sluice.pipelines import runs as store
    from sluice.pipelines.dags import parameters_of, pipeline_function
    from sluice.pipelines.view import follow, outcome_error

    settings = load_settings()
    require(settings, "run", pipeline)
    refuse_secrets(settings, param or [])
    parameters = parse_parameters(param or [], parameters_of(pipeline_function(pipeline)))
    started = store.start_run(settings, pipeline, parameters)
    if detach:
        show_json(run_as_json(started)) if as_json else console.print(f"started {started.id}")
        return
    if not as_json:
        follow(started, console)
        return
    while started.alive:
        time.sleep(0.3)
    ended = store.finish(started)
    if ended.state != "done":
        raise outcome_error(ended)
    show_json(run_as_json(ended))


def list_runs(
    limit: Annotated[int, typer.Option(help="How many, newest first")] = 20, as_json: JsonFlag = False
) -> None:
    """List the runs of this installation, newest first."""
    from sluice.pipelines import runs as store

    found = store.list_runs(load_settings())[:limit]
    if as_json:
        show_json([run_as_json(run) for run in found])
        return
    rows = []
    for item in found:
        seconds = (item.finished or time.time()) - item.started
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(item.started))
        rows.append([item.id, item.state, when, f"{seconds:.0f} s", item.error or ""])
    show_table(
        "runs", ["run", "state", "started", "took", "cause"], rows, empty="none; `sluice run retrain` starts one"
    )


def cancel(run_id: Annotated[str, typer.Argument(metavar="RUN", help="id, its end, or `last`")]) -> None:
    """Cancel a run and end every process it started. Finished steps are kept."""
    from sluice.pipelines import runs as store

    settings = load_settings()
    require(settings, "cancel", run_id)
    found = store.find_run(settings, run_id)
    if not found.alive:
        console.print(f"{found.id} is not running ({found.state}).")
        return
    store.cancel(found)
    console.print(f"{found.id} cancelled.")


def compile_pipelines(
    out: Annotated[Path, typer.Option(help="Folder for the YAML files")] = Path("build/pipelines"),
    image: Annotated[str, typer.Option(help="Pipeline image by digest (NAME@sha256:...); a tag is refused")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Compile the three pipelines to KFP YAML for a cluster."""
    from sluice.pipelines.compiled import compile_all

    written = compile_all(out, image)
    if as_json:
        show_json([str(path) for path in written])
        return
    for path in written:
        console.print(f"wrote {path}")
    if not image:
        console.print("[yellow]Without --image NAME@sha256:... these files name no image that a cluster can pull.[/]")


def parse_parameters(given: list[str], known: dict[str, Json]) -> dict[str, Json]:
    """`NAME=VALUE` pairs as the pipeline's parameters. Raises `InputError` naming the pair and the way out."""
    parsed: dict[str, Json] = {}
    for pair in given:
        name, separator, text = pair.partition("=")
        if not separator or name not in known:
            problem = "is not NAME=VALUE" if not separator else f"names no parameter of this pipeline ({name!r})"
            raise InputError(f"--param {pair!r} {problem}.", hint=f"Parameters: {', '.join(sorted(known))}.")
        parsed[name] = _typed(name, text, known[name])
    missing = sorted(name for name, default in known.items() if default is None and name not in parsed)
    if missing:
        raise InputError(f"Parameter {missing[0]!r} is required.", hint=f"Add --param {missing[0]}=VALUE.")
    return parsed


def _typed(name: str, text: str, default: Json) -> Json:
    if not isinstance(default, bool | int | float) or default is None:
        return text
    try:
        value = json.loads(text.lower() if isinstance(default, bool) else text)
    except ValueError:
        value = None
    right = isinstance(value, bool) if isinstance(default, bool) else _is_number(value, whole=isinstance(default, int))
    if not right:
        raise InputError(f"--param {name}={text!r}: expected a value like {default!r}.")
    return value


def _is_number(value: Json, *, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return math.isfinite(value)


def run_as_json(run: object) -> Json:
    """A run with its tasks, for `--json`."""
    from dataclasses import asdict

    from sluice.pipelines.runs import Run

    assert isinstance(run, Run)
    return {
        **{key: value for key, value in asdict(run).items() if key != "folder"},
        "log": str(run.log),
        "tasks": {name: asdict(state) for name, state in run.tasks().items()},
    }
