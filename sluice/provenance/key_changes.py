"""Rotation and revocation: how the keys of an installation change, recorded in its ledger."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from sluice.infra.errors import ConflictError, InputError
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import Json, canonical_json, is_digest
from sluice.provenance.keys import PublicKey, Signer, create_key, write_once
from sluice.provenance.ledger import Draft, Ledger, LedgerEntry, key_history
from sluice.provenance.step_records import StepRecord
from sluice.provenance.trust import OWN, Trust, TrustPolicy

KEPT_FILE = "kept.json"


def trust_of(policy: TrustPolicy, ledger: Ledger, artifacts: ArtifactStore) -> Trust:
    """The trust of this moment: the policy, with what the verified ledger says about keys."""
    history = key_history(ledger.entries())
    kept = {
        key_id: frozenset(json.loads(artifacts.read_file(found.kept, KEPT_FILE)))
        for key_id, found in history.revocations.items()
    }
    return Trust(policy, history, kept)


def rotate(ledger: Ledger, signer: Signer, trusted: Path, actor: str) -> PublicKey:
    """Put a new key in the place of `signer`'s file; the old one introduces it in the ledger, and stays trusted.

    Killed at any point, doing it again goes on with the same new key. The old private key is gone afterwards. Raises
    `InputError` for a key that lies on a token or in a folder that cannot be written.
    """
    if signer.file is None:
        raise InputError(
            "The signing key lies on a token, where Sluice makes no keys.",
            hint="Make one there, add the old public key to keys/trusted, and change signing.pkcs11_uri.",
        )
    staged = signer.file.with_name("next.pem")
    old = signer.public_key
    try:
        create_key(staged)
        new = Signer.load_or_create(staged).public_key
        body = {"key": new.key_id, "pem": new.pem, "previous": old.key_id}

        def introduce(entries: list[LedgerEntry]) -> Draft | LedgerEntry:
            said = (one for one in entries if one.kind == "rotation" and one.body == body)
            return next(said, None) or Draft("rotation", body)

        ledger.transact(actor, introduce)
        trusted.mkdir(parents=True, exist_ok=True)
        write_once(trusted / f"{OWN}.{old.short}.pub", old.pem.encode(), 0o644)
        # The private key last: until it is in place, the old one signs, and both are trusted.
        os.replace(staged.with_name(staged.name + ".pub"), signer.file.with_name(signer.file.name + ".pub"))
        os.replace(staged, signer.file)
    except OSError as error:
        raise InputError(
            f"The signing key {signer.file} cannot be replaced: {error.strerror or error}.",
            hint="A mounted secret is rotated where it is made; add the old public key to keys/trusted.",
        ) from error
    return new


def revoke(
    ledger: Ledger,
    artifacts: ArtifactStore,
    records: Callable[[], Iterable[StepRecord]],
    key: PublicKey,
    *,
    signer: Signer,
    reason: str,
    actor: str,
) -> LedgerEntry:
    """End the trust in a key. What the ledger refers to up to now goes on counting, everything else it signed does not.

    Raises `ConflictError` for the key that signs here now, `InputError` without a reason.
    """
    if key.key_id == signer.public_key.key_id:
        raise ConflictError(
            f"Key {key.short} signs here now, and a revoked key cannot even sign its revocation.",
            hint="`sluice keys rotate` first.",
        )
    if not reason.strip():
        raise InputError("reason is empty: a revocation says why.")

    def decide(entries: list[LedgerEntry]) -> Draft | LedgerEntry:
        known = key_history(entries).revocations.get(key.key_id)
        if known is not None:
            return entries[known.sequence - 1]
        content = canonical_json(sorted(referred_to(entries, records())))
        kept = artifacts.put_files({KEPT_FILE: content}, "revocation", {"key": key.key_id})
        return Draft("revocation", {"key": key.key_id, "reason": reason, "kept": kept.digest})

    return ledger.transact(actor, decide)


def referred_to(entries: Iterable[LedgerEntry], records: Iterable[StepRecord]) -> set[str]:
    """Digests that entries name, those of all that these came from, and of the statements about them.

    The list is made once, when a key is revoked, and kept by digest: what somebody adds to the object store later, in
    the name of an old step, is not on it.
    """
    makers: dict[str, list[StepRecord]] = {}
    for record in records:
        for digest in record.output.artifacts.values():
            makers.setdefault(digest, []).append(record)
    found = {digest for entry in entries for digest in _digests(entry.body)}
    waiting = list(found)
    while waiting:
        for record in makers.get(waiting.pop(), ()):
            found.add(record.statement)
            new = set(record.key.inputs.values()) - found
            found |= new
            waiting.extend(new)
    return found


def _digests(value: Json) -> Iterator[str]:
    if isinstance(value, str):
        if is_digest(value):
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _digests(item)
    elif isinstance(value, list):
        for item in value:
            yield from _digests(item)
