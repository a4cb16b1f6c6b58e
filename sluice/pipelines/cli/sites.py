"""export, verify, import, sync, sites: releases that go from one site to another, and the proof that goes with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from sluice.infra.access import require
from sluice.infra.progress import Report
from sluice.infra.settings import load_settings
from sluice.pipelines.cli.output import JsonFlag, console, show_json, show_table, size_text

if TYPE_CHECKING:
    from sluice.registry.transfer.sync import Received
    from sluice.registry.transfer.verification import Verification

sites_app = typer.Typer(no_args_is_help=True, help="Other sites: whose keys are trusted, what was accepted from them.")

BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A file that `sluice export` wrote")]
Limit = Annotated[float | None, typer.Option("--limit-mbps", help="At most so many megabits a second, each way")]
WithBase = Annotated[bool, typer.Option("--with-base", help="Carry the base model too, instead of a reference to it")]
ValidDays = Annotated[float, typer.Option("--valid-days", help="Days after which nobody accepts it any more")]


def add_to(app: typer.Typer) -> None:
    app.command("export")(export)
    app.command("verify")(verify)
    app.command("import")(import_bundle)
    app.command("sync")(sync)
    app.add_typer(sites_app, name="sites")


def export(
    version: Annotated[
        str, typer.Argument(metavar="VERSION", help="Number in MLflow, digest, `champion` or `candidate`")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The bundle to write, such as out.tar")],
    with_base: WithBase = False,
    valid_days: ValidDays = 30.0,
    as_json: JsonFlag = False,
) -> None:
    """Write a release into one file that proves itself: model, data card, decision, approval, ledger, statements.

    Only what its gate passed and a person approved leaves. `sluice verify` checks the file anywhere, offline.
    Killed half way, the same command goes on.
    """
    from sluice.components.workspace import open_workspace
    from sluice.pipelines import sites

    settings = load_settings()
    require(settings, "export", version)
    workspace = open_workspace(settings)
    with _progress("exporting", as_json) as report:
        made = sites.export(workspace, version, out, with_base=with_base, valid_days=valid_days, report=report)
    key = workspace.settings.home / "keys" / "signing.pem.pub"
    snapshot = made.snapshot
    told: dict[str, Any] = {
        "bundle": str(out.absolute()),
        "bytes": out.stat().st_size,
        "site": snapshot.site,
        "snapshot": snapshot.number,
        "release": snapshot.releases[0].release,
        "expires": snapshot.expires,
        "files": len(snapshot.files),
        "public_key": str(key),
    }
    if as_json:
        show_json(told)
        return
    console.print(
        f"{escape(str(out))}: {len(snapshot.files)} files, {size_text(told['bytes'])}, snapshot {snapshot.number} of "
        f"{snapshot.site}, valid until {snapshot.expires}"
    )
    console.print(f"To verify it: [bold]sluice verify {escape(str(out))} --key {escape(str(key))}[/]")
    console.print("[dim]Hand the key over by another way than the file.[/]")


def verify(
    bundle: BundleArgument,
    key: Annotated[
        list[Path] | None, typer.Option("--key", help="Public key (PEM) of the site it is from; may be repeated")
    ] = None,
    at: Annotated[
        str, typer.Option("--at", metavar="TIME", help="Was it valid at this time (ISO 8601), instead of now")
    ] = "",
    as_json: JsonFlag = False,
) -> None:
    """Check a bundle, every byte of it, with nothing but the public key: no network, no installation.

    Exit code 4 when anything does not hold. Without --key those keys count that are trusted for the
    site that the bundle names (for a bundle of this site, its own).
    """
    from sluice.pipelines import sites
    from sluice.provenance.times import parse_time

    now: datetime | None = parse_time(at, "--at") if at else None
    with _progress("verifying", as_json) as report:
        found = sites.verify(load_settings(), bundle, key or [], now=now, report=report)
    _show(found, bundle, as_json)
    if not found.ok:
        raise typer.Exit(4)


def import_bundle(bundle: BundleArgument, limit_mbps: Limit = None, as_json: JsonFlag = False) -> None:
    """Accept a bundle from a site that is trusted (`sluice sites trust`): verified first, everything or nothing.

    The release becomes a version in MLflow that waits: for a gate of this site, or, where the setting
    release.accept_decisions_of names its site, for `sluice approve`. An approval is never taken over.
    """
    from sluice.components.workspace import open_workspace
    from sluice.pipelines import sites

    settings = load_settings()
    actor = require(settings, "import", str(bundle))
    with _progress("importing", as_json) as report:
        done = sites.import_bundle(open_workspace(settings), bundle, actor=actor, limit_mbps=limit_mbps, report=report)
    _show_received(done, as_json)


def sync(
    origin: Annotated[str, typer.Option("--from", help="Site whose releases are mirrored")],
    target: Annotated[str, typer.Option("--to", help="Site that receives them")],
    file: Annotated[
        Path, typer.Option("--sites", help="YAML file that names the sites; docs/sites.md shows one")
    ] = Path("sites.yaml"),
    limit_mbps: Limit = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Files moved at once")] = 4,
    as_json: JsonFlag = False,
) -> None:
    """Mirror the releases of one site to another: object store to object store, MLflow to MLflow.

    Only what is missing moves, verified by digest. After a cut or a kill the same command goes on where it was.
    """
    from sluice.pipelines import sites

    settings = load_settings()
    actor = require(settings, "sync", f"{origin} to {target}")
    with _progress("mirroring", as_json) as report:
        done = sites.sync(
            settings, file, origin, target, actor=actor, limit_mbps=limit_mbps, workers=workers, report=report
        )
    _show_received(done, as_json)


@sites_app.command("trust")
def trust(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What that site is called here and in its bundles")],
    key: Annotated[Path, typer.Argument(metavar="KEY", help="Its public key (PEM), from its people")],
    as_json: JsonFlag = False,
) -> None:
    """Believe what this key signs in the name of this site. Further keys of a site are added the same way."""
    from sluice.registry.transfer.sites import trust_site

    settings = load_settings()
    require(settings, "sites trust", name)
    site = trust_site(settings.home, name, key)
    ids = [one.key_id for one in site.keys]
    if as_json:
        show_json({"site": site.name, "keys": ids})
    else:
        console.print(
            f"{site.name}: signed by {', '.join(i[:12] for i in ids)}. Compare with its people, by phone say."
        )


@sites_app.command("list")
def list_sites(as_json: JsonFlag = False) -> None:
    """List this site and those it trusts, with the newest snapshot accepted from each."""
    from sluice.components.workspace import open_workspace
    from sluice.pipelines.sites import site_name
    from sluice.registry.transfer.acceptance import highest_accepted
    from sluice.registry.transfer.sites import trusted_sites

    workspace = open_workspace()
    rows: list[list[Any]] = [[site_name(workspace), "this site", workspace.signer.public_key.key_id[:12], ""]]
    for site in trusted_sites(workspace.settings.home):
        newest = highest_accepted(workspace.objects, site.name)
        keys = " ".join(key.key_id[:12] for key in site.keys)
        rows.append([site.name, "trusted", keys, newest[0] if newest else ""])
    columns = ["site", "", "keys", "newest snapshot"]
    if as_json:
        show_json([dict(zip(("site", "role", "keys", "snapshot"), row, strict=True)) for row in rows])
    else:
        show_table("sites", columns, rows)


@sites_app.command("publish")
def publish(with_base: WithBase = False, valid_days: ValidDays = 30.0, as_json: JsonFlag = False) -> None:
    """Sign a snapshot of all releases of this site into its own store, for other sites to fetch by `sluice sync`.

    Let a timer run it more often than it expires: a snapshot that stays old is taken for a freeze.
    """
    from sluice.components.workspace import open_workspace
    from sluice.pipelines import sites

    settings = load_settings()
    require(settings, "sites publish")
    snapshot = sites.publish(open_workspace(settings), with_base=with_base, valid_days=valid_days).snapshot
    if as_json:
        show_json(snapshot.model_dump(mode="json", exclude={"files"}))
    else:
        console.print(
            f"snapshot {snapshot.number} of {snapshot.site}: {len(snapshot.releases)} releases, "
            f"{size_text(snapshot.size)}, valid until {snapshot.expires}"
        )


def _show(found: Verification, bundle: Path, as_json: bool) -> None:
    snapshot = found.snapshot
    if as_json:
        show_json(
            {
                "ok": found.ok,
                "checks": [vars(check) for check in found.checks],
                "snapshot": snapshot.model_dump(mode="json", exclude={"files"}) if snapshot else None,
            }
        )
        return
    show_table(
        f"{bundle.name}: " + ("everything holds" if found.ok else "NOT VERIFIED"),
        ["", "what", "in words"],
        [["✔" if check.ok else "✘", check.name, check.detail] for check in found.checks],
    )


def _show_received(done: Received, as_json: bool) -> None:
    snapshot, moved = done.snapshot, done.moved
    if as_json:
        show_json(
            {
                "site": snapshot.site,
                "snapshot": snapshot.number,
                "moved": vars(moved),
                "releases": [
                    {
                        "release": one.version.digest,
                        "version": one.version.number,
                        "url": one.version.url,
                        "new": one.new,
                        "decision_accepted": one.accepted,
                        "why": one.why,
                    }
                    for one in done.imported
                ],
            }
        )
        return
    console.print(
        f"snapshot {snapshot.number} of {snapshot.site}: {moved.files} of {moved.all_files} files were missing, "
        f"{size_text(moved.size)} of {size_text(moved.all_size)}"
    )
    show_table(
        "releases",
        ["version", "", "now", "page"],
        [[one.version.number, "new" if one.new else "was here", one.why, one.version.url] for one in done.imported],
    )


@contextmanager
def _progress(what: str, as_json: bool) -> Iterator[Report]:
    """A bar with bytes, speed and time left; nothing where one JSON document is asked for."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from sluice.infra.progress import no_report

    if as_json:
        yield no_report
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task(what, total=None)

        def report(completed: float, total: float, message: str) -> None:
            progress.update(bar, completed=completed, total=total or None)

        yield report
