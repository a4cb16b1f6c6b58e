"""What a snapshot proves, checked with public keys alone: no network, no installation, no object store of one's own.

The parts of the chain verify themselves with the code that wrote them (`Ledger`, `StepRunner.verify`, `ArtifactStore`),
reading the snapshot's files instead of a store's.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sluice.infra.errors import GateRefused, InputError, IntegrityError, SluiceError
from sluice.infra.object_store import ObjectMissing
from sluice.infra.progress import Report, no_report
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.attestation import verify_signatures
from sluice.provenance.canonical import hex_of, short
from sluice.provenance.key_changes import trust_of
from sluice.provenance.keys import PublicKey, Signer
from sluice.provenance.ledger import Ledger, LedgerEntry, key_history
from sluice.provenance.step_records import StepRecord, parse_record
from sluice.provenance.steps import StepRunner
from sluice.provenance.trust import KeyHistory, Trust, TrustPolicy
from sluice.registry.model_signature import find_signatures, signer_of, verify_model
from sluice.registry.transfer.archive import SNAPSHOT_FILE, Archive
from sluice.registry.transfer.companions import POINTERS, find_companions
from sluice.registry.transfer.content import BASE_KIND
from sluice.registry.transfer.released import Release, find_release
from sluice.registry.transfer.snapshot import PAYLOAD_TYPE, ReleaseEntry, Snapshot, open_snapshot, require_fresh
from sluice.registry.transfer.source import ListedObjects


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `detail` says in plain words what holds, or what does not."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Verification:
    """All that was looked at; `snapshot` is None when not even the signed list could be believed."""

    checks: tuple[Check, ...]
    snapshot: Snapshot | None

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def require(self) -> Snapshot:
        """The snapshot, if everything holds. Raises `IntegrityError` with the first thing that does not."""
        for check in self.checks:
            if not check.ok:
                raise IntegrityError(f"{check.name}: {check.detail}")
        assert self.snapshot is not None
        return self.snapshot


def verify_bundle(
    path: Path, keys: Sequence[PublicKey], *, now: datetime | None = None, report: Report = no_report
) -> Verification:
    """Verify a bundle file: every byte, every signature, the ledger, and the chain behind each release.

    `now` is the time at which it must not have expired. Raises `InputError` when there is no such file or no key;
    whatever is wrong with the bundle is a check that does not hold.
    """
    try:
        archive = Archive(path)
    except IntegrityError as error:
        return unsigned(error)
    return verify_archive(archive, keys, now=now, report=report)


def unsigned(error: IntegrityError) -> Verification:
    """What is told of a bundle of which not even the signed list can be believed."""
    return Verification((Check("signature", False, str(error)),), None)


def verify_archive(
    archive: Archive, keys: Sequence[PublicKey], *, now: datetime | None = None, report: Report = no_report
) -> Verification:
    """As `verify_bundle`, for a bundle that was opened: what is read of it afterwards is what was verified."""
    if not keys:
        raise InputError(
            "There is no public key to verify with.",
            hint="Get the site's key from its people and pass --key FILE, or trust it with `sluice sites trust`.",
        )
    checks: list[Check] = []
    try:
        snapshot = open_snapshot(archive.envelope, keys, SNAPSHOT_FILE)
    except IntegrityError as error:
        return unsigned(error)
    checks.append(Check("signature", True, _signed(snapshot, archive.envelope)))
    checks.append(fresh(snapshot, now or datetime.now(UTC)))
    damages = archive.damages(snapshot, report)
    told = "; ".join(damages[:10]) + (f"; and {len(damages) - 10} more" if len(damages) > 10 else "")
    count = f"{len(snapshot.files)} files, {snapshot.size:,} bytes: each is the one that was signed"
    checks.append(Check("bytes", not damages, told or count))
    if not damages:
        checks.extend(verify_chain(ListedObjects(snapshot, archive), snapshot, archive.envelope, keys))
    return Verification(tuple(checks), snapshot)


def fresh(snapshot: Snapshot, now: datetime) -> Check:
    """Whether the snapshot is still to be believed at `now`."""
    try:
        require_fresh(snapshot, now)
    except IntegrityError as error:
        return Check("age", False, str(error))
    return Check("age", True, f"made {snapshot.created}, valid until {snapshot.expires}")


def verify_chain(objects: ListedObjects, snapshot: Snapshot, envelope: bytes, keys: Sequence[PublicKey]) -> list[Check]:
    """The ledger, that it goes on trusting who signed the snapshot, and for each release: decision, approval, model,
    history, companions. Reads small files only, unless companions are large."""
    checks: list[Check] = []
    entries: list[LedgerEntry] = []

    def ledger() -> str:
        entries.extend(read_ledger(objects, snapshot, keys))
        signers = {entry.key_id[:12] for entry in entries}
        return f"{len(entries)} entries, an unbroken chain, signed by {', '.join(sorted(signers))}"

    # The site's own ledger says which keys followed those that we were given, and which were revoked.
    for what, prove in (("ledger", ledger), ("signer", lambda: _signer(key_history(entries), envelope, keys))):
        checks.append(_check(what, prove))
        if not checks[-1].ok:
            return checks
    objects.prefetch("steps/", "attestations/", "manifests/")
    policy, artifacts = TrustPolicy.of(keys), ArtifactStore(objects, Path(os.devnull))
    trust = trust_of(policy, _ledger(objects, snapshot, keys), artifacts)
    history = _History(objects, trust)
    for release in snapshot.releases:
        name = short(release.release)
        for what, prove in (
            ("decision", lambda one=release: _decision(objects, entries, one)),
            ("model", lambda one=release: _model(objects, one)),
            ("history", lambda one=release: history.prove(one)),
            ("companions", lambda one=release: _companions(objects, one, trust)),
        ):
            checks.append(_check(f"{what} of {name}", prove))
    return checks


def read_ledger(objects: ListedObjects, snapshot: Snapshot, keys: Sequence[PublicKey]) -> list[LedgerEntry]:
    """The verified entries of the snapshot's ledger. Raises `IntegrityError`, also when its head is another one."""
    entries = _ledger(objects, snapshot, keys).entries()
    if len(entries) != snapshot.ledger.entries or entries[-1].digest != snapshot.ledger.head:
        raise IntegrityError(f"The ledger does not end with entry {snapshot.ledger.entries}, as the snapshot says.")
    return entries


def _ledger(objects: ListedObjects, snapshot: Snapshot, keys: Sequence[PublicKey]) -> Ledger:
    return Ledger(objects, snapshot.ledger.name, nobody(), policy=TrustPolicy.of(keys))


def _signer(history: KeyHistory, envelope: bytes, keys: Sequence[PublicKey]) -> str:
    """No snapshot was ever referred to before a revocation: whoever has the revoked key could have made this one."""
    _, signers = verify_signatures(json.loads(envelope), keys, PAYLOAD_TYPE)
    counting = [key_id for key_id in signers if key_id not in history.revocations]
    if not counting:
        revoked = history.revocations[signers[0]]
        raise IntegrityError(
            f"The snapshot is signed by key {signers[0][:12]}, which {revoked.by} revoked at {revoked.time}: "
            f"{revoked.reason} (ledger entry {revoked.sequence}).",
            hint="Ask that site for a new export, and its people for their new key.",
        )
    return f"the ledger knows of no revocation of key {counting[0][:12]}, which signed the snapshot"


class _History:
    """Step records of a snapshot by what they made, each verified against its signed statement once."""

    def __init__(self, objects: ListedObjects, trust: Trust) -> None:
        self._objects = objects
        self._artifacts = ArtifactStore(objects, Path(os.devnull))
        self._runner = StepRunner(objects, self._artifacts, nobody(), Path(os.devnull), trust=lambda: trust)
        self._makers: dict[str, list[StepRecord]] | None = None
        self._verified: set[str] = set()

    def prove(self, release: ReleaseEntry) -> str:
        """From the adapter and the gate's report back to steps that needed nothing. Raises where a link is missing."""
        adapter = self._artifacts.manifest(release.release)
        steps, leaves = self._walk(release.release)
        gate = next((r for r in self._made(release.report) if r.key.inputs.get("candidate") == release.release), None)
        if gate is None or gate.output.artifacts.get("decision") != release.evidence:
            raise IntegrityError(f"No statement says that the gate judged {short(release.release)} in that report.")
        # The champion it was compared with is another release, with a history of its own.
        champion = gate.key.inputs.get("champion")
        gate_steps, _ = self._walk(release.report, stop=champion if champion != release.release else None)
        if str(adapter.metadata.get("dataset")) != release.dataset or release.dataset not in self._inputs(release):
            raise IntegrityError(f"The adapter was not trained on the dataset {release.dataset} that is named.")
        traces = self._traces(release.dataset)
        names = ", ".join(sorted(leaves))
        return (
            f"{len(steps | gate_steps)} signed statements lead without a gap from {names} through the dataset "
            f"{short(release.dataset)} ({traces}) to the adapter and its gate"
        )

    def _inputs(self, release: ReleaseEntry) -> set[str]:
        return {digest for record in self._made(release.release) for digest in record.key.inputs.values()}

    def _walk(self, digest: str, stop: str | None = None) -> tuple[set[str], set[str]]:
        """Keys of all steps behind an artifact, and the names of those that needed no input."""
        steps: set[str] = set()
        leaves: set[str] = set()
        waiting, seen = [digest], {digest}
        while waiting:
            current = waiting.pop()
            if current == stop:
                continue
            made = self._made(current)
            if not made:
                if self._kind(current) == BASE_KIND:
                    leaves.add("the base model")
                    continue
                raise IntegrityError(f"No statement says where {self._kind(current)} {current} came from.")
            for record in made:
                if record.statement not in self._verified:
                    self._runner.verify(record)
                    self._verified.add(record.statement)
                steps.add(record.key_digest)
                if not record.key.inputs:
                    leaves.add(record.key.name)
                for other in record.key.inputs.values():
                    if other not in seen:
                        seen.add(other)
                        waiting.append(other)
        return steps, leaves

    def _made(self, digest: str) -> list[StepRecord]:
        if self._makers is None:
            self._makers = {}
            for info in self._objects.list("steps/"):
                record = parse_record(info.key, self._objects.get(info.key))
                for made in record.output.artifacts.values():
                    self._makers.setdefault(made, []).append(record)
        return self._makers.get(digest, [])

    def _kind(self, digest: str) -> str:
        try:
            return self._artifacts.manifest(digest).kind
        except ObjectMissing:
            return "artifact"

    def _traces(self, dataset: str) -> str:
        try:
            named = json.loads(self._artifacts.read_file(dataset, "lineage.json"))
            return f"{len(named['traces'])} traces, {len(named['scores'])} scores"
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"The dataset {dataset} does not name its traces: {error!r}.") from error


def _decision(objects: ListedObjects, entries: list[LedgerEntry], release: ReleaseEntry) -> str:
    try:
        found = find_release(entries, release.release)
    except GateRefused as error:
        raise IntegrityError(error.message) from error
    if (found.decision, found.approval, found.report) != (release.decision, release.approval, release.report):
        raise IntegrityError("The snapshot names another decision, approval or report than the ledger.")
    store = ArtifactStore(objects, Path(os.devnull))
    decided = json.loads(store.read_file(release.evidence, "decision.json"))
    if (decided["candidate"], decided["report"]) != (release.release, release.report):
        raise IntegrityError("The gate's decision is about another candidate or report.")
    if found.verdict == "pass" and decided["verdict"] != "pass":
        raise IntegrityError(f"The ledger says pass, but the gate's decision says {decided['verdict']!r}.")
    _require_whole(objects, release.report)
    return f"{_verdict(found)}, approved by {found.approver}" + (", was champion there" if found.was_champion else "")


def _model(objects: ListedObjects, release: ReleaseEntry) -> str:
    files, size = _require_whole(objects, release.release)
    base = release.base
    if str(ArtifactStore(objects, Path(os.devnull)).manifest(release.release).metadata.get("base")) != base.digest:
        raise IntegrityError(f"The adapter was not made for the base model {base.digest} that is named.")
    if base.included:
        _require_whole(objects, base.digest)
    where = "is inside" if base.included else f"is not inside: get {base.source or 'it from that site'}"
    words = " ".join(part for part in (base.name, f"({base.license})" if base.license else "") if part)
    return f"{files} files, {size:,} bytes; its base model {words} {short(base.digest)} {where}"


def _companions(objects: ListedObjects, release: ReleaseEntry, trust: Trust) -> str:
    """The model's signature holds over every file of it, by a key that counts; the bill of materials is whole."""
    if find_companions(objects, release.release) != release.companions:
        raise IntegrityError("The pointers to signature and bill of materials are not those that the snapshot names.")
    for digest in release.companions.values():
        _require_whole(objects, digest)
    told = [f"{kind} {short(digest)} is whole" for kind, digest in sorted(release.companions.items())]
    if "signature" in release.companions:
        told.append(f"the model is signed by key {_signed_model(objects, release, trust)}")
    return ", ".join(told) or f"none ({' and '.join(POINTERS)} would be carried)"


def _signed_model(objects: ListedObjects, release: ReleaseEntry, trust: Trust) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        artifacts = ArtifactStore(objects, Path(scratch))
        (found,) = find_signatures(objects, artifacts, release.release)
        verify_model(artifacts.fetch(release.release), found.data, trust.keys)
        key = signer_of(found.data, trust.keys)
    what = f"The signature of {short(release.release)}"
    trust.require("models", release.kind, [key.key_id], time=found.signed, what=what, identity=release.release)
    return key.short


def _require_whole(objects: ListedObjects, digest: str) -> tuple[int, int]:
    """Number and bytes of an artifact's files, all of them listed in the snapshot under their digests."""
    manifest = ArtifactStore(objects, Path(os.devnull)).manifest(digest)
    for entry in manifest.files:
        found = objects.head(f"blobs/sha256/{hex_of(entry.digest)}")
        if found is None or found.size != entry.size:
            raise IntegrityError(f"{entry.path} of {manifest.kind} {short(digest)} is not in the snapshot.")
    return len(manifest.files), manifest.size


def _verdict(found: Release) -> str:
    if found.verdict == "overridden":
        return f"the gate refused it, {found.person} overrode that at {found.decided} ({found.reason})"
    return f"the gate passed it at {found.decided}"


def _signed(snapshot: Snapshot, envelope: bytes) -> str:
    signer = json.loads(envelope)["signatures"][0]["keyid"][:12]
    return f"snapshot {snapshot.number} of site {snapshot.site!r}, signed by key {signer}"


def _check(name: str, prove: Callable[[], str]) -> Check:
    try:
        return Check(name, True, prove())
    except SluiceError as error:
        return Check(name, False, str(error))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return Check(name, False, f"A signed file has another form than expected: {error!r}.")


def nobody() -> Signer:
    """A key made for this moment: the ledger and the step runner are only read, and nothing is signed by it."""
    from securesystemslib.signer import CryptoSigner

    made = CryptoSigner.generate_ecdsa()
    return Signer(made, PublicKey(str(made.public_key.keyid), str(made.public_key.keyval["public"])))
