"""What the release tests do over and over: decide, admit, make a champion, roll out one step."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sluice.provenance.canonical import digest_bytes
from sluice.provenance.ledger import Ledger, LedgerEntry
from sluice.provenance.release_state import Verdict
from sluice.provenance.releases import promote, read_state, record_approval, record_decision, record_rollout_step

BASE, A, B = (digest_bytes(name) for name in (b"base", b"a", b"b"))
REPORT, HOLDOUT = digest_bytes(b"report"), digest_bytes(b"holdout")
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
LATER = "2026-03-08T12:00:00Z"


def decide(ledger: Ledger, release: str, verdict: Verdict = "pass", **more: Any) -> LedgerEntry:
    fields = {"report": REPORT, "expires": LATER, "holdout": HOLDOUT, "champion": read_state(ledger).champion(), **more}
    return record_decision(ledger, adapter=release, verdict=verdict, actor="gate", **fields)


def admit(ledger: Ledger, release: str) -> None:
    decide(ledger, release)
    record_approval(ledger, adapter=release, approver="ann", now=NOW)


def make_champion(ledger: Ledger, release: str) -> LedgerEntry:
    admit(ledger, release)
    before = read_state(ledger).champion()
    return promote(ledger, release=release, expected_champion=before, actor="ann", now=NOW)


def step(ledger: Ledger, release: str, weight: float, verdict: Any = "pass", number: int = 1) -> LedgerEntry:
    return record_rollout_step(
        ledger, release=release, step=number, weight=weight, verdict=verdict, analysis=None, actor="rollout", now=NOW
    )
