"""The ledger: signed entries in a hash chain, appended by compare-and-swap. What is in it was decided, in this order.

An entry lies at `ledger/<name>/<sequence:08d>.json` (from 1) as a DSSE envelope; it names the digest of the entry
before it, so nothing in the middle can be changed, dropped or moved. The next sequence number is taken by a
conditional put: of two writers, one wins. Cutting off the end is seen only by a `Ledger` that has read further
before; keep the bucket's object lock on where that matters.
"""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

from sluice.infra.errors import ConflictError, InputError, IntegrityError
from sluice.infra.object_store import ObjectExists, ObjectMissing, ObjectStore
from sluice.provenance.attestation import PublicKey, Signer
from sluice.provenance.canonical import Json, canonical_json, digest_bytes
from sluice.provenance.trust import NO_HISTORY, KeyHistory, Trust, TrustPolicy

ENTRY_PAYLOAD = "application/vnd.sluice.ledger-entry+json"
_NAME = re.compile(r"^[a-z0-9][a-z0-9._-]{0,62}$")
_READERS = 16
_ATTEMPTS = 1000


@dataclass(frozen=True)
class LedgerEntry:
    """One verified entry. `time` is ISO 8601 UTC, `previous` and `digest` chain the entries' stored bytes."""

    ledger: str
    sequence: int
    previous: str | None
    kind: str
    body: Json
    time: str
    actor: str
    digest: str
    key_id: str
    envelope: Json

    def __str__(self) -> str:
        return f"entry {self.sequence} of ledger {self.ledger!r} ({self.kind} by {self.actor}, {self.time})"


@dataclass(frozen=True)
class Draft:
    """An entry to append: its kind (a noun, as `approval`) and body (a JSON object)."""

    kind: str
    body: Json


class Ledger:
    """One ledger. Safe to share between threads.

    Whose entries count is said by `policy`, or else `trusted_keys` may sign besides `signer`; and by the entries
    themselves, which introduce and revoke keys.
    """

    def __init__(
        self,
        objects: ObjectStore,
        name: str,
        signer: Signer,
        trusted_keys: Iterable[PublicKey] = (),
        policy: TrustPolicy | None = None,
    ) -> None:
        if not _NAME.match(name):
            raise InputError(f"ledger name = {name!r} may hold small letters, digits and . _ - only (at most 63).")
        self.name = name
        self._objects = objects
        self._signer = signer
        self._policy = policy or TrustPolicy.of((signer.public_key, *trusted_keys))
        self._lock = threading.Lock()
        # The longest chain that was verified so far. It only ever grows.
        self._chain: tuple[LedgerEntry, ...] = ()

    def entries(self) -> list[LedgerEntry]:
        """All entries in order, every one read again.

        Raises `IntegrityError` naming the first entry that is missing, changed, moved, not signed by a trusted key,
        or that was there before and is no more.
        """
        before = self._chain
        last = max((self._sequence_of(info.key) for info in self._objects.list(self._prefix)), default=0)
        found: list[LedgerEntry] = []
        history = NO_HISTORY
        with ThreadPoolExecutor(max_workers=_READERS) as pool:
            for sequence, data in enumerate(pool.map(self._read, range(1, last + 1)), start=1):
                known = before[sequence - 1] if sequence <= len(before) else None
                found.append(self._verify(sequence, data, found[-1].digest if found else None, history, known))
                history = _after(history, found[-1])
        if before and (len(found) < len(before) or found[len(before) - 1].digest != before[-1].digest):
            raise self._cut(before[-1])
        self._remember(found)
        return found

    def head(self) -> LedgerEntry | None:
        """The last entry, the whole chain verified; None for an empty ledger."""
        entries = self.entries()
        return entries[-1] if entries else None

    def append(self, kind: str, body: Json, actor: str, *, expected_head: str | None) -> LedgerEntry:
        """Append by compare-and-swap: only if the last entry's digest is `expected_head` (None: only if empty).

        Raises `ConflictError` telling who appended what, and when, in between; then nothing was written.
        """
        entries = self._latest()
        head = entries[-1] if entries else None
        if (head.digest if head else None) != expected_head:
            raise self._lost(entries, expected_head)
        entry = self._write(entries, Draft(kind, body), actor)
        if entry is None:
            raise self._lost(self._latest(), expected_head)
        return entry

    def transact(self, actor: str, decide: Callable[[list[LedgerEntry]], Draft | LedgerEntry]) -> LedgerEntry:
        """Append what `decide` makes of all entries; it is asked anew whenever somebody else was first.

        So a rule that `decide` checks holds for the very entries that the new one follows. It raises to refuse, and
        returns an entry that is there already when there is nothing to add.
        """
        for _ in range(_ATTEMPTS):
            entries = self._latest()
            decided = decide(entries)
            if isinstance(decided, LedgerEntry):
                return decided
            written = self._write(entries, decided, actor)
            if written is not None:
                return written
        raise ConflictError(
            f"The ledger {self.name!r} grew {_ATTEMPTS} times while {actor} tried to append.", hint="Try again."
        )

    def _latest(self) -> list[LedgerEntry]:
        """All entries, of which only those behind the chain known so far are read: for many writers at once."""
        found = list(self._chain)
        if not found:
            return self.entries()
        if digest_bytes(self._read(found[-1].sequence)) != found[-1].digest:
            raise self._cut(found[-1])
        history = key_history(found)
        while True:
            sequence = len(found) + 1
            try:
                data = self._objects.get(self._key(sequence))
            except ObjectMissing:
                break
            found.append(self._verify(sequence, data, found[-1].digest, history))
            history = _after(history, found[-1])
        self._remember(found)
        return found

    def _write(self, entries: list[LedgerEntry], draft: Draft, actor: str) -> LedgerEntry | None:
        """The entry after `entries`, or None when another one took its place."""
        head = entries[-1] if entries else None
        if not actor or not draft.kind:
            raise InputError(f"A ledger entry needs an actor and a kind, not {actor!r} and {draft.kind!r}.")
        if not isinstance(draft.body, dict):
            raise InputError(f"The body of a ledger entry is an object, not {draft.body!r}.")
        sequence = head.sequence + 1 if head else 1
        payload = {
            "ledger": self.name,
            "sequence": sequence,
            "previous": head.digest if head else None,
            "kind": draft.kind,
            "body": draft.body,
            "time": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "actor": actor,
            # Makes our bytes ours: two writers with the same words in the same microsecond still differ.
            "nonce": uuid.uuid4().hex,
        }
        history = key_history(entries)
        # An entry that others refuse would stand in everybody's way: the rules are asked before it is written.
        own = self._signer.public_key.key_id
        what = f"A {draft.kind} for ledger {self.name!r}"
        Trust(self._policy, history).require("ledger", draft.kind, [own], time=str(payload["time"]), what=what)
        data = canonical_json(self._signer.sign(payload, ENTRY_PAYLOAD))
        try:
            self._objects.put(self._key(sequence), data, if_absent=True)
        except ObjectExists:
            # A put whose answer was lost is tried again by the client, and then finds our own entry.
            if self._objects.get(self._key(sequence)) != data:
                return None
        entry = self._verify(sequence, data, head.digest if head else None, history)
        self._remember([*entries, entry])
        return entry

    def _read(self, sequence: int) -> bytes:
        try:
            return self._objects.get(self._key(sequence))
        except ObjectMissing as error:
            raise IntegrityError(f"Entry {sequence} of ledger {self.name!r} is missing.") from error

    def _verify(
        self,
        sequence: int,
        data: bytes,
        previous: str | None,
        history: KeyHistory,
        known: LedgerEntry | None = None,
    ) -> LedgerEntry:
        place = f"Entry {sequence} of ledger {self.name!r}"
        if known is not None and known.previous == previous and known.digest == digest_bytes(data):
            # The same bytes at the same place: their signature was verified before.
            return known
        try:
            envelope = json.loads(data)
            trust = Trust(self._policy, history)
            payload, key_ids = trust.open(envelope, ENTRY_PAYLOAD)
            signed_by = trust.require("ledger", payload["kind"], key_ids, time=payload["time"], what="it")
            entry = LedgerEntry(
                payload["ledger"],
                payload["sequence"],
                payload["previous"],
                payload["kind"],
                payload["body"],
                payload["time"],
                payload["actor"],
                digest_bytes(data),
                signed_by,
                envelope,
            )
        except IntegrityError as error:
            raise IntegrityError(f"{place} is not valid: {error.message}", hint=error.hint) from error
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{place} cannot be read: {error!r}.") from error
        if (entry.ledger, entry.sequence) != (self.name, sequence):
            raise IntegrityError(f"{place} was written as entry {entry.sequence} of ledger {entry.ledger!r}.")
        if entry.previous != previous:
            raise IntegrityError(f"{place} follows {entry.previous}, but the entry before it is {previous}.")
        return entry

    def _lost(self, entries: list[LedgerEntry], expected: str | None) -> ConflictError:
        place = next((index for index, entry in enumerate(entries, start=1) if entry.digest == expected), 0)
        if expected is not None and not place:
            return ConflictError(f"The ledger {self.name!r} holds no entry {expected}, which was expected as its last.")
        first = entries[place]
        return ConflictError(
            f"{first.actor} was first: {first.kind} at {first.time}, entry {first.sequence} of ledger {self.name!r}.",
            hint="Look at the ledger as it is now, and decide again.",
        )

    def _cut(self, entry: LedgerEntry) -> IntegrityError:
        return IntegrityError(f"{entry} was there before and is gone: somebody cut or rewrote the ledger.")

    def _remember(self, chain: list[LedgerEntry]) -> None:
        with self._lock:
            if len(chain) > len(self._chain):
                self._chain = tuple(chain)

    @property
    def _prefix(self) -> str:
        return f"ledger/{self.name}/"

    def _key(self, sequence: int) -> str:
        return f"{self._prefix}{sequence:08d}.json"

    def _sequence_of(self, key: str) -> int:
        match = re.match(r"^([0-9]{8})\.json$", key.removeprefix(self._prefix))
        if match is None or int(match[1]) == 0:
            raise IntegrityError(f"The object {key!r} lies in ledger {self.name!r} and is no entry of it.")
        return int(match[1])


def key_history(entries: Iterable[LedgerEntry]) -> KeyHistory:
    """What verified entries say about keys."""
    history = NO_HISTORY
    for entry in entries:
        history = _after(history, entry)
    return history


def _after(history: KeyHistory, entry: LedgerEntry) -> KeyHistory:
    return history.after(
        kind=entry.kind,
        body=entry.body,
        sequence=entry.sequence,
        time=entry.time,
        actor=entry.actor,
        key_id=entry.key_id,
    )
