"""reproduce: the steps behind a version once more, and whether the bytes are the same."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from sluice.infra.access import require
from sluice.infra.settings import load_settings
from sluice.pipelines.cli.output import JsonFlag, console, progress_line, show_json, show_table

DIFFERS = 9
"""Exit code when a step gave other bytes; docs/cli.md lists them all."""


def add_to(app: typer.Typer) -> None:
    app.command("reproduce")(reproduce)


def reproduce(
    version: Annotated[str, typer.Argument(help="A version's number, or the digest of an adapter or index")],
    steps: Annotated[str, typer.Option(help="Only these steps, with commas: curate,train. All by default")] = "",
    suite: Annotated[str, typer.Option(help="Suite file of the evaluation, where it is none that Sluice brings")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Run the recorded steps behind a version again and compare: the same bytes, or the named reason why not.

    Nothing is recorded and no original is touched. Each step gets the inputs that its record names; the evaluation asks
    the adapter that was trained again, if that differs. Ends with 0 for the same bytes, with 9 for a difference.

    Examples: [bold]sluice reproduce 2[/], [bold]sluice reproduce 2 --steps curate,train[/]
    """
    from dataclasses import asdict

    from sluice.components.workspace import open_workspace
    from sluice.pipelines.reproduce import reproduce as run_again

    settings = load_settings()
    require(settings, "reproduce", version)
    workspace = open_workspace(settings)
    digest = _digest_of(workspace, version)
    wanted = [one.strip() for one in steps.split(",") if one.strip()]
    with progress_line(as_json) as report:
        found = run_again(workspace, digest, steps=wanted, suite=suite, report=report)
    if as_json:
        show_json({**asdict(found), "state": found.state})
    else:
        _show(found)
    if found.state == "differs":
        raise typer.Exit(DIFFERS)


def _digest_of(workspace: Any, version: str) -> str:
    from sluice.pipelines.approvals import registry_of
    from sluice.provenance.canonical import require_digest
    from sluice.registry.versions import get_version

    if version.isdigit():
        return get_version(registry_of(workspace), workspace.settings.application, int(version)).digest
    return require_digest(version, "VERSION")


def _show(found: Any) -> None:
    words = {"same": "same bytes", "differs": "DIFFERS", "not rerun": "not rerun"}
    rows = []
    for step in found.steps:
        outputs = ", ".join(
            f"{one.name} {one.recorded[7:19]}{'' if one.recorded == one.rerun else f' → {one.rerun[7:19]}'}"
            for one in step.outputs
        )
        state = "same figures" if step.state == "same" and any(o.account for o in step.outputs) else words[step.state]
        if step.state == "same" and any(not one.account for one in step.outputs):
            state = "same bytes"
        rows.append([step.step, state, f"{step.seconds:.1f} s" if step.seconds else "", outputs])
    show_table(f"{found.digest[7:19]}, once more", ["step", "", "took", "recorded → now"], rows)
    for step in found.steps:
        for told in (*step.reasons, *(one.note for one in step.outputs if one.note and one.note not in step.reasons)):
            console.print(f"[bold]{escape(step.step)}[/]: {escape(told)}")
        if step.state == "same" and step.changes:
            console.print(f"[bold]{escape(step.step)}[/]: the same, although {escape('; '.join(step.changes))}")
        if step.weights:
            show_table(
                f"weights of {step.step}",
                ["tensor", "largest |Δ|", "mean |Δ|", "‖Δ‖ / ‖w‖", "cosine"],
                [
                    [
                        _short_name(w.name),
                        f"{w.largest:.3g}",
                        f"{w.mean:.3g}",
                        f"{w.relative_norm:.3g}",
                        f"{w.cosine:.9f}",
                    ]
                    for w in sorted(step.weights, key=lambda one: -one.relative_norm)[:12]
                ],
            )
        if step.scores:
            show_table(
                f"scores of {step.step}",
                ["metric", "recorded", "now", "difference"],
                [[s.metric, _figure(s.recorded), _figure(s.rerun), _apart(s)] for s in step.scores],
            )
    console.print(f"[bold]{words[found.state]}[/]")


def _short_name(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(".weight")


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _apart(score: Any) -> str:
    return "" if score.recorded is None or score.rerun is None else f"{score.rerun - score.recorded:+.4f}"
