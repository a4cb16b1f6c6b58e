"""`sluice demo`: the whole loop with embedded parts, and one screen at its end."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from sluice.pipelines.cli.output import JsonFlag, console, show_json


def demo(
    plan: Annotated[str, typer.Option(help="`demo`, `tiny` (a random model, for tests) or a YAML file")] = "demo",
    as_json: JsonFlag = False,
) -> None:
    """Run the whole loop on this machine: traffic, retraining, gate, approval, canary, a drill, and its lineage.

    Everything is real: the store, the registry, the vectors, the model server, the gateway. The users are played, and
    the approval is by policy; both are named so. Run it again and nothing is computed twice.
    """
    from rich.console import Console
    from rich.markup import escape

    from sluice.components.workspace import Workspace
    from sluice.demo.assistant import Assistant
    from sluice.demo.loop import Loop
    from sluice.demo.plan import load_plan
    from sluice.demo.screen import show_result
    from sluice.infra.access import require
    from sluice.infra.settings import load_settings
    from sluice.pipelines.stack import bring_up

    chosen = load_plan(plan)
    os.environ["SLUICE_BASE_MODEL"] = chosen.base_model
    # The drill forces a refused candidate past the gate, which an installation must allow in so many words.
    os.environ["SLUICE_RELEASE__ALLOW_OVERRIDE"] = "true"
    out = Console(stderr=True, highlight=False) if as_json else console
    started = time.monotonic()
    total = 7 if chosen.drill else 5

    def heading(number: int, text: str) -> None:
        out.print(f"\n[bold]{number}/{total} {text}[/] [dim]{time.monotonic() - started:.0f} s[/]")

    heading(1, "parts: object store, MLflow, Milvus, vLLM, Envoy")
    require(load_settings(), "demo", plan)
    with progress_bar(out, "starting") as report:
        bring_up(load_settings(), report)
    workspace = Workspace(load_settings())
    loop = Loop(workspace, chosen, out, lambda text: progress_bar(out, text))
    heading(2, "index: the documents, released like a model")
    indexed = loop.reembed()
    heading(3, f"traffic: {chosen.traffic_questions} questions of played users, judged by a played reviewer")
    window = loop.traffic()
    champion, index = loop.subjects()
    heading(4, "retrain: from traces to a decided candidate")
    candidate = loop.retrain(window, "retrain", champion=champion, index=index)
    result: dict[str, Any] = {"reembed": indexed, "traffic": window, "retrain": candidate}
    if candidate["verdict"] != "pass":
        out.print(f"The gate did not pass the candidate: {escape(candidate['summary'])} The champion stays.")
    else:
        heading(5, "release: approved by policy in MLflow, canary beside the champion while users ask")
        result["release"] = loop.release(candidate, "release")
    if chosen.drill:
        heading(6, "drill: an adapter trained on shuffled labels meets the gate")
        steps = f'{{"schedule.max_steps": {chosen.drill_steps}}}'
        promoted = result.get("release", {}).get("outcome") == "promoted"
        current = str(candidate["adapter"]) if promoted else champion
        spoilt = loop.retrain(
            window, "drill-retrain", champion=current, index=index, shuffle_labels=True, overrides=steps
        )
        result["drill"] = {"retrain": spoilt}
        if spoilt["verdict"] == "pass":
            out.print("[red]The gate passed the spoilt adapter. The drill found a hole.[/]")
        else:
            result["drill"]["refusal"] = loop.refused(spoilt)
            out.print(f"  approval refused: {escape(result['drill']['refusal'])}")
            heading(7, "drill: forced past the gate, the same adapter meets the canary")
            result["drill"]["release"] = loop.release(spoilt, "drill-release", forced=True)
    assistant = Assistant(workspace)
    question = loop.open_questions()[-1]
    reply = assistant.ask(question.question, session="last", user="you")
    assistant.close()
    result["last"] = {
        "question": question.question,
        "answer": reply.text,
        "trace": reply.trace_id,
        "error": reply.error,
    }
    result["seconds"] = round(time.monotonic() - started, 1)
    if as_json:
        show_json(result)
    else:
        show_result(console, workspace, result)


@contextmanager
def progress_bar(out: Any, text: str) -> Iterator[Any]:
    """A progress report shown as one bar that goes away; without a terminal, a line every ten seconds."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    if not out.is_terminal:
        from rich.markup import escape

        spoken = [0.0]

        def say(completed: float, total: float, message: str) -> None:
            if time.monotonic() - spoken[0] > 10:
                spoken[0] = time.monotonic()
                out.print(f"  {completed:g}/{total:g} {escape(message)}" if total else f"  {escape(message)}")

        yield say
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=out, transient=True) as progress:
        task = progress.add_task(text, total=None)

        def report(completed: float, total: float, message: str) -> None:
            progress.update(task, completed=completed, total=total or None, description=message or text)

        yield report
