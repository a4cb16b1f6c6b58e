"""approvals, approvals serve: who waits for a person, and what people said in MLflow."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from sluice.infra.access import require
from sluice.infra.errors import InputError
from sluice.infra.settings import load_settings
from sluice.pipelines.cli.output import JsonFlag, console, show_json, show_table
from sluice.pipelines.cli.releases import failure_of

if TYPE_CHECKING:
    from sluice.pipelines.approval_watch import Watch
    from sluice.pipelines.approvals import Decided
    from sluice.pipelines.runs import Run

approvals_app = typer.Typer(invoke_without_command=True)

Every = Annotated[str, typer.Option(metavar="TIME", help="Time between two looks: 10s, 2m")]
_LONGEST_S = 86_400.0
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def add_to(app: typer.Typer) -> None:
    app.add_typer(approvals_app, name="approvals")


@approvals_app.callback()
def approvals(
    context: typer.Context,
    watch: Annotated[bool, typer.Option("--watch", help="Go on looking, and start what people approve")] = False,
    every: Every = "10s",
    as_json: JsonFlag = False,
) -> None:
    """List candidates that wait, and take over what people said in the MLflow UI (tag `approval`, alias `approved`).

    An approval made there starts the release, as `sluice approve` does, once, however many watch. A word that cannot
    count is answered on the version's page, in the tag `approval.answer`. With --watch this goes on until Ctrl-C;
    `sluice approvals serve` does not wait for the next look: MLflow calls it.
    """
    if context.invoked_subcommand is not None:
        return
    if watch:
        _watch(seconds(every))
        return
    from sluice.components.aliases import follow_ledger
    from sluice.components.workspace import open_workspace
    from sluice.pipelines.approval_watch import start_release
    from sluice.pipelines.approvals import take_over, waiting

    workspace = open_workspace()
    started: list[Run] = []

    def start(decided: Decided) -> None:
        started.append(start_release(workspace.settings, decided))

    repaired = follow_ledger(workspace)
    taken, problems = take_over(workspace, start)
    rows = [[v.number, v.tags.get("gate", ""), s.word, s.sentence, v.url] for v, s in waiting(workspace)]
    if as_json:
        names = ("version", "gate", "approval", "sentence", "url")
        recorded = [{"version": d.version.number, "state": d.state, "by": d.approver} for d in taken]
        show_json(
            {
                "recorded": recorded,
                "problems": problems,
                "repaired": repaired,
                "waiting": [dict(zip(names, row, strict=True)) for row in rows],
            }
        )
        return
    for sentence in (*repaired, *problems):
        console.print(f"[yellow]{escape(sentence)}[/]")
    for decided in taken:
        console.print(f"version {decided.version.number} {decided.state} by {escape(decided.approver)}")
    show_table("candidates", ["version", "gate", "approval", "", "page"], rows, empty="none waits")
    failures = [failure for run in started if (failure := failure_of(run)) is not None]
    if failures:
        raise failures[0]


@approvals_app.command("serve")
def serve(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one")] = 8787,
    host: Annotated[str, typer.Option(help="Address to listen on; put a TLS proxy before any other")] = "127.0.0.1",
    register: Annotated[bool, typer.Option("--register", help="Make MLflow call us, and let it try")] = False,
    url: Annotated[str, typer.Option(help="Address by which MLflow reaches us, for --register")] = "",
    every: Every = "60s",
) -> None:
    """Wait for MLflow's webhook calls, and start what people approve there at once.

    A call must carry MLflow's signature over a fresh time (the secret is setting mlflow.webhook_secret, or
    keys/webhook.secret in the home), and is only a hint where to look. Calls can be lost, so this looks by itself too.
    """
    settings = load_settings()
    require(settings, "approvals serve", f"{host}:{port}")
    pause = seconds(every)
    from sluice.components.workspace import open_workspace
    from sluice.pipelines.approval_watch import PATH, Receiver, Watch
    from sluice.pipelines.approvals import registry_of
    from sluice.registry.webhooks import Deliveries, load_or_create_secret, register_webhook, try_webhook

    workspace = open_workspace(settings)
    secret = load_or_create_secret(settings)
    watch = Watch(workspace, _tell, every_s=pause)
    with Receiver(settings.application, Deliveries(secret), watch.look_at, host=host, port=port) as receiver:
        console.print(f"listening on http://{host}:{receiver.port}{PATH}")
        if register:
            address = url or f"http://{host}:{receiver.port}{PATH}"
            registry = registry_of(workspace)
            problem = try_webhook(registry, register_webhook(registry, settings.application, address, secret))
            said = f"[yellow]but its try failed: {escape(problem)}[/]" if problem else "and its try arrived"
            console.print(f"MLflow calls {address} from now on (within a minute, if it ran before), {said}")
        _until_interrupted(watch)


def seconds(text: str) -> float:
    """A time such as `10s`, `2m` or `90` in seconds. Raises `InputError`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    value = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 1 <= value <= _LONGEST_S:
        raise InputError(f"--every {text!r} is no time between a second and a day.", hint="Write 10s, 2m or 1h.")
    return value


def _watch(every_s: float) -> None:
    from sluice.components.workspace import open_workspace
    from sluice.pipelines.approval_watch import Watch
    from sluice.pipelines.approvals import TAKE_OVER

    workspace = open_workspace()
    require(workspace.settings, TAKE_OVER, "watch")
    console.print(f"looking every {every_s:g} s; Ctrl-C ends it (a release under way goes on)")
    _until_interrupted(Watch(workspace, _tell, every_s=every_s))


def _until_interrupted(watch: Watch) -> None:
    try:
        watch.run()
    except KeyboardInterrupt:
        console.print("ended")


def _tell(sentence: str) -> None:
    console.print(escape(sentence))
