"""Invariants 1, 2 and 8 under any order of actions: a machine that tries everything, judged by the bare ledger.

The judge reads entries only and knows nothing of `ReleaseState`: it is a second opinion on the same rules.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sluice.infra.errors import ConflictError, GateRefused
from sluice.provenance.attestation import Signer
from sluice.provenance.canonical import digest_bytes
from sluice.provenance.ledger import Ledger, LedgerEntry
from sluice.provenance.releases import (
    promote,
    read_state,
    record_approval,
    record_decision,
    record_failure,
    record_rejection,
    record_rollback,
    record_rollout_step,
)
from tests.support.directory_store import DirectoryStore

RELEASES = [digest_bytes(name) for name in (b"base", b"a", b"b")]
releases = st.sampled_from(RELEASES)
weights = st.sampled_from([0, 5, 25, 100])


class Judge:
    """Replays entries and says when one breaks an invariant."""

    def __init__(self) -> None:
        self.champion: str | None = None
        self.weight = dict.fromkeys(RELEASES, 0.0)
        self.failed: set[str] = set()
        self.decision: dict[str, LedgerEntry] = {}
        self.approved: dict[str, bool] = dict.fromkeys(RELEASES, False)

    def see(self, entry: LedgerEntry, now: datetime) -> None:
        body: Any = entry.body
        if entry.kind == "decision":
            self.decision[body["adapter"]] = entry
            self.approved[body["adapter"]] = False
        elif entry.kind == "approval":
            assert body["decision"] == self.decision[body["adapter"]].digest
            self.approved[body["adapter"]] = True
        elif entry.kind == "rejection":
            self.approved[body["adapter"]] = False
        elif entry.kind == "failure":
            self.failed.add(body["release"])
        elif entry.kind == "rollout":
            if body["weight"] > self.weight[body["release"]]:
                self.may_grow(body["release"], now)
            self.weight[body["release"]] = body["weight"]
            if body["verdict"] == "fail":
                self.failed.add(body["release"])
        elif entry.kind == "promotion":
            assert body["previous"] == self.champion, "invariant 2"
            self.may_grow(body["release"], now)
            self.move_to(body["release"])
        elif entry.kind == "rollback":
            assert body["to"] not in self.failed, "invariant 8"
            self.approved[body["release"]] = False
            self.weight[body["release"]] = 0.0
            self.move_to(body["to"])

    def may_grow(self, release: str, now: datetime) -> None:
        assert release not in self.failed, "invariant 8"
        if release != self.champion:
            decision: Any = self.decision[release].body
            assert decision["verdict"] == "pass", "invariant 1: passing"
            assert now < datetime.fromisoformat(decision["expires"]), "invariant 1: unexpired"
            assert self.approved[release], "invariant 1: approved"

    def move_to(self, release: str) -> None:
        if release != self.champion:
            self.weight = dict.fromkeys(RELEASES, 0.0)
        self.champion = release
        self.weight[release] = 100.0


class ReleaseMachine(RuleBasedStateMachine):
    signer: Signer

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        # Two writers that know nothing of each other, as two processes would be.
        store = DirectoryStore(self.folder)
        self.ledgers = [Ledger(store, "faq", self.signer), Ledger(store, "faq", self.signer)]
        self.now = datetime(2026, 3, 1, tzinfo=UTC)
        self.judge = Judge()
        self.judged = 0
        self.count = 0

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def attempt(self, action: Callable[[Ledger], LedgerEntry]) -> None:
        self.count += 1
        ledger = self.ledgers[self.count % 2]
        before = len(ledger.entries())
        try:
            action(ledger)
        except (GateRefused, ConflictError):
            assert len(ledger.entries()) == before, "what is refused changes nothing"
        for entry in ledger.entries()[self.judged :]:
            self.judge.see(entry, self.now)
            self.judged += 1

    @rule(release=releases, verdict=st.sampled_from(["pass", "pass", "fail", "inconclusive"]), hours=st.integers(0, 48))
    def decide(self, release: str, verdict: Any, hours: int) -> None:
        self.attempt(
            lambda ledger: record_decision(
                ledger,
                adapter=release,
                verdict=verdict,
                report=digest_bytes(str(self.count).encode()),
                expires=(self.now + timedelta(hours=hours)).isoformat(),
                holdout=None,
                champion=read_state(ledger).champion(),
                actor="gate",
            )
        )

    @rule(release=releases)
    def approve(self, release: str) -> None:
        self.attempt(lambda ledger: record_approval(ledger, adapter=release, approver="ann", now=self.now))

    @rule(release=releases)
    def admit(self, release: str) -> None:
        self.decide(release, "pass", 24)
        self.approve(release)

    @rule(release=releases)
    def reject(self, release: str) -> None:
        self.attempt(lambda ledger: record_rejection(ledger, adapter=release, approver="bob", comment="no"))

    @rule(
        release=releases, weight=weights, verdict=st.sampled_from(["pending", "pass", "pass", "fail", "inconclusive"])
    )
    def roll_out(self, release: str, weight: float, verdict: Any) -> None:
        self.attempt(
            lambda ledger: record_rollout_step(
                ledger,
                release=release,
                step=self.count,
                weight=weight,
                verdict=verdict,
                analysis=None,
                actor="rollout",
                now=self.now,
            )
        )

    @rule(release=releases, expected=st.one_of(st.none(), releases))
    def promote_expecting(self, release: str, expected: str | None) -> None:
        self.attempt(
            lambda ledger: promote(ledger, release=release, expected_champion=expected, actor="ann", now=self.now)
        )

    @rule(release=releases)
    def promote_over_the_champion(self, release: str) -> None:
        self.promote_expecting(release, self.judge.champion)

    @rule(release=releases, to=releases)
    def roll_back(self, release: str, to: str) -> None:
        self.attempt(lambda ledger: record_rollback(ledger, release=release, to=to, reason="slow", actor="ann"))

    @rule(release=releases)
    def fail(self, release: str) -> None:
        self.attempt(lambda ledger: record_failure(ledger, release=release, reason="bad", actor="watch"))

    @rule(hours=st.integers(1, 30))
    def wait(self, hours: int) -> None:
        self.now += timedelta(hours=hours)

    @invariant()
    def the_view_agrees_with_the_judge(self) -> None:
        state = read_state(self.ledgers[0])
        assert state.champion() == self.judge.champion
        for release in RELEASES:
            assert state.weight(release) == self.judge.weight[release]
            assert state.failed(release) == (release in self.judge.failed)


def test_any_order_of_actions_keeps_the_invariants(signer: Signer) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    ReleaseMachine.signer = signer
    run_state_machine_as_test(
        ReleaseMachine, settings=settings(max_examples=12, stateful_step_count=30, deadline=None, database=None)
    )
