"""From site to site: the snapshot of one, verified and accepted by the other, without the file in between."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sluice.infra.errors import InputError
from sluice.infra.progress import Report, no_report
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.attestation import PublicKey, Signer
from sluice.provenance.ledger import Ledger
from sluice.registry.mlflow_registry import MlflowRegistry
from sluice.registry.transfer.acceptance import accept, require_newer
from sluice.registry.transfer.content import Wanted
from sluice.registry.transfer.export import VALID_DAYS, Published, publish_snapshot
from sluice.registry.transfer.mirror import WORKERS, Moved, SiteStore
from sluice.registry.transfer.registration import Imported, register_import
from sluice.registry.transfer.released import find_release, find_releases
from sluice.registry.transfer.sites import Site
from sluice.registry.transfer.snapshot import Snapshot, latest, open_snapshot
from sluice.registry.transfer.source import ListedObjects, Source
from sluice.registry.transfer.verification import Verification, fresh, read_ledger, verify_chain
from sluice.registry.versions import list_versions


@dataclass(frozen=True)
class Received:
    """What an import or a sync did at the receiving site."""

    snapshot: Snapshot
    moved: Moved
    imported: tuple[Imported, ...]


@dataclass(frozen=True)
class Receiver:
    """The receiving site: its store, its registry, its ledger where this process may write it, and its policy."""

    objects: SiteStore
    artifacts: ArtifactStore
    registry: MlflowRegistry
    ledger: Ledger | None
    application: str
    accept_decisions_of: tuple[str, ...]
    actor: str


def publish_all(
    site: str,
    application: str,
    objects: SiteStore,
    artifacts: ArtifactStore,
    ledger: Ledger,
    signer: Signer,
    registry: MlflowRegistry,
    *,
    keys: Iterable[PublicKey] = (),
    with_base: bool = False,
    valid_days: float = VALID_DAYS,
) -> Published:
    """The signed snapshot of all releases of a site that may leave it. `keys` as in `publish_snapshot`."""
    versions = {v.digest: v for v in list_versions(registry, application) if v.tags.get("kind") == "adapter"}
    entries = ledger.entries()
    # What came from another site is that site's to hand over: its history is not among this one's steps.
    foreign = {entry.body["release"] for entry in entries if entry.kind == "import"}
    wanted = [
        Wanted(release, versions[release].number, versions[release].tags)
        for release in find_releases(entries)
        if release in versions and release not in foreign
    ]
    return publish_snapshot(
        objects,
        artifacts,
        ledger,
        signer,
        wanted,
        site=site,
        application=application,
        keys=keys,
        with_base=with_base,
        valid_days=valid_days,
    )


def receive(
    receiver: Receiver,
    snapshot: Snapshot,
    envelope: bytes,
    source: Source,
    keys: Sequence[PublicKey],
    staging: Path,
    *,
    limit: float | None = None,
    workers: int = WORKERS,
    report: Report = no_report,
) -> Received:
    """Take over a snapshot whose signature and age were checked: prove its chain, move what is missing, register.

    Nobody sees anything of it before all of it is here. Doing it again goes on where it was.
    """
    require_newer(receiver.objects, snapshot, envelope)
    objects = ListedObjects(snapshot, source)
    Verification(tuple(verify_chain(objects, snapshot, envelope, keys)), snapshot).require()
    entries = read_ledger(objects, snapshot, keys)
    if snapshot.application != receiver.application:
        raise InputError(
            f"Snapshot {snapshot.number} of site {snapshot.site!r} is about the application {snapshot.application!r}; "
            f"this site's is {receiver.application!r}.",
            hint="SLUICE_APPLICATION names it; two applications share nothing.",
        )
    moved = accept(receiver.objects, snapshot, envelope, objects, staging, limit=limit, workers=workers, report=report)
    imported = tuple(
        register_import(
            receiver.registry,
            receiver.ledger,
            receiver.artifacts,
            snapshot,
            release,
            find_release(entries, release.release),
            application=receiver.application,
            accept_decision=snapshot.site in receiver.accept_decisions_of,
            actor=receiver.actor,
        )
        for release in snapshot.releases
    )
    return Received(snapshot, moved, imported)


def sync(
    origin: Site,
    target: Site,
    work: Path,
    *,
    actor: str,
    limit: float | None = None,
    workers: int = WORKERS,
    report: Report = no_report,
) -> Received:
    """Mirror the releases of `origin` to `target`. `work` is a folder of this machine, kept between runs.

    With the origin's signing key a snapshot of its present releases is made first; else its newest one is taken, which
    has to be fresh. `limit` is in bytes a second and each direction. Raises as `receive`, and `InputError` when the
    origin has published nothing.
    """
    if origin.name == target.name:
        raise InputError(f"--from and --to are both {origin.name!r}.")
    report(0, 0, f"reading the releases of {origin.name}")
    if origin.signer is not None:
        ledger = Ledger(origin.objects, origin.application, origin.signer, policy=origin.policy)
        artifacts = ArtifactStore(origin.objects, work / "artifacts")
        envelope = publish_all(
            origin.name,
            origin.application,
            origin.objects,
            artifacts,
            ledger,
            origin.signer,
            origin.registry,
            keys=origin.keys,
        ).envelope
    else:
        found = latest(origin.objects)
        if found is None:
            raise InputError(
                f"Site {origin.name!r} has published no snapshot.",
                hint="`sluice sites publish` there makes one; or give this file its signing_key.",
            )
        envelope = found[1]
    place = f"The newest snapshot of site {origin.name!r}"
    snapshot = open_snapshot(envelope, origin.keys, place)
    if snapshot.site != origin.name:
        raise InputError(f"{place} is in the name of {snapshot.site!r}.", hint="Give that site this name in the file.")
    Verification((fresh(snapshot, datetime.now(UTC)),), snapshot).require()
    target_ledger = (
        Ledger(target.objects, target.application, target.signer, policy=target.policy)
        if target.signer is not None
        else None
    )
    receiver = Receiver(
        target.objects,
        ArtifactStore(target.objects, work / "artifacts"),
        target.registry,
        target_ledger,
        target.application,
        target.accept_decisions_of,
        actor,
    )
    return receive(
        receiver,
        snapshot,
        envelope,
        origin.objects,
        origin.keys,
        work / "staging",
        limit=limit,
        workers=workers,
        report=report,
    )
