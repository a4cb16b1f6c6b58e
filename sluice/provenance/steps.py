"""Step records: a step whose key was finished before is never computed again. Our cache and our resume.

Layout in the object store: `steps/<key hex>.json` holds a record, `attestations/sha256/<hex>.json` the signed
statement that it names, `code/sha256/<hex>.json` the digests of the files behind a code digest, where they are known.
A record is written last, by a conditional put: one that can be read has its outputs and its statement. Records are
never overwritten: when the outputs of one are gone, the step is computed again and its new record is the next
edition, `steps/<key hex>.1.json`.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from sluice.infra.errors import IntegrityError, StepFailed
from sluice.infra.file_lock import held
from sluice.infra.object_store import ObjectExists, ObjectMissing, ObjectStore
from sluice.infra.progress import Report, no_report
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.attestation import (
    Execution,
    PublicKey,
    Signer,
    attestation_key,
    check_statement,
    host_name,
    statement,
)
from sluice.provenance.canonical import Json, canonical_json, digest_bytes, digest_json, hex_of, require_digest
from sluice.provenance.code import lock_digests
from sluice.provenance.collecting import is_aging, wait_for_collector
from sluice.provenance.lease import Lease, Leases
from sluice.provenance.step_records import StepKey, StepOutput, StepRecord, parse_record, read_records, record_key
from sluice.provenance.trust import KeyRevoked, Trust, TrustPolicy

__all__ = ["StepKey", "StepOutput", "StepRecord", "StepRunner", "read_records"]

_WAITING = "waiting for another process on this machine that computes the same step"


class StepRunner:
    """Runs steps once. `work_dir` holds the scratch folders.

    Whose records count is what `trust` says when it is asked, or else `trusted_keys` may sign besides `signer`.
    """

    def __init__(
        self,
        objects: ObjectStore,
        artifacts: ArtifactStore,
        signer: Signer,
        work_dir: Path,
        trusted_keys: Iterable[PublicKey] = (),
        leases: Leases | None = None,
        trust: Callable[[], Trust] | None = None,
    ) -> None:
        self._objects = objects
        self._artifacts = artifacts
        self._signer = signer
        self._work_dir = work_dir
        self._leases = leases or Leases(objects)
        everybody = Trust(TrustPolicy.of((signer.public_key, *trusted_keys)))
        self._trust = trust or (lambda: everybody)

    def run(
        self,
        key: StepKey,
        function: Callable[[Path], StepOutput],
        report: Report = no_report,
        sources: Json | None = None,
    ) -> tuple[StepRecord, bool]:
        """The step's record, and whether it was there already (then `function` was not needed).

        `function` gets a scratch folder that is the same for the same key on this machine, so that an interrupted
        step finds its partial work; the folder is removed once the record is written. A key is computed by one
        process at a time: the others of this machine wait for a file lock, other machines for a lease in the object
        store, and all return the one record (True). A machine that was cut off for longer than its lease may compute
        in vain: the record that is written first holds, and it returns that one. `sources` are the files behind the
        key's code digest (`code_sources`): kept, so that `sluice why` can say which one changed. Raises `StepFailed`
        when an output that `function` names is not stored, and whatever `function` raises.
        """
        record, edition = self._find(key, report)
        if record is not None and self._claim(record, edition):
            return record, True
        hexadecimal, folder = hex_of(key.digest), self.folder(key)
        with (
            held(self._work_dir / ".locks" / hexadecimal[:32], lambda: report(0, 0, _WAITING)),
            self._leases.hold(hexadecimal, until=lambda: self._recorded(key), report=report) as lease,
        ):
            # Again, under the lease: the one who held it before may have recorded just now.
            record, edition = self._find(key, no_report)
            hit = record is not None and self._claim(record, edition)
            if record is None or not hit:
                folder.mkdir(parents=True, exist_ok=True)
                if sources is not None and digest_json(sources) == key.code:
                    _put_once(self._objects, code_key(key.code), canonical_json(sources))
                record, hit = self._compute(key, edition, folder, function, lease, report)
            # Under the lock, and after the record: also removes what a process left that was killed in between.
            shutil.rmtree(folder, ignore_errors=True)
        return record, hit

    def folder(self, key: StepKey) -> Path:
        """The scratch folder of a step on this machine. It is there from the step's start to its record."""
        return self._work_dir / hex_of(key.digest)[:32]

    def find(self, key: StepKey) -> StepRecord | None:
        """The record of a finished step whose outputs are all stored, its statement verified; else None.

        Raises `IntegrityError` when the record or its statement is not what was signed.
        """
        return self._find(key, no_report)[0]

    def records(self) -> Iterator[StepRecord]:
        """All records, as `read_records` gives them. `verify` checks the statement of one."""
        return read_records(self._objects)

    def verify(self, record: StepRecord) -> Json:
        """The record's signed statement, verified and found to attest this record. Raises `IntegrityError`."""
        place = f"{record.statement} of step {record.key.name!r}"
        try:
            data = self._objects.get(attestation_key(record.statement))
        except ObjectMissing as error:
            raise IntegrityError(f"The statement {place} is gone.") from error
        if digest_bytes(data) != record.statement:
            raise IntegrityError(f"The statement {place} is damaged: its digest is {digest_bytes(data)}.")
        try:
            trust = self._trust()
            payload, key_ids = trust.open(json.loads(data))
            found = check_statement(payload)
        except IntegrityError as error:
            raise IntegrityError(f"The statement {place} is not valid: {error.message}", hint=error.hint) from error
        trust.require(
            "steps",
            record.key.name,
            key_ids,
            time=record.finished,
            what=f"The statement {place}",
            identity=record.statement,
        )
        try:
            execution = found["predicate"]["runDetails"]["metadata"]
            definition = found["predicate"]["buildDefinition"]
            attested = (
                sorted((one["name"], one["digest"]["sha256"]) for one in found["subject"]),
                definition["internalParameters"]["stepKey"],
                definition["internalParameters"]["host"],
                (execution["startedOn"], execution["finishedOn"]),
            )
        except (KeyError, TypeError) as error:
            raise IntegrityError(f"The statement {place} lacks a field: {error!r}.") from error
        outputs = [(name, hex_of(digest)) for name, digest in record.output.artifacts.items()]
        outputs.append(("values", hex_of(digest_json(dict(record.output.values)))))
        if attested != (sorted(outputs), record.key_digest, record.host, (record.started, record.finished)):
            raise IntegrityError(
                f"The record of step {record.key.name!r} says something else than its statement {place}."
            )
        return found

    def _claim(self, record: StepRecord, edition: int) -> bool:
        """Keep the collector away from what a hit relies on; False when it was faster and an output is gone."""
        place = record_key(record.key_digest, edition)
        found = self._objects.head(place)
        if found is None or is_aging(found.modified):
            self._objects.put(place, canonical_json(record.to_json()))
        waited = wait_for_collector(self._objects, record.output.artifacts.values())
        return not (waited and self._missing(record.output))

    def _recorded(self, key: StepKey) -> bool:
        return self._find(key, no_report)[0] is not None

    def _find(self, key: StepKey, report: Report) -> tuple[StepRecord | None, int]:
        """The latest edition whose outputs exist, or None and the number of the edition to write."""
        edition = 0
        while True:
            place = record_key(key.digest, edition)
            try:
                record = parse_record(place, self._objects.get(place))
            except ObjectMissing:
                return None, edition
            gone = self._missing(record.output)
            if not gone:
                try:
                    self.verify(record)
                    return record, edition
                except KeyRevoked as error:
                    report(0, 0, f"computing {key.name} again: {error.message}")
            else:
                report(0, 0, f"{key.name} was finished before, but {gone} is no longer stored: computing it again")
            edition += 1

    def _compute(
        self,
        key: StepKey,
        edition: int,
        folder: Path,
        function: Callable[[Path], StepOutput],
        lease: Lease | None,
        report: Report,
    ) -> tuple[StepRecord, bool]:
        started = _now()
        # Asked before the work, not after it: a record that others refuse would stand in everybody's way.
        own = self._signer.public_key.key_id
        self._trust().require("steps", key.name, [own], time=started, what=f"A statement of step {key.name!r}")
        output = function(folder)
        if lease is None or lease.lost:
            # The result is as good as any, and the first record wins as always; but somebody may have been faster.
            report(0, 0, f"the lease on {key.name} was lost meanwhile: looking for another machine's record")
            record, edition = self._find(key, no_report)
            if record is not None:
                return record, True
        canonical_json(dict(output.values))
        for name, digest in output.artifacts.items():
            require_digest(digest, f"output {name} of step {key.name}")
        gone = self._missing(output)
        if gone:
            raise StepFailed(f"The step {key.name!r} names {gone} as its output, which is not stored.")
        if "values" in output.artifacts:
            raise StepFailed(f"The step {key.name!r} calls an artifact 'values', the name kept for its plain values.")
        execution = Execution(uuid.uuid4().hex, started, _now(), host_name())
        record = StepRecord(
            key, output, started, execution.finished, execution.host, self._attest(key, output, execution)
        )
        data = canonical_json(record.to_json())
        while True:
            place = record_key(key.digest, edition)
            try:
                self._objects.put(place, data, if_absent=True)
                return record, False
            except ObjectExists:
                stored = self._objects.get(place)
            # A put whose answer was lost is tried again by the client, and then finds our own record.
            if stored == data:
                return record, False
            winner = parse_record(place, stored)
            if not self._missing(winner.output):
                self.verify(winner)
                return winner, True
            edition += 1

    def _attest(self, key: StepKey, output: StepOutput, execution: Execution) -> str:
        envelope = self._signer.sign(
            check_statement(
                statement(
                    step=key.name,
                    step_key=key.digest,
                    code=key.code,
                    parameters=key.parameters,
                    inputs=key.inputs,
                    artifacts=output.artifacts,
                    values=output.values,
                    execution=execution,
                    locks=lock_digests(),
                )
            )
        )
        data = canonical_json(envelope)
        digest = digest_bytes(data)
        _put_once(self._objects, attestation_key(digest), data)
        return digest

    def _missing(self, output: StepOutput) -> str:
        """The first output artifact that is not stored, in words; empty when all are."""
        for name, digest in sorted(output.artifacts.items()):
            if not self._artifacts.exists(digest):
                return f"artifact {name} = {digest}"
        return ""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def code_key(code: str) -> str:
    """Where the files behind a code digest are listed; the object's own digest is the code digest."""
    return f"code/sha256/{hex_of(code)}.json"


def _put_once(objects: ObjectStore, key: str, data: bytes) -> None:
    # The key is the content's digest: what is there already is the same.
    try:
        objects.put(key, data, if_absent=True)
    except ObjectExists:
        pass
