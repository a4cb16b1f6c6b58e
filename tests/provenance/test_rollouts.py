"""Rollouts, promotions and rollbacks: failure is absorbing, one promoter wins, going back is always possible."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from sluice.infra.errors import ConflictError, GateRefused, InputError
from sluice.provenance.attestation import Signer
from sluice.provenance.canonical import digest_bytes, short
from sluice.provenance.ledger import Ledger, LedgerEntry
from sluice.provenance.releases import (
    authorize,
    promote,
    read_state,
    record_approval,
    record_failure,
    record_rollback,
)
from tests.provenance.release_actions import BASE, NOW, A, B, admit, decide, make_champion, step
from tests.support.directory_store import DirectoryStore


def test_a_failed_step_is_absorbing(ledger: Ledger) -> None:
    make_champion(ledger, BASE)
    admit(ledger, A)
    step(ledger, A, 5)
    step(ledger, A, 25, "fail", 2)
    assert read_state(ledger).failed(A)
    step(ledger, A, 25, "inconclusive", 3)
    step(ledger, A, 5, "pass", 4)
    for attempt in (
        lambda: step(ledger, A, 6),
        lambda: step(ledger, A, 25),
        lambda: promote(ledger, release=A, expected_champion=BASE, actor="ann", now=NOW),
        lambda: record_approval(ledger, adapter=A, approver="ann", now=NOW),
        lambda: authorize(ledger, A, now=NOW),
    ):
        with pytest.raises(GateRefused, match=r"failed at .*: the analysis of step 2 at weight 25 failed"):
            attempt()
    decide(ledger, A)
    with pytest.raises(GateRefused, match="failed at"):
        authorize(ledger, A, now=NOW)
    record_rollback(ledger, release=A, to=BASE, reason="analysis", actor="rollout")
    with pytest.raises(GateRefused, match="failed at"):
        step(ledger, A, 1)
    step(ledger, A, 0, "fail", 5)


def test_a_failed_champion_loses_its_standing_and_cannot_be_gone_back_to(ledger: Ledger) -> None:
    make_champion(ledger, BASE)
    make_champion(ledger, A)
    record_failure(ledger, release=A, reason="answers in Danish", actor="watch")
    with pytest.raises(GateRefused, match="answers in Danish"):
        authorize(ledger, A, now=NOW)
    make_champion(ledger, B)
    with pytest.raises(GateRefused, match=f"go back to {short(A)}, which has failed"):
        record_rollback(ledger, release=B, to=A, reason="slow", actor="ann")
    record_rollback(ledger, release=B, to=BASE, reason="slow", actor="ann")
    assert read_state(ledger).champion() == BASE


@pytest.mark.parametrize("verdict", ["inconclusive", "pending"])
def test_what_has_not_passed_holds(ledger: Ledger, verdict: str) -> None:
    make_champion(ledger, BASE)
    admit(ledger, A)
    step(ledger, A, 5, verdict)
    with pytest.raises(GateRefused, match=f"holds at weight 5: the analysis of step 1 is '{verdict}'"):
        step(ledger, A, 25)
    with pytest.raises(GateRefused, match="so promotion is refused"):
        promote(ledger, release=A, expected_champion=BASE, actor="ann", now=NOW)
    step(ledger, A, 5, "pass")
    step(ledger, A, 25, verdict, 2)
    step(ledger, A, 0, "inconclusive", 3)
    step(ledger, A, 5, "pass", 1)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1, 101, True])
def test_a_weight_that_is_no_percentage_is_refused(ledger: Ledger, weight: float) -> None:
    admit(ledger, A)
    with pytest.raises(InputError, match="weight = "):
        step(ledger, A, weight)


def test_promotion_names_the_actual_champion(ledger: Ledger) -> None:
    make_champion(ledger, BASE)
    admit(ledger, A)
    admit(ledger, B)
    promote(ledger, release=A, expected_champion=BASE, actor="ann", now=NOW)
    with pytest.raises(ConflictError, match=f"the champion is {short(A)}, by a promotion of ann at 20"):
        promote(ledger, release=B, expected_champion=BASE, actor="bob", now=NOW)
    with pytest.raises(ConflictError, match=f"the champion is {short(A)}"):
        promote(ledger, release=A, expected_champion=BASE, actor="bob", now=NOW)
    with pytest.raises(GateRefused, match="is the champion already"):
        promote(ledger, release=A, expected_champion=A, actor="ann", now=NOW)


def test_running_again_adds_nothing(ledger: Ledger) -> None:
    make_champion(ledger, BASE)
    for _ in range(2):
        admit(ledger, A)
    count = len(ledger.entries())
    # decision, approval, decision, approval: a new decision is news, and asks for a new approval.
    assert count == 3 + 4
    first = record_approval(ledger, adapter=A, approver="ann", now=NOW)
    made = promote(ledger, release=A, expected_champion=BASE, actor="ann", now=NOW)
    assert promote(ledger, release=A, expected_champion=BASE, actor="ann", now=NOW) == made
    back = record_rollback(ledger, release=A, to=BASE, reason="slow", actor="ann")
    assert record_rollback(ledger, release=A, to=BASE, reason="slow", actor="ann") == back
    failed = record_failure(ledger, release=A, reason="slow", actor="ann")
    assert record_failure(ledger, release=A, reason="slow", actor="ann") == failed
    assert first.sequence == count
    assert len(ledger.entries()) == count + 3


def test_a_rollback_ends_the_approval_and_goes_back_one_champion_at_a_time(ledger: Ledger) -> None:
    for release in (BASE, A, B):
        make_champion(ledger, release)
    assert read_state(ledger).previous_champions() == [A, BASE]
    record_rollback(ledger, release=B, to=A, reason="slow", actor="ann")
    state = read_state(ledger)
    assert (state.champion(), state.previous_champions()) == (A, [BASE])
    assert [change.kind for change in state.history()][-1] == "rollback"
    with pytest.raises(GateRefused, match=f"{short(B)} was compared with {short(A)}|has no approval"):
        authorize(ledger, B, now=NOW)
    record_approval(ledger, adapter=B, approver="ann", now=NOW)
    promote(ledger, release=B, expected_champion=A, actor="ann", now=NOW)
    assert read_state(ledger).previous_champions() == [A, BASE]


def test_a_canary_goes_back_to_the_champion_only(ledger: Ledger) -> None:
    make_champion(ledger, BASE)
    make_champion(ledger, A)
    admit(ledger, B)
    step(ledger, B, 5)
    with pytest.raises(ConflictError, match=f"cannot go back to {short(BASE)}: possible is {short(A)}"):
        record_rollback(ledger, release=B, to=BASE, reason="slow", actor="rollout")
    record_rollback(ledger, release=B, to=A, reason="slow", actor="rollout")
    state = read_state(ledger)
    assert (state.champion(), state.weight(A), state.weight(B)) == (A, 100, 0)
    assert len(state.history()) == 2, "the champion did not change"
    with pytest.raises(GateRefused, match="has no approval"):
        step(ledger, B, 5)


def test_two_promoters_one_winner_the_other_told_why(object_store: DirectoryStore, signer: Signer) -> None:
    ledger = Ledger(object_store, "faq", signer)
    make_champion(ledger, BASE)
    candidates = [digest_bytes(f"candidate {number}".encode()) for number in range(6)]
    for candidate in candidates:
        admit(ledger, candidate)
    barrier = threading.Barrier(len(candidates))

    def race(candidate: str) -> LedgerEntry | ConflictError:
        own = Ledger(object_store, "faq", signer)
        barrier.wait()
        try:
            return promote(own, release=candidate, expected_champion=BASE, actor=short(candidate), now=NOW)
        except ConflictError as error:
            return error

    with ThreadPoolExecutor(len(candidates)) as pool:
        results = list(pool.map(race, candidates))
    (winner,) = [result for result in results if isinstance(result, LedgerEntry)]
    assert read_state(ledger).champion() == winner.body["release"]
    losers = [result for result in results if isinstance(result, ConflictError)]
    assert len(losers) == len(candidates) - 1
    assert all(f"by a promotion of {winner.actor}" in loser.message for loser in losers)


def test_an_unrelated_entry_in_between_does_not_lose_a_promotion(ledger: Ledger, object_store: DirectoryStore) -> None:
    make_champion(ledger, BASE)
    admit(ledger, A)
    put = object_store.put
    disturbed: list[str] = []

    def disturbing(key: str, data: bytes, *, if_absent: bool = False) -> None:
        if not disturbed:
            disturbed.append(key)
            decide(ledger, B)
        put(key, data, if_absent=if_absent)

    object_store.put = disturbing  # type: ignore[method-assign]
    promote(ledger, release=A, expected_champion=BASE, actor="ann", now=NOW)
    assert [entry.kind for entry in ledger.entries()][-2:] == ["decision", "promotion"]
    assert read_state(ledger).champion() == A
