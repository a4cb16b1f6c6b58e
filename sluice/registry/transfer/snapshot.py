"""The snapshot: a signed list of every file that a release needs elsewhere, with what is said about the release.

One format for both ways of transfer. In a bundle it is the first member of the archive (`bundle.json`); at a site it
lies at `snapshots/<number:08d>.json` in the object store, written once, so that two exporters never share a number.
It is a DSSE envelope over canonical JSON; like TUF's snapshot and timestamp roles it has a number that only grows and
a time after which it is no longer believed.
Source: https://theupdateframework.github.io/specification/latest/ (sections 4.4, 4.6 and 5).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sluice.infra.errors import ConflictError, InputError, IntegrityError
from sluice.infra.object_store import ObjectExists, ObjectStore
from sluice.provenance.attestation import PublicKey, Signer, verify_envelope
from sluice.provenance.canonical import canonical_json, digest_bytes, hex_of
from sluice.provenance.manifest import require_safe
from sluice.provenance.times import parse_time

PAYLOAD_TYPE = "application/vnd.sluice.snapshot+json"
FORMAT = 1
LONGEST_PATH = 100
"""Bytes of a name that one tar header holds."""
SITE_NAME = r"^[a-z0-9][a-z0-9-]{0,40}$"

ADDRESSED = frozenset({"blobs", "manifests", "attestations"})
"""Folders whose files are named for the digest of their bytes."""
EVIDENCE = frozenset({"steps", "ledger"})
POINTERS = frozenset({"signatures", "boms"})
FOLDERS = ADDRESSED | EVIDENCE | POINTERS | {"keys"}

_PREFIX = "snapshots/"
_KEY = re.compile(r"^snapshots/([0-9]{8})\.json$")
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SnapshotFile(_Value):
    """One file: its path (the key of the object that it is a copy of, if it is one), size in bytes, digest."""

    path: str = Field(min_length=1)
    size: int = Field(ge=0)
    digest: Digest


class BaseReference(_Value):
    """The base model that an adapter needs: where to get it, and whether the snapshot carries it."""

    digest: Digest
    name: str
    license: str
    source: str
    included: bool


class LedgerHead(_Value):
    """The ledger as far as the snapshot carries it: `entries` from the first on, `head` the digest of the last."""

    name: str
    entries: int = Field(ge=1)
    head: Digest


class ReleaseEntry(_Value):
    """One release. `decision` and `approval` are digests of ledger entries, `report` and `evidence` artifacts (the
    page people read, and the decision's file); `companions` artifacts by kind (`signature`, `bom`)."""

    release: Digest
    kind: str
    number: int
    tags: dict[str, str]
    decision: Digest
    approval: Digest
    report: Digest
    evidence: Digest
    dataset: Digest
    index: Digest | None
    base: BaseReference
    companions: dict[str, Digest]


class Snapshot(_Value):
    """What a site hands over. Times are ISO 8601 UTC; files are in path order, each path once."""

    format: int
    site: str = Field(pattern=SITE_NAME)
    number: int = Field(ge=1, le=99_999_999)
    created: str
    expires: str
    application: str
    ledger: LedgerHead
    releases: tuple[ReleaseEntry, ...] = Field(min_length=1)
    files: tuple[SnapshotFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def by_path(self) -> dict[str, SnapshotFile]:
        """Listed files by path."""
        return {file.path: file for file in self.files}

    def content(self) -> object:
        """What it is about, without its number and times: two snapshots of the same content are one."""
        return self.model_copy(update={"number": 0, "created": "", "expires": ""}).model_dump(mode="json")


def open_snapshot(data: bytes, keys: Iterable[PublicKey], place: str) -> Snapshot:
    """The snapshot in an envelope's bytes, its signature by one of `keys` verified.

    Raises `IntegrityError` naming `place`: unsigned, signed by nobody trusted, changed, or in another form than the
    canonical one (a second form would be a second name for the same thing).
    """
    from securesystemslib.dsse import Envelope

    try:
        envelope = json.loads(data)
        payload = verify_envelope(envelope, keys, PAYLOAD_TYPE)
        parsed = Envelope.from_dict(json.loads(data))
        if canonical_json(parsed.to_dict()) != data or canonical_json(payload) != parsed.payload:
            raise IntegrityError("it is not in canonical form.")
        snapshot = Snapshot.model_validate_json(parsed.payload)
        if snapshot.format != FORMAT:
            raise IntegrityError(f"its format is {snapshot.format}, and this program reads {FORMAT}.")
        if snapshot.ledger.name != snapshot.application:
            # Under another name its entries would not be compared with those that were seen before.
            raise IntegrityError(f"its ledger is that of {snapshot.ledger.name!r}, not of {snapshot.application!r}.")
        _check_paths(snapshot)
        parse_time(snapshot.created, "created")
        parse_time(snapshot.expires, "expires")
        return snapshot
    except IntegrityError as error:
        raise IntegrityError(f"{place} is not valid: {error.message}", hint=error.hint) from error
    except (ValidationError, InputError, ValueError, TypeError) as error:
        raise IntegrityError(f"{place} cannot be read: {str(error).splitlines()[0]}.") from error


def _check_paths(snapshot: Snapshot) -> None:
    paths = [file.path for file in snapshot.files]
    if paths != sorted(set(paths)):
        raise IntegrityError("its files are not in order.")
    for file in snapshot.files:
        folder = require_safe(file.path).split("/")[0]
        if len(file.path.encode()) > LONGEST_PATH or (folder != file.path and folder not in FOLDERS):
            raise IntegrityError(f"{file.path!r} is no place for a file of a snapshot.")
        # A name made of a digest is believed later without reading: it has to be that of these bytes.
        if folder in ADDRESSED and file.path.removesuffix(".json") != f"{folder}/sha256/{hex_of(file.digest)}":
            raise IntegrityError(f"{file.path} is listed with the digest {file.digest}, which is not its name.")


def require_fresh(snapshot: Snapshot, now: datetime) -> None:
    """Refuse what has expired: whoever holds new snapshots back can only go on showing an old one."""
    if now >= parse_time(snapshot.expires, "expires"):
        raise IntegrityError(
            f"Snapshot {snapshot.number} of site {snapshot.site!r} expired at {snapshot.expires}.",
            hint="Ask that site for a new one (`sluice export`, or `sluice sync` with its signing key).",
        )


def publish(objects: ObjectStore, draft: Snapshot, signer: Signer, *, valid_days: float, now: datetime) -> bytes:
    """The signed envelope of `draft` under the site's next number, stored; the last one again, if it says the same.

    An interrupted export so finds its own snapshot, and goes on with the same bytes. One that has used up half of its
    time is made anew. `number`, `created` and `expires` of the draft are set here.
    """
    for _ in range(100):
        last = latest(objects)
        if last is not None:
            number, data = last
            if _still_good(number, data, draft, signer, valid_days, now):
                return data
        number = last[0] + 1 if last else 1
        snapshot = draft.model_copy(
            update={
                "number": number,
                "created": _text(now),
                "expires": _text(now + timedelta(days=valid_days)),
            }
        )
        data = canonical_json(signer.sign(snapshot.model_dump(mode="json"), PAYLOAD_TYPE))
        try:
            objects.put(snapshot_key(number), data, if_absent=True)
            return data
        except ObjectExists:
            continue
    raise ConflictError("Other exports took each number that this one tried.", hint="Try again.")


def _still_good(number: int, data: bytes, draft: Snapshot, signer: Signer, valid_days: float, now: datetime) -> bool:
    try:
        known = open_snapshot(data, [signer.public_key], snapshot_key(number))
    except IntegrityError:
        # Signed by an earlier key of this site: it stays, and a new one follows it.
        return False
    created, expires = parse_time(known.created, "created"), parse_time(known.expires, "expires")
    same_time = abs((expires - created) - timedelta(days=valid_days)) < timedelta(seconds=1)
    return known.content() == draft.content() and same_time and now < created + (expires - created) / 2


def latest(objects: ObjectStore) -> tuple[int, bytes] | None:
    """Number and envelope of the newest snapshot that a site has published."""
    numbers = [int(match[1]) for info in objects.list(_PREFIX) if (match := _KEY.match(info.key))]
    return (max(numbers), objects.get(snapshot_key(max(numbers)))) if numbers else None


def snapshot_key(number: int) -> str:
    """Where a site keeps its snapshot of this number."""
    return f"{_PREFIX}{number:08d}.json"


def snapshot_digest(data: bytes) -> str:
    """A snapshot's identity: the digest of its envelope."""
    return digest_bytes(data)


def _text(instant: datetime) -> str:
    return instant.astimezone(UTC).replace(microsecond=0).isoformat().replace("+00:00", "Z")
