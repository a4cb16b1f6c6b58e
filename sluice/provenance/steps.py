"""Step records: a step whose key was finished before is never computed again. Our cache and our resume.

Layout in the object store: `steps/<key hex>.json` holds a record, `attestations/sha256/<hex>.json` the signed
statement that it names. A record is written last, by a conditional put: one that can be read has its outputs and its
statement. Records are never overwritten: when the outputs of one are gone, the step is computed again and its new
record is the next edition, `steps/<key hex>.1.json`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from sluice.infra.errors import IntegrityError, StepFailed
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
from sluice.provenance.step_records import StepKey, StepOutput, StepRecord, parse_record, read_records, record_key
from sluice.provenance.trust import KeyRevoked, Trust, TrustPolicy

__all__ = ["StepKey", "StepOutput", "StepRecord", "StepRunner", "read_records"]


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
        trust: Callable[[], Trust] | None = None,
    ) -> None:
        self._objects = objects
        self._artifacts = artifacts
        self._signer = signer
        self._work_dir = work_dir
        everybody = Trust(TrustPolicy.of((signer.public_key, *trusted_keys)))
        self._trust = trust or (lambda: everybody)

    def run(
        self, key: StepKey, function: Callable[[Path], StepOutput], report: Report = no_report
    ) -> tuple[StepRecord, bool]:
        """The step's record, and whether it was there already (then `function` was not needed).

        `function` gets a scratch folder that is the same for the same key on this machine, so that an interrupted
        step finds its partial work; the folder is removed once the record is written. On one machine a key is
        computed by one process at a time, the others wait for it; of two machines that race, the one that records
        first wins and the other returns the winner's record (True). Raises `StepFailed` when an output that
        `function` names is not stored, and whatever `function` raises.
        """
        record, _ = self._find(key, report)
        if record is not None:
            return record, True
        hexadecimal = hex_of(key.digest)[:32]
        folder = self._work_dir / hexadecimal
        with _held(self._work_dir / ".locks" / hexadecimal, report):
            record, edition = self._find(key, no_report)
            hit = record is not None
            if record is None:
                folder.mkdir(parents=True, exist_ok=True)
                record, hit = self._compute(key, edition, folder, function)
            # Under the lock, and after the record: also removes what a process left that was killed in between.
            shutil.rmtree(folder, ignore_errors=True)
        return record, hit

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
        self, key: StepKey, edition: int, folder: Path, function: Callable[[Path], StepOutput]
    ) -> tuple[StepRecord, bool]:
        started = _now()
        # Asked before the work, not after it: a record that others refuse would stand in everybody's way.
        own = self._signer.public_key.key_id
        self._trust().require("steps", key.name, [own], time=started, what=f"A statement of step {key.name!r}")
        output = function(folder)
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
        try:
            self._objects.put(attestation_key(digest), data, if_absent=True)
        except ObjectExists:
            pass
        return digest

    def _missing(self, output: StepOutput) -> str:
        """The first output artifact that is not stored, in words; empty when all are."""
        for name, digest in sorted(output.artifacts.items()):
            if not self._artifacts.exists(digest):
                return f"artifact {name} = {digest}"
        return ""


@contextmanager
def _held(path: Path, report: Report) -> Iterator[None]:
    """Hold an exclusive lock on a file of this machine; the system frees it when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(0, 0, "waiting for another process on this machine that computes the same step")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
