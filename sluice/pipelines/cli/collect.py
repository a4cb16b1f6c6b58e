"""gc: what nothing needs any more, shown first and deleted only by the plan's digest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sluice.infra.access import require
from sluice.infra.settings import load_settings
from sluice.pipelines.cli.output import JsonFlag, console, progress_line, show_json, show_table, size_text

if TYPE_CHECKING:
    from sluice.provenance.collect import Plan

_DAY_S = 86400.0


def add_to(app: typer.Typer) -> None:
    app.command("gc")(gc)


def gc(
    delete: Annotated[str, typer.Option(metavar="PLAN_DIGEST", help="Delete what this plan named")] = "",
    grace_days: Annotated[float, typer.Option(help="Nothing younger goes; 7 at least")] = 7.0,
    as_json: JsonFlag = False,
) -> None:
    """Show what nothing live needs any more, and why the rest stays. Deletes nothing without --delete.

    What stays: releases that may serve (routes, champions, approved and fresh candidates), indexes in the vector
    store, holdouts, base models, runs under way, everything behind those, the evidence of all decisions, and whatever
    was written or used within the grace. Step records and signed statements always stay. The plan that is shown has a
    digest: [bold]sluice gc --delete PLAN_DIGEST[/] deletes exactly that, as far as it is still unreachable then.
    """
    from sluice.components.workspace import open_workspace
    from sluice.pipelines.collect import open_collector

    settings = load_settings()
    if delete:
        require(settings, "gc delete", delete)
    workspace = open_workspace(settings)
    collector = open_collector(workspace, grace_days * _DAY_S)
    if not delete:
        with progress_line(as_json) as report:
            plan = collector.plan(report)
        uploads = workspace.objects.abort_stale_uploads(plan.grace_s, dry_run=True)
        if as_json:
            show_json(_plan_as_json(plan, uploads))
        else:
            _show_plan(plan, uploads)
        return
    with progress_line(as_json) as report:
        done = collector.delete(delete if delete.startswith("sha256:") else f"sha256:{delete}", report)
    aborted = workspace.objects.abort_stale_uploads(grace_days * _DAY_S)
    if as_json:
        show_json(
            {
                "artifacts": done.artifacts,
                "blobs": done.blobs,
                "bytes": done.bytes,
                "spared": dict(done.spared),
                "uploads": aborted,
            }
        )
        return
    console.print(f"Deleted {done.artifacts} artifacts and {done.blobs} blobs, {size_text(done.bytes)}.")
    if aborted:
        console.print(f"Aborted {len(aborted)} uploads that nobody went on with.")
    for reason, count in sorted(done.spared.items()):
        console.print(f"  {count} spared: {reason}")


def _show_plan(plan: Plan, uploads: list[str]) -> None:
    kept = sorted(plan.kept.items(), key=lambda item: -item[1].count)
    show_table(
        "stays",
        ["artifacts", "size", "because"],
        [[tally.count, size_text(tally.bytes), reason] for reason, tally in kept],
        empty="no artifacts here yet",
    )
    kinds: dict[str, list[int]] = {}
    for one in plan.artifacts:
        count = kinds.setdefault(one.kind, [0, 0])
        count[0], count[1] = count[0] + 1, count[1] + one.size
    rows = [[kind, count, size_text(size)] for kind, (count, size) in sorted(kinds.items())]
    show_table("would go", ["kind", "artifacts", "size"], rows, empty="nothing")
    size = size_text(sum(one.size for one in plan.blobs))
    console.print(
        f"{len(plan.blobs)} blobs would go, {size} (a blob that something else needs stays); "
        f"nothing younger than {plan.grace_s / _DAY_S:g} days is touched."
    )
    if uploads:
        console.print(f"{len(uploads)} uploads that nobody went on with would be aborted.")
    if plan.artifacts or plan.blobs or uploads:
        console.print("Nothing was deleted. To delete exactly this:")
        console.print(f"  [bold]sluice gc --delete {plan.digest}[/]", soft_wrap=True)


def _plan_as_json(plan: Plan, uploads: list[str]) -> dict[str, object]:
    return {
        **plan.to_json(),
        "digest": plan.digest,
        "kept": {reason: {"count": tally.count, "bytes": tally.bytes} for reason, tally in plan.kept.items()},
        "uploads": uploads,
    }
