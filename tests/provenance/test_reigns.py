"""Who was champion when, from the ledger alone."""

from __future__ import annotations

from datetime import timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.provenance.ledger import Ledger
from sluice.provenance.releases import ReleaseState, read_state, record_rejection, record_rollback
from sluice.provenance.times import parse_time
from tests.provenance.release_actions import BASE, A, B, make_champion


def test_reigns_follow_each_other_without_a_gap(ledger: Ledger) -> None:
    assert read_state(ledger).reigns() == []
    for release in (BASE, A, B):
        make_champion(ledger, release)
    record_rollback(ledger, release=B, to=A, reason="slow", actor="bob")
    # What is said about a release later did not put it there.
    record_rejection(ledger, adapter=A, approver="bob", reason="too late")
    reigns = read_state(ledger).reigns()
    assert [one.release for one in reigns] == [BASE, A, B, A]
    assert [one.until for one in reigns] == [*(one.since for one in reigns[1:]), None]
    told = [(one.how, one.by, one.approver, one.verdict, one.reason) for one in reigns]
    assert told == [*[("promotion", "ann", "ann", "pass", "")] * 3, ("rollback", "bob", "ann", "pass", "slow")]
    entries = {entry.digest: entry for entry in ledger.entries()}
    assert [entries[one.entry].time for one in reigns] == [one.since for one in reigns]


def test_at_any_moment_at_most_one_was_champion(ledger: Ledger) -> None:
    for release in (BASE, A, B):
        make_champion(ledger, release)
    reigns = ReleaseState(ledger.entries()).reigns()
    first = parse_time(reigns[0].since, "since")
    last = parse_time(reigns[-1].since, "since")

    @settings(max_examples=200, deadline=None, database=None)
    @given(st.integers(-1000, int((last - first) / timedelta(microseconds=1)) + 1000))
    def check(microseconds: int) -> None:
        moment = first + timedelta(microseconds=microseconds)
        there = [one.release for one in reigns if one.covers(moment)]
        assert len(there) == (microseconds >= 0)
        if moment >= last:
            assert there == [B]

    check()
    # At the very moment of a change it is the new one.
    assert [one.release for one in reigns if one.covers(last)] == [B]
