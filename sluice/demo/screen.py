"""The one screen at the end: what was learnt, the gate, the rollout, the last answer's lineage, where to look."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from sluice.components.workspace import Workspace
from sluice.infra.errors import SluiceError
from sluice.pipelines.cli.chain import tree_of
from sluice.provenance.canonical import short

VERDICT_STYLE = {"pass": "green", "fail": "red", "inconclusive": "yellow", "promote": "green"}


def show_result(console: Console, workspace: Workspace, result: dict[str, Any]) -> None:
    """Print the screen from the stages' values."""
    console.print()
    console.rule("[bold]what happened")
    _learnt(console, result)
    _gate(console, "gate: candidate against champion, same held-out questions", result["retrain"])
    if "release" in result:
        _rollout(console, "rollout", result["release"])
    if "drill" in result:
        _drill(console, result["drill"])
    _last_answer(console, workspace, result["last"])
    _links(console, workspace, result)
    console.print(
        f"\n[dim]{result['seconds']:.0f} s in all. `sluice status` shows the parts, `sluice down` stops them.[/]"
    )


def _learnt(console: Console, result: dict[str, Any]) -> None:
    traffic, candidate = result["traffic"], result["retrain"]
    curated, training = candidate["curated"], candidate["training"]
    rules = ", ".join(f"{count} by {rule}" for rule, count in curated["by_rule"].items())
    console.print(
        f"[bold]learnt[/]  {traffic['traces']} traces"
        f" ({traffic['up']} thumbs up, {traffic['down']} down with a correction)"
        f" → {curated['train']} + {curated['validation']} examples ({rules})"
        f" → adapter {short(candidate['adapter'])}, {training['steps']} steps, loss {training['final_loss']:.2f},"
        f" {training['seconds']:.0f} s of training"
    )


def _gate(console: Console, title: str, candidate: dict[str, Any]) -> None:
    table = Table(
        "metric", "champion", "candidate", "difference [95% interval]", "need", "verdict",
        title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0),
    )  # fmt: skip
    for check in candidate["checks"]:
        difference, (low, high) = check["difference"], check["interval"]
        # A difference of too few items has no interval.
        shown = "none" if None in (difference, low, high) else f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"
        verdict = check["verdict"] + (" (advisory)" if check["advisory"] else "")
        style = VERDICT_STYLE.get(check["verdict"], "")
        numbers = ("" if check[side] is None else f"{check[side]:.3f}" for side in ("champion", "candidate"))
        table.add_row(check["metric"], *numbers, shown, check["need"], f"[{style}]{verdict}[/]")
    console.print()
    console.print(table)
    style = VERDICT_STYLE.get(candidate["verdict"], "")
    console.print(f"[{style}]{candidate['verdict'].upper()}[/] {escape(candidate['summary'])}")
    console.print(escape(candidate["asked"]), style="dim")


def _rollout(console: Console, title: str, release: dict[str, Any]) -> None:
    table = Table(
        "time", "weight", "", "what happened",
        title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0),
    )  # fmt: skip
    for event in release["timeline"]:
        if event["kind"] == "look":
            continue
        clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
        style = VERDICT_STYLE.get(event["verdict"] or "", "")
        table.add_row(
            clock,
            f"{event['weight']}%",
            f"[{style}]{event['kind']}[/]" if style else event["kind"],
            escape(event["sentence"]),
        )
    console.print()
    console.print(table)
    who = ", ".join(f"{count} by {short(digest)}" for digest, count in release["by_release"].items() if digest)
    console.print(
        f"{release['outcome']}; meanwhile users asked {release['asked']} questions ({who}) and saw "
        f"{release['errors']} errors"
    )


def _drill(console: Console, drill: dict[str, Any]) -> None:
    spoilt = drill["retrain"]
    _gate(console, "drill: the same, trained on shuffled labels", spoilt)
    if "refusal" in drill:
        console.print(f"approval refused: {escape(drill['refusal'])}")
    if "release" in drill:
        _rollout(console, "drill: forced past the gate", drill["release"])


def _last_answer(console: Console, workspace: Workspace, last: dict[str, Any]) -> None:
    from sluice.pipelines.lineage import find_lineage

    console.print()
    words = escape(last["answer"] or last["error"])
    console.print(Panel(f"[bold]{escape(last['question'])}[/]\n{words}", title="the last answer", title_align="left"))
    try:
        console.print(tree_of(_patiently(workspace, find_lineage, last["trace"]).tree, 4))
    except SluiceError as error:
        console.print(f"lineage: {escape(str(error))}")


def _patiently(workspace: Workspace, find: Any, trace: str) -> Any:
    """The trace was sent a moment ago: give the store some seconds to show it."""
    for attempt in range(10):
        try:
            return find(workspace, trace, limit=4)
        except SluiceError:
            if attempt == 9:
                raise
            time.sleep(0.5)
    raise AssertionError("unreachable")


def _links(console: Console, workspace: Workspace, result: dict[str, Any]) -> None:
    candidate = result["retrain"]
    rows = {
        f"version {candidate['version']} and its gate": candidate["url"],
        "gate run with the report": candidate["gate_run"],
        "training run and data card": candidate["training_run"],
    }
    if "drill" in result:
        rows["the drill's refused version"] = result["drill"]["retrain"]["url"]
    rows["traces"] = f"{workspace.settings.mlflow.tracking_uri}/#/experiments"
    console.print("\n[bold]look at it in MLflow[/]")
    for label, url in rows.items():
        # An address that is cut in two cannot be clicked.
        console.print(f"  {label:<28}{url}", soft_wrap=True)
