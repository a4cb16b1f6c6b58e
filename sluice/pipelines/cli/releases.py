"""approve, reject, rollback: from a candidate to the champion, and back."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from sluice.infra.access import acting_as, open_authority, require
from sluice.infra.errors import SluiceError, StepFailed
from sluice.infra.settings import load_settings
from sluice.pipelines.cli.output import JsonFlag, console, show_json

if TYPE_CHECKING:
    from sluice.components.changes import Change
    from sluice.pipelines.approvals import Decided
    from sluice.pipelines.runs import Run

Reason = Annotated[str, typer.Option(help="Why: kept in the ledger and shown in MLflow")]
By = Annotated[str, typer.Option("--by", help="Decide in this name instead of yours: for an administrator")]
VersionArgument = Annotated[
    str, typer.Argument(metavar="VERSION", help="Number of the version in MLflow, or `candidate`")
]


def add_to(app: typer.Typer) -> None:
    app.command("approve")(approve)
    app.command("reject")(reject)
    app.command("rollback")(rollback)


def approve(
    version: VersionArgument,
    reason: Reason = "",
    by: By = "",
    force: Annotated[
        str, typer.Option("--force", metavar="REASON", help="Release what the gate refused, under your name")
    ] = "",
    release: Annotated[bool, typer.Option(help="Start the release at once")] = True,
    policy: Annotated[str, typer.Option(help="Rollout policy: `default` or a YAML file")] = "default",
    as_json: JsonFlag = False,
) -> None:
    """Approve a candidate and release it: load, probe, canary with analysis, promotion or rollback.

    Where the gate's decision asks for two people, the first approval waits for the second, and that one releases.
    What the candidate changes beside its weights (configuration, tokenizer, chat template) is shown first.
    The gate's verdict is in the version's page. A refused candidate can only be forced where the installation allows
    it, with a name and a reason; the canary still judges it.
    """
    from sluice.components.changes import changes_against
    from sluice.components.workspace import open_workspace
    from sluice.pipelines.approvals import find_candidate, override, record
    from sluice.provenance.releases import read_state

    person = acting_as(load_settings(), "approve", f"version {version}", by)
    if force:
        require(load_settings(), "override", f"version {version}")
    workspace = open_workspace()
    found = find_candidate(workspace, version)
    champion = read_state(workspace.ledger).champion()
    changes = changes_against(workspace, found.digest, champion) if champion else ()
    if not as_json:
        _show_changes(changes)
    if force:
        override(workspace, found, person, force)
    started: list[Run] = []

    def start(decided: Decided) -> None:
        if release:
            started.append(_start_again(decided, policy))

    account = open_authority(workspace.settings).identity()
    decided = record(workspace, found, "approved", person, reason or force, start, account=account)
    if as_json:
        run = started[0].id if started else None
        shown = [change.to_json() for change in changes]
        told = {"version": found.number, "digest": found.digest, "state": decided.state, "by": person, "run": run}
        show_json({**told, "sentence": decided.sentence, "changes": shown})
        return
    console.print(f"version {found.number} approved by {escape(person)}")
    if decided.state == "half":
        console.print(f"[yellow]{escape(decided.sentence)}[/]")
    if started and (failure := failure_of(started[0])) is not None:
        raise failure


def _show_changes(changes: tuple[Change, ...]) -> None:
    """Configuration, tokenizer and template as a difference: they are read as code is."""
    from rich.syntax import Syntax

    if not changes:
        console.print("[dim]configuration, tokenizer and chat template: as the champion's[/]")
    for change in changes:
        console.print(f"[bold]{escape(change.sentence)}[/]")
        if change.lines:
            console.print(Syntax("\n".join(change.lines), "diff", background_color="default", word_wrap=True))


def reject(version: VersionArgument, reason: Reason = "", by: By = "", as_json: JsonFlag = False) -> None:
    """Reject a candidate. Only a new gate decision opens the question again."""
    from sluice.components.workspace import open_workspace
    from sluice.pipelines.approvals import find_candidate, record

    person = acting_as(load_settings(), "reject", f"version {version}", by)
    workspace = open_workspace()
    found = find_candidate(workspace, version)
    record(workspace, found, "rejected", person, reason)
    if as_json:
        show_json({"version": found.number, "digest": found.digest, "state": "rejected", "by": person})
    else:
        console.print(f"version {found.number} rejected by {escape(person)}")


def rollback(
    reason: Annotated[str, typer.Option(help="Kept in the ledger")] = "rolled back by hand", as_json: JsonFlag = False
) -> None:
    """Undo: a canary loses all users; without one, the release before the champion answers again.

    The gateway changes first and alone: no registry, no object store, no network beyond it is needed. The ledger is
    told afterwards, if it can be reached.
    """
    go_back("rollback", reason, promoted_too=True, as_json=as_json)


def go_back(verb: str, reason: str, *, promoted_too: bool, as_json: bool) -> None:
    """Ask for leave under `verb`, give all users back, and say who answers now."""
    from sluice.components.rollback import roll_back

    settings = load_settings()
    identity = require(settings, verb, reason)
    # The controller reads it from the gateway, and tells everybody in whose name its rollout ended.
    said = reason if promoted_too else f"{reason} (aborted by {identity})"
    told = roll_back(settings, said, promoted_too=promoted_too, actor=identity)
    if as_json:
        show_json(told)
        return
    console.print(f"{told['now']} answers everybody; {told['was']} lost its users.")
    for sentence in told["notes"]:
        console.print(f"[yellow]{escape(sentence)}[/]")


def _start_again(decided: Decided, policy: str) -> Run:
    """The release of this approval; started anew where it ended before its end, since a person asks for it now."""
    from dataclasses import replace

    from sluice.pipelines.approval_watch import start_release

    asked = time.time()
    settings = load_settings()
    run = start_release(settings, decided, policy)
    if run.started < asked and run.state in ("failed", "cancelled"):
        run = start_release(settings, replace(decided, approval=""), policy)
    return run


def failure_of(run: Run) -> SluiceError | None:
    """Watch a release to its end; why it did not promote."""
    from sluice.pipelines.view import follow

    try:
        ended = follow(run, console)
        if ended.value("conclude", "outcome") == "promoted":
            return None
        return StepFailed(f"The release was rolled back: {ended.tasks()['canary'].summary}")
    except SluiceError as error:
        return error
