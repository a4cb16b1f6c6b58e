"""Accepting a snapshot: never an older one, never another one under the same number, everything or nothing.

What came from elsewhere lies apart: step records and ledger entries of site `a` below `sites/a/`, so that no foreign
record is ever taken for a step of this site. Artifacts and statements are named for their content and lie with
ours. The envelope of an accepted snapshot is kept, written once, at `sites/a/accepted/<number:08d>.json`: it is what
makes a rollback seen. It is written after all files and before anybody is shown the release.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
from pathlib import Path

from sluice.infra.errors import IntegrityError
from sluice.infra.object_store import ObjectExists, ObjectStore
from sluice.infra.progress import Report, no_report
from sluice.registry.transfer.companions import pointer_key, pointers
from sluice.registry.transfer.mirror import WORKERS, Mirror, Move, Moved, SiteStore
from sluice.registry.transfer.snapshot import ADDRESSED, EVIDENCE, ReleaseEntry, Snapshot
from sluice.registry.transfer.source import Source

_ACCEPTED = re.compile(r"^([0-9]{8})\.json$")


def require_newer(objects: ObjectStore, snapshot: Snapshot, envelope: bytes) -> bool:
    """Whether this very snapshot was accepted before; a newer one was not.

    Raises `IntegrityError` for one that is older than another that was accepted from its site (rollback), that has the
    number of another one, or whose ledger does not go on from the one that was seen before.
    """
    found = highest_accepted(objects, snapshot.site)
    if found is None:
        return False
    number, known_envelope = found
    if snapshot.number < number:
        raise IntegrityError(
            f"Snapshot {snapshot.number} of site {snapshot.site!r} is older than snapshot {number}, which was accepted "
            "here already.",
            hint="Somebody may be offering old releases as new ones. Ask that site for a new export.",
        )
    if snapshot.number == number:
        if envelope != known_envelope:
            raise IntegrityError(
                f"Site {snapshot.site!r} signed two different snapshots {number}: this is not the one accepted here.",
                hint="Its key may be in two hands, or its object store was reset. Ask its people.",
            )
        return True
    known = _last_about(objects, snapshot.site, snapshot.application)
    if known is None:
        return False
    if known.ledger.name != snapshot.ledger.name:
        raise IntegrityError(
            f"The ledger of site {snapshot.site!r} is called {snapshot.ledger.name!r}, and {known.ledger.name!r} was "
            "accepted here before: it is another one.",
            hint="Nothing was changed here. Ask the people of that site.",
        )
    last = snapshot.by_path().get(f"ledger/{known.ledger.name}/{known.ledger.entries:08d}.json")
    if last is None or last.digest != known.ledger.head:
        raise IntegrityError(
            f"The ledger of site {snapshot.site!r} does not go on from entry {known.ledger.entries}, which was "
            "seen here before: it was cut or rewritten.",
            hint="Nothing was changed here. Ask the people of that site.",
        )
    return False


def accept(
    objects: SiteStore,
    snapshot: Snapshot,
    envelope: bytes,
    source: Source,
    staging: Path,
    *,
    limit: float | None = None,
    workers: int = WORKERS,
    report: Report = no_report,
) -> Moved:
    """Take a verified snapshot's files over. Doing it again moves what is missing and changes nothing else.

    Raises as `require_newer` and `Mirror.move` do.
    """
    accepted = require_newer(objects, snapshot, envelope)
    mirror = Mirror(source, objects, staging, limit=limit, workers=workers, report=report)
    moves = _moves(objects, snapshot)
    # Manifests last: one that can be read has all that the snapshot carries of it.
    content, described = ([m for m in moves if m.key.startswith("manifests/") is last] for last in (False, True))
    moved = mirror.move(content, described)
    if not accepted:
        # Another one may have been accepted while this one was on its way.
        require_newer(objects, snapshot, envelope)
        try:
            objects.put(_accepted_key(snapshot.site, snapshot.number), envelope, if_absent=True)
        except ObjectExists:
            require_newer(objects, snapshot, envelope)
    for release in snapshot.releases:
        _point_to_companions(objects, release)
    return moved


def highest_accepted(objects: ObjectStore, site: str) -> tuple[int, bytes] | None:
    """Number and envelope of the newest snapshot accepted from a site."""
    numbers = _accepted(objects, site)
    return (numbers[-1], objects.get(_accepted_key(site, numbers[-1]))) if numbers else None


def _accepted(objects: ObjectStore, site: str) -> list[int]:
    """Numbers of the snapshots accepted from a site, in order."""
    prefix = f"sites/{site}/accepted/"
    found = [_ACCEPTED.match(info.key.removeprefix(prefix)) for info in objects.list(prefix)]
    return sorted(int(match[1]) for match in found if match)


def _last_about(objects: ObjectStore, site: str, application: str) -> Snapshot | None:
    """The newest snapshot accepted from a site about an application. Most sites have one: the first that is read."""
    for number in reversed(_accepted(objects, site)):
        found = _payload(objects.get(_accepted_key(site, number)))
        if found.application == application:
            return found
    return None


def _moves(objects: ObjectStore, snapshot: Snapshot) -> list[Move]:
    """Where each file goes here, the largest first."""
    found = highest_accepted(objects, snapshot.site)
    # Evidence that an accepted snapshot listed just so was compared then; only what is new is read back and compared.
    settled = {(file.path, file.digest) for file in _payload(found[1]).files} if found else set()
    moves = []
    for file in snapshot.files:
        folder = file.path.split("/")[0]
        if folder in ADDRESSED:
            moves.append(Move(file, file.path))
        elif folder in EVIDENCE:
            once = (file.path, file.digest) not in settled
            moves.append(Move(file, f"sites/{snapshot.site}/{file.path}", once=once))
    return sorted(moves, key=lambda move: -move.file.size)


def _point_to_companions(objects: ObjectStore, release: ReleaseEntry) -> None:
    """Make a release's signature and bill of materials found here. A signature that is here already stays the first;
    a bill of materials follows the latest decision."""
    for key, pointer in pointers(release.release, release.companions).items():
        with contextlib.suppress(ObjectExists):
            objects.put(key, pointer, if_absent=key == pointer_key("signature", release.release))


def _payload(envelope: bytes) -> Snapshot:
    # Verified when it was accepted; its signer's key may have been retired since.
    return Snapshot.model_validate_json(base64.b64decode(json.loads(envelope)["payload"]))


def _accepted_key(site: str, number: int) -> str:
    return f"sites/{site}/accepted/{number:08d}.json"


def accepted_releases(objects: ObjectStore) -> dict[str, str]:
    """Site by digest, of all releases in the newest snapshot that was accepted from each site."""
    sites = {info.key.split("/")[1] for info in objects.list("sites/") if "/accepted/" in info.key}
    found = {site: highest_accepted(objects, site) for site in sorted(sites)}
    return {one.release: site for site, newest in found.items() if newest for one in _payload(newest[1]).releases}
