"""sweep: a few recipe values tried against each other, the worse ones stopped early."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from sluice.components.task import parse_json
from sluice.infra.access import require
from sluice.infra.secrets import refuse_secrets
from sluice.infra.settings import Settings, load_settings
from sluice.pipelines.cli.output import JsonFlag, console, show_json, show_table
from sluice.pipelines.cli.runs import parse_parameters, run_as_json
from sluice.provenance.canonical import Json, canonical_json

if TYPE_CHECKING:
    from sluice.pipelines.runs import Run
    from sluice.training.sweep import SweepPlan


def add_to(app: typer.Typer) -> None:
    app.command("sweep")(sweep)


def sweep(
    recipe: Annotated[str, typer.Argument(help="a packaged recipe, or a YAML file")],
    set_values: Annotated[
        list[str], typer.Option("--set", "-s", help="FIELD=VALUE,VALUE,...; may be given often: the grid is all pairs")
    ],
    rungs: Annotated[int, typer.Option(help="How often the worse trials are stopped before the end")] = 2,
    keep: Annotated[float, typer.Option(help="Share of the trials that goes on at each rung")] = 0.5,
    param: Annotated[
        list[str] | None,
        typer.Option("--param", "-p", help="NAME=VALUE as of `sluice run retrain` (suite, until, overrides, ...)"),
    ] = None,
    compile_to: Annotated[
        Path | None, typer.Option("--compile", help="Only write the pipeline as KFP YAML, for a cluster")
    ] = None,
    image: Annotated[str, typer.Option(help="With --compile: pipeline image by digest (NAME@sha256:...)")] = "",
    detach: Annotated[bool, typer.Option("--detach", help="Start it and return; `sluice runs` shows it.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Try a few values of a recipe against each other, and say how to go on with the best.

    All trials train on the same data to the first rung; the better share by validation loss goes on from its own
    checkpoint, the others stop (successive halving). What reaches the end is ranked by the gate's main metric on the
    dataset's validation split: the gate's holdout stays untouched. MLflow shows the trials under one run.

    A sweep that broke is simply started again: it goes on with the same data. Here trials run one after the other, on a
    cluster side by side on nodes labelled sluice.dev/pool=experiment.

    Example: [bold]sluice sweep demo -s optimizer.learning_rate=1e-3,3e-3 -s lora.rank=4,8[/]
    """
    from sluice.pipelines import runs as store
    from sluice.pipelines.view import follow, outcome_error
    from sluice.training.sweep import plan_sweep

    settings = load_settings()
    require(settings, "sweep", recipe)
    given = [*(param or []), *set_values]
    refuse_secrets(settings, given)
    common = [pair.partition("=")[2] for pair in param or [] if pair.startswith("overrides=")]
    overrides = parse_json(common[-1] if common else "", "overrides")
    path = str(Path(recipe).absolute()) if recipe.endswith((".yaml", ".yml")) else recipe
    plan = plan_sweep(path, set_values, overrides=overrides, rungs=rungs, keep=keep)
    if compile_to is not None:
        _compile(plan, compile_to, image)
        show_json(str(compile_to)) if as_json else console.print(f"wrote {escape(str(compile_to))}")
        return
    parameters = _parameters(settings, plan, [pair for pair in param or [] if not pair.startswith("overrides=")])
    if not as_json:
        _show_plan(plan)
    started = store.start_run(settings, store.SWEEP, parameters)
    if detach:
        show_json(run_as_json(started)) if as_json else console.print(f"started {started.id}")
        return
    if as_json:
        while started.alive:
            time.sleep(0.3)
        ended = store.finish(started)
        if ended.state != "done":
            raise outcome_error(ended)
        show_json({**run_as_json(ended), "chosen": ended.value("choose", "overrides"), "go_on": go_on(ended, plan)})
        return
    ended = follow(started, console)
    _show_ranking(ended, plan)


def _compile(plan: SweepPlan, path: Path, image: str) -> None:
    from sluice.pipelines.compiled import compile_pipeline, use_image

    use_image(image)
    from sluice.pipelines.sweep import sweep_pipeline

    compile_pipeline(sweep_pipeline(plan), path)


def _parameters(settings: Settings, plan: SweepPlan, given: list[str]) -> dict[str, Json]:
    """The pipeline's parameters, and the plan. The window's end is pinned, so that starting again means the same data:
    the one of the newest sweep of the same plan that did not come to its end, or now."""
    from sluice.pipelines import runs as store
    from sluice.pipelines.dags import parameters_of
    from sluice.pipelines.sweep import sweep_pipeline

    parsed = parse_parameters(given, parameters_of(sweep_pipeline(plan)))
    parameters = {**parsed, "plan": plan.to_text()}
    if "until" in parameters:
        return parameters
    for other in store.list_runs(settings):
        same = {name: value for name, value in other.parameters.items() if name != "until"} == parameters
        if other.pipeline == store.SWEEP and same:
            if other.state != "done":
                parameters["until"] = other.parameters["until"]
            break
    return {"until": datetime.now(UTC).isoformat(timespec="seconds"), **parameters}


def _show_plan(plan: SweepPlan) -> None:
    console.print(f"[bold]{len(plan.trials)} trials of {escape(plan.recipe)}[/]")
    for trial in plan.trials:
        console.print(f"  trial {trial.number}  {escape(trial.label)}")
    whole = len(plan.trials) * plan.max_steps
    judged = f"judged at steps {', '.join(map(str, plan.rungs))}; " if plan.rungs else ""
    console.print(f"[dim]{judged}{plan.steps} steps in all, of {whole} without stopping any[/]\n")


def go_on(run: Run, plan: SweepPlan) -> str:
    """The command that takes the chosen recipe through evaluation and gate. With the sweep's own window of traces its
    training is found, not repeated."""
    overrides = canonical_json(run.value("choose", "overrides")).decode()
    names = ("since", "until")
    pinned = " ".join(f"-p {name}={run.value('subjects', name)}" for name in names)
    others = [
        f"-p {name}={value}" for name, value in run.parameters.items() if name not in (*names, "plan") and value != ""
    ]
    return " ".join([f"sluice run retrain -p recipe={plan.recipe} -p 'overrides={overrides}'", pinned, *others])


def _show_ranking(run: Run, plan: SweepPlan) -> None:
    ranking, metric = run.value("choose", "ranking"), run.value("choose", "metric")
    rows = []
    for place, row in enumerate(ranking, start=1):
        score = "" if row["score"] is None else f"{row['score']:.3f}"
        loss = "" if row["validation_loss"] is None else f"{row['validation_loss']:.3f}"
        steps = f"{row['steps']}" + ("" if row["adapter"] else " (stopped)")
        rows.append([place, row["label"], score, steps, loss])
    show_table("ranking", ["", "values", str(metric), "steps", "validation loss at the last rung"], rows)
    console.print("\n[dim]Chosen on the dataset's validation split; the gate's holdout was not asked. Go on with:[/]")
    # Not wrapped: it is to be copied.
    console.print(escape(go_on(run, plan)), soft_wrap=True)
    tasks = run.tasks()
    if url := tasks["choose"].values.get("sweep_run"):
        console.print(f"[dim]MLflow:[/] {url}", soft_wrap=True)
