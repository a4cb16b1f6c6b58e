"""Handing over: a signed snapshot of releases in the site's own store, and on request the bundle made of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sluice.infra.errors import InputError
from sluice.infra.object_store import ObjectStore
from sluice.infra.progress import Report, no_report
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.attestation import PublicKey, Signer
from sluice.provenance.canonical import digest_bytes
from sluice.provenance.ledger import Ledger, LedgerEntry
from sluice.registry.transfer.archive import write_archive
from sluice.registry.transfer.companions import pointers
from sluice.registry.transfer.content import Content, Wanted, gather
from sluice.registry.transfer.mirror import SiteStore
from sluice.registry.transfer.readme import README_FILE, SCRIPT_FILE, readme, script
from sluice.registry.transfer.snapshot import FORMAT, LedgerHead, Snapshot, SnapshotFile, open_snapshot, publish
from sluice.registry.transfer.source import Source

VALID_DAYS = 30.0


@dataclass(frozen=True)
class Published:
    """A snapshot and its signed envelope."""

    snapshot: Snapshot
    envelope: bytes
    extras: dict[str, bytes]


def publish_snapshot(
    objects: ObjectStore,
    artifacts: ArtifactStore,
    ledger: Ledger,
    signer: Signer,
    wanted: Iterable[Wanted],
    *,
    site: str,
    application: str,
    keys: Iterable[PublicKey] = (),
    with_base: bool = False,
    valid_days: float = VALID_DAYS,
    now: datetime | None = None,
) -> Published:
    """The signed snapshot of these releases; the last one again when it says the same and is still fresh.

    `keys` are the site's: those that signed something in the snapshot are handed over beside `signer`'s.

    Raises `GateRefused` for a release that may not leave (`find_release`), `InputError` when there is none.
    """
    if not valid_days > 0:
        raise InputError(f"valid days = {valid_days!r} is not a time.")
    entries = ledger.entries()
    content = gather(objects, artifacts, entries, wanted, with_base=with_base)
    if not content.releases:
        raise InputError(
            f"Site {site!r} has no release to hand over.",
            hint="A release leaves once its gate passed and it is approved.",
        )
    head = LedgerHead(name=ledger.name, entries=len(entries), head=entries[-1].digest)
    needed = [signer.public_key, *_earlier(objects, content, entries, signer.public_key, keys)]
    extras = {
        README_FILE: readme(site, application, content.releases, head, needed),
        SCRIPT_FILE: script(),
        **{f"keys/{key.key_id[:16]}.pub": key.pem.encode() for key in needed},
    }
    draft = Snapshot(
        format=FORMAT,
        site=site,
        number=1,
        created="",
        expires="",
        application=application,
        ledger=head,
        releases=tuple(content.releases),
        files=_files(content, extras),
    )
    envelope = publish(objects, draft, signer, valid_days=valid_days, now=now or datetime.now(UTC))
    for release in content.releases:
        extras |= pointers(release.release, release.companions)
    return Published(open_snapshot(envelope, [signer.public_key], "The new snapshot"), envelope, extras)


def _earlier(
    objects: ObjectStore,
    content: Content,
    entries: Iterable[LedgerEntry],
    own: PublicKey,
    keys: Iterable[PublicKey],
) -> list[PublicKey]:
    """Those of `keys` besides `own` that signed an entry or a statement, in the order of their ids."""
    others = {key.key_id: key for key in keys if key.key_id != own.key_id}
    if not others:
        return []
    signers = {str(one["keyid"]) for entry in entries for one in entry.envelope["signatures"]}
    for path in content.files:
        if path.startswith("attestations/"):
            signers |= {str(one["keyid"]) for one in json.loads(objects.get(path))["signatures"]}
    return [others[key_id] for key_id in sorted(signers & set(others))]


def write_bundle(path: Path, published: Published, objects: SiteStore, report: Report = no_report) -> None:
    """Write the bundle of a published snapshot (`write_archive`)."""
    write_archive(path, published.envelope, published.snapshot, _WithExtras(objects, published.extras), report)


class _WithExtras:
    """An object store, and the files of a bundle that lie in none."""

    def __init__(self, objects: Source, extras: dict[str, bytes]) -> None:
        self._objects, self._extras = objects, extras

    def stream(self, key: str, start: int = 0) -> Iterator[bytes]:
        if key in self._extras:
            return iter([self._extras[key][start:]])
        return self._objects.stream(key, start)


def _files(content: Content, extras: dict[str, bytes]) -> tuple[SnapshotFile, ...]:
    for path, data in extras.items():
        content.add(path, len(data), digest_bytes(data))
    return tuple(content.files[path] for path in sorted(content.files))
