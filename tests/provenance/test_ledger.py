"""The ledger: one winner for each place, and every change to what is written is found and named."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, tzinfo
from pathlib import Path

import pytest

from sluice.infra.errors import ConflictError, InputError, IntegrityError
from sluice.infra.object_store import ObjectExists
from sluice.provenance.attestation import Signer
from sluice.provenance.ledger import Draft, Ledger, LedgerEntry
from tests.support.directory_store import DirectoryStore


def fill(ledger: Ledger, count: int) -> list[LedgerEntry]:
    entries: list[LedgerEntry] = []
    for number in range(count):
        head = entries[-1].digest if entries else None
        entries.append(ledger.append("note", {"number": number}, "ann", expected_head=head))
    return entries


def place(objects: DirectoryStore, sequence: int) -> Path:
    return objects.root / "ledger" / "faq" / f"{sequence:08d}.json"


def test_entries_come_back_in_order_and_chained(ledger: Ledger, object_store: DirectoryStore, signer: Signer) -> None:
    assert ledger.entries() == []
    assert ledger.head() is None
    written = fill(ledger, 4)
    read = Ledger(object_store, "faq", signer).entries()
    assert read == written
    assert [entry.sequence for entry in read] == [1, 2, 3, 4]
    assert [entry.previous for entry in read] == [None, *(entry.digest for entry in read[:-1])]
    assert [entry.body["number"] for entry in read] == [0, 1, 2, 3]
    assert read[0].key_id == signer.public_key.key_id
    assert ledger.head() == read[-1]


def test_append_is_compare_and_swap_and_tells_who_won(ledger: Ledger) -> None:
    first = ledger.append("note", {"by": "ann"}, "ann", expected_head=None)
    with pytest.raises(ConflictError, match=r"ann was first: note at 20.*entry 1"):
        ledger.append("note", {"by": "bob"}, "bob", expected_head=None)
    second = ledger.append("approval", {}, "carl", expected_head=first.digest)
    ledger.append("note", {}, "dora", expected_head=second.digest)
    with pytest.raises(ConflictError, match=r"carl was first: approval at 20"):
        ledger.append("note", {}, "bob", expected_head=first.digest)
    with pytest.raises(ConflictError, match="holds no entry sha256:"):
        ledger.append("note", {}, "bob", expected_head="sha256:" + "0" * 64)
    assert [entry.actor for entry in ledger.entries()] == ["ann", "carl", "dora"]


def test_racing_appends_have_one_winner_for_each_head(object_store: DirectoryStore, signer: Signer) -> None:
    racers = 8
    barrier = threading.Barrier(racers)
    head = Ledger(object_store, "faq", signer).append("note", {}, "ann", expected_head=None).digest

    def race(number: int) -> LedgerEntry | ConflictError:
        ledger = Ledger(object_store, "faq", signer)
        barrier.wait()
        try:
            # The same words in the same moment: what is written still differs.
            return ledger.append("note", {}, "racer", expected_head=head)
        except ConflictError as error:
            return error

    with ThreadPoolExecutor(racers) as pool:
        results = list(pool.map(race, range(racers)))
    won = [result for result in results if isinstance(result, LedgerEntry)]
    assert len(won) == 1
    assert Ledger(object_store, "faq", signer).entries()[1:] == won
    assert all("racer was first" in str(r) for r in results if isinstance(r, ConflictError))


def test_transactions_all_get_in_and_each_sees_all_before_it(object_store: DirectoryStore, signer: Signer) -> None:
    def add(number: int) -> None:
        ledger = Ledger(object_store, "faq", signer)
        for _ in range(4):
            ledger.transact(f"actor-{number}", lambda entries: Draft("count", {"before": len(entries)}))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    assert [e.body["before"] for e in Ledger(object_store, "faq", signer).entries()] == list(range(16))


def test_a_put_whose_answer_was_lost_is_still_ours(
    ledger: Ledger, object_store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = object_store.put

    def lossy(key: str, data: bytes, *, if_absent: bool = False) -> None:
        put(key, data, if_absent=if_absent)
        raise ObjectExists("the client tried again and found the key taken")

    monkeypatch.setattr(object_store, "put", lossy)
    entry = ledger.append("note", {}, "ann", expected_head=None)
    assert ledger.entries() == [entry]


def test_the_same_words_at_the_same_moment_are_still_two_writers(
    ledger: Ledger, object_store: DirectoryStore, signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StandingClock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> StandingClock:
            return cls(2026, 3, 1, tzinfo=tz)

    monkeypatch.setattr("sluice.provenance.ledger.datetime", StandingClock)
    put = object_store.put
    first: list[LedgerEntry] = []

    def overtaken(key: str, data: bytes, *, if_absent: bool = False) -> None:
        monkeypatch.setattr(object_store, "put", put)
        first.append(Ledger(object_store, "faq", signer).append("note", {}, "ann", expected_head=None))
        put(key, data, if_absent=if_absent)

    monkeypatch.setattr(object_store, "put", overtaken)
    with pytest.raises(ConflictError, match="ann was first"):
        ledger.append("note", {}, "ann", expected_head=None)
    assert ledger.entries() == first


def change_byte(objects: DirectoryStore) -> None:
    data = bytearray(place(objects, 2).read_bytes())
    data[data.index(b'"payload":"') + 40] ^= 1
    place(objects, 2).write_bytes(bytes(data))


def drop_middle(objects: DirectoryStore) -> None:
    place(objects, 2).unlink()


def move_entry(objects: DirectoryStore) -> None:
    place(objects, 2).write_bytes(place(objects, 3).read_bytes())


def truncate_bytes(objects: DirectoryStore) -> None:
    place(objects, 2).write_bytes(place(objects, 2).read_bytes()[:-5])


def replace_by_stranger(objects: DirectoryStore) -> None:
    other = DirectoryStore(objects.root.parent / "other")
    stranger = Ledger(other, "faq", Signer.load_or_create(objects.root.parent / "stranger.pem"))
    fill(stranger, 2)
    place(objects, 2).write_bytes(place(other, 2).read_bytes())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_byte, "Entry 2 of ledger 'faq' is not valid: The signature"),
        (drop_middle, "Entry 2 of ledger 'faq' is missing"),
        (move_entry, "Entry 2 of ledger 'faq' was written as entry 3"),
        (truncate_bytes, "Entry 2 of ledger 'faq' cannot be read"),
        (replace_by_stranger, r"Entry 2 of ledger 'faq' is not valid: .* none of them trusted"),
    ],
)
def test_damage_is_found_and_the_entry_named(
    ledger: Ledger,
    object_store: DirectoryStore,
    signer: Signer,
    damage: Callable[[DirectoryStore], None],
    message: str,
) -> None:
    fill(ledger, 3)
    damage(object_store)
    fresh = Ledger(object_store, "faq", signer)
    with pytest.raises(IntegrityError, match=message):
        fresh.entries()
    with pytest.raises(IntegrityError, match=message):
        fresh.append("note", {}, "ann", expected_head=None)


def test_an_entry_rewritten_by_a_trusted_key_breaks_the_chain_after_it(
    ledger: Ledger, object_store: DirectoryStore, signer: Signer
) -> None:
    fill(ledger, 3)
    other = DirectoryStore(object_store.root.parent / "other")
    first = place(object_store, 1).read_bytes()
    place(other, 1).parent.mkdir(parents=True)
    place(other, 1).write_bytes(first)
    forged = Ledger(other, "faq", signer)
    head = forged.head()
    assert head is not None
    forged.append("note", {"number": 99}, "ann", expected_head=head.digest)
    place(object_store, 2).write_bytes(place(other, 2).read_bytes())
    with pytest.raises(IntegrityError, match="Entry 3 of ledger 'faq' follows sha256:"):
        Ledger(object_store, "faq", signer).entries()


def test_an_entry_of_another_ledger_is_refused(ledger: Ledger, object_store: DirectoryStore, signer: Signer) -> None:
    fill(Ledger(object_store, "other", signer), 1)
    place(object_store, 1).parent.mkdir(parents=True)
    place(object_store, 1).write_bytes((object_store.root / "ledger" / "other" / "00000001.json").read_bytes())
    with pytest.raises(IntegrityError, match="was written as entry 1 of ledger 'other'"):
        ledger.entries()


def test_a_cut_end_is_told_to_whoever_read_further_before(ledger: Ledger, object_store: DirectoryStore) -> None:
    entries = fill(ledger, 3)
    last = place(object_store, 3).read_bytes()
    place(object_store, 3).unlink()
    with pytest.raises(IntegrityError, match=r"entry 3 of ledger 'faq' .*was there before and is gone"):
        ledger.entries()
    with pytest.raises(IntegrityError, match="Entry 3 of ledger 'faq' is missing"):
        ledger.append("note", {}, "ann", expected_head=entries[-1].digest)
    place(object_store, 3).write_bytes(last + b" ")
    with pytest.raises(IntegrityError, match=r"entry 3 of ledger 'faq' .*was there before and is gone"):
        ledger.append("note", {}, "ann", expected_head=entries[-1].digest)
    assert not place(object_store, 4).exists()


def test_a_foreign_object_in_the_ledger_is_told(ledger: Ledger, object_store: DirectoryStore) -> None:
    fill(ledger, 1)
    object_store.put("ledger/faq/notes.txt", b"x")
    with pytest.raises(IntegrityError, match=r"'ledger/faq/notes\.txt'"):
        ledger.entries()


def test_a_trusted_colleague_may_continue(
    ledger: Ledger, object_store: DirectoryStore, signer: Signer, tmp_path: Path
) -> None:
    (first,) = fill(ledger, 1)
    other = Signer.load_or_create(tmp_path / "other.pem")
    theirs = Ledger(object_store, "faq", other, trusted_keys=[signer.public_key])
    theirs.append("note", {}, "bob", expected_head=first.digest)
    with pytest.raises(IntegrityError, match="Entry 2"):
        ledger.entries()
    ours = Ledger(object_store, "faq", signer, trusted_keys=[other.public_key])
    assert [entry.actor for entry in ours.entries()] == ["ann", "bob"]


def test_bad_names_and_bodies_are_refused(ledger: Ledger, object_store: DirectoryStore, signer: Signer) -> None:
    for name in ("", "../faq", "FAQ", "a/b"):
        with pytest.raises(InputError, match="ledger name"):
            Ledger(object_store, name, signer)
    with pytest.raises(InputError, match="an object"):
        ledger.append("note", ["list"], "ann", expected_head=None)
    with pytest.raises(InputError, match="actor and a kind"):
        ledger.append("note", {}, "", expected_head=None)
    with pytest.raises(InputError, match="canonical JSON"):
        ledger.append("note", {"weight": float("nan")}, "ann", expected_head=None)
    assert ledger.entries() == []
