"""Transfer between sites, wired to this installation."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

from sluice.components.workspace import Workspace
from sluice.infra.errors import InputError, IntegrityError
from sluice.infra.progress import Report, no_report
from sluice.infra.settings import Settings
from sluice.pipelines.approvals import find_candidate, registry_of
from sluice.provenance.canonical import short
from sluice.provenance.keys import PublicKey, read_public_key
from sluice.provenance.releases import read_state
from sluice.provenance.trust import OWN
from sluice.registry.transfer.archive import SNAPSHOT_FILE, Archive
from sluice.registry.transfer.content import Wanted
from sluice.registry.transfer.export import Published, publish_snapshot, write_bundle
from sluice.registry.transfer.mirror import WORKERS
from sluice.registry.transfer.sites import TrustedSite, open_site, read_sites, site_of, trusted_sites
from sluice.registry.transfer.sync import Received, Receiver, publish_all, receive
from sluice.registry.transfer.sync import sync as sync_sites
from sluice.registry.transfer.verification import Verification, unsigned, verify_archive, verify_bundle
from sluice.registry.versions import Version, find_version

MEGABIT = 1e6 / 8
"""Bytes."""


def site_name(workspace: Workspace) -> str:
    """This site's name for others: the setting, else made of its key."""
    return _name(workspace.settings, workspace.signer.public_key)


def _name(settings: Settings, key: PublicKey) -> str:
    return settings.site or f"site-{key.short}"


def find_subject(workspace: Workspace, text: str) -> Version:
    """The version that a number, a digest, `champion` or `candidate` names."""
    digest = read_state(workspace.ledger).champion() if text == "champion" else text
    if digest is None:
        raise InputError("VERSION = 'champion': there is no champion yet.")
    if not re.match(r"^sha256:[0-9a-f]{64}$", digest):
        return find_candidate(workspace, digest)
    found = find_version(registry_of(workspace), workspace.settings.application, digest)
    if found is None:
        raise InputError(f"VERSION = {text!r}: MLflow has no version of {short(digest)}.")
    return found


def export(
    workspace: Workspace,
    version: str,
    out: Path,
    *,
    with_base: bool,
    valid_days: float,
    report: Report = no_report,
) -> Published:
    """Write the bundle of one release of this site. Raises `GateRefused` when it may not leave."""
    found = find_subject(workspace, version)
    published = publish_snapshot(
        workspace.objects,
        workspace.artifacts,
        workspace.ledger,
        workspace.signer,
        [Wanted(found.digest, found.number, found.tags)],
        site=site_name(workspace),
        application=workspace.settings.application,
        keys=workspace.trust.keys,
        with_base=with_base,
        valid_days=valid_days,
    )
    write_bundle(out, published, workspace.objects, report)
    return published


def publish(workspace: Workspace, *, with_base: bool, valid_days: float) -> Published:
    """Sign a snapshot of all releases of this site into its own store, for sites that fetch from it."""
    return publish_all(
        site_name(workspace),
        workspace.settings.application,
        workspace.objects,
        workspace.artifacts,
        workspace.ledger,
        workspace.signer,
        registry_of(workspace),
        keys=workspace.trust.keys,
        with_base=with_base,
        valid_days=valid_days,
    )


def verify(
    settings: Settings, bundle: Path, key_files: list[Path], *, now: datetime | None, report: Report = no_report
) -> Verification:
    """Verify a bundle with the given keys; without any, with those that are trusted for the site that it names."""
    if key_files:
        return verify_bundle(bundle, [read_public_key(path) for path in key_files], now=now, report=report)
    sites = known_sites(settings)
    if not sites:
        return verify_bundle(bundle, (), now=now, report=report)
    try:
        archive = Archive(bundle)
        _, site = site_of(archive.envelope, sites, SNAPSHOT_FILE)
    except IntegrityError as error:
        return unsigned(error)
    return verify_archive(archive, site.keys, now=now, report=report)


def known_sites(settings: Settings) -> list[TrustedSite]:
    """The sites that this installation trusts, and itself (with its earlier keys); none without an installation."""
    folder = settings.home / "keys"
    own = folder / "signing.pem.pub"
    if not own.is_file():
        return trusted_sites(settings.home)
    key = read_public_key(own)
    earlier = [read_public_key(path) for path in sorted((folder / "trusted").glob(f"{OWN}.*.pub"))]
    name = _name(settings, key)
    others = [site for site in trusted_sites(settings.home) if site.name != name]
    return [TrustedSite(name, (key, *earlier)), *others]


def import_bundle(
    workspace: Workspace, bundle: Path, *, actor: str, limit_mbps: float | None, report: Report = no_report
) -> Received:
    """Verify a bundle with the keys of the site it is from, and take it over. Raises `IntegrityError`."""
    settings = workspace.settings
    sites = trusted_sites(settings.home)
    if not sites:
        raise InputError(
            "This site trusts no other one yet.", hint="`sluice sites trust NAME KEY.pub`, with a key from its people."
        )
    archive = Archive(bundle)
    _, site = site_of(archive.envelope, sites, SNAPSHOT_FILE)
    report(0, 0, "verifying")
    snapshot = verify_archive(archive, site.keys, report=report).require()
    receiver = Receiver(
        workspace.objects,
        workspace.artifacts,
        registry_of(workspace),
        workspace.ledger,
        settings.application,
        settings.release.accept_decisions_of,
        actor,
    )
    return receive(
        receiver,
        snapshot,
        archive.envelope,
        archive,
        site.keys,
        settings.home / "transfers",
        limit=bytes_a_second(limit_mbps),
        report=report,
    )


def sync(
    settings: Settings,
    file: Path,
    origin: str,
    target: str,
    *,
    actor: str,
    limit_mbps: float | None,
    workers: int = WORKERS,
    report: Report = no_report,
) -> Received:
    """Mirror the releases of one site of the file to another."""
    sites = read_sites(file)
    folder = file.absolute().parent
    return sync_sites(
        open_site(origin, sites, folder),
        open_site(target, sites, folder),
        settings.home / "transfers" / f"{origin}-{target}",
        actor=actor,
        limit=bytes_a_second(limit_mbps),
        workers=workers,
        report=report,
    )


def bytes_a_second(mbps: float | None) -> float | None:
    """A limit in megabits a second as bytes a second. Raises `InputError` for one that is no speed."""
    if mbps is None:
        return None
    if not mbps > 0:
        raise InputError(f"--limit-mbps = {mbps!r} is not a speed.", hint="Leave it out for no limit.")
    return mbps * MEGABIT
