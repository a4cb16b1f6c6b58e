"""What a ledger keeps from garbage collection, and why."""

from __future__ import annotations

from datetime import timedelta

from sluice.provenance.canonical import digest_bytes
from sluice.provenance.ledger import Ledger
from sluice.provenance.releases import record_failure, record_rollback
from sluice.provenance.roots import Roots, ledger_roots, merge_roots
from tests.provenance.release_actions import NOW, admit, decide, make_champion


def test_what_a_revoked_key_had_signed_stays(ledger: Ledger) -> None:
    kept = digest_bytes(b"kept")
    ledger.append("revocation", {"key": "0" * 64, "reason": "lost", "kept": kept}, "ann", expected_head=None)
    assert kept in ledger_roots(ledger.entries(), NOW).live


def test_an_import_waits_for_its_decision(ledger: Ledger) -> None:
    waiting, refused = (digest_bytes(name) for name in (b"waiting", b"refused"))
    for release in (waiting, refused):
        head = ledger.head()
        body = {"release": release, "site": "north", "snapshot": 1, "decision": release, "verdict": "pass"}
        ledger.append("import", body, "ann", expected_head=head.digest if head else None)
    decide(ledger, refused, "fail")
    roots = ledger_roots(ledger.entries(), NOW + timedelta(days=30))
    assert waiting in roots.live
    assert refused not in roots.live


def test_the_ledger_keeps_every_release_that_may_serve_and_the_evidence(ledger: Ledger) -> None:
    names = ["base", "old", "champion", "failed", "expired", "fresh", "approved"]
    base, old, champion, failed, expired, fresh, approved = (digest_bytes(name.encode()) for name in names)
    reports = {one: digest_bytes(f"report on {one}".encode()) for one in (failed, expired, fresh)}
    for one in (base, old, champion):
        make_champion(ledger, one)
    decide(ledger, failed, report=reports[failed])
    record_failure(ledger, release=failed, reason="bad", actor="watch")
    decide(ledger, expired, report=reports[expired])
    admit(ledger, approved)
    decide(ledger, fresh, report=reports[fresh], expires="2026-04-01T00:00:00Z")
    later = NOW + timedelta(days=20)
    found = ledger_roots(ledger.entries(), later)
    assert set(names) == {"base", "old", "champion", "failed", "expired", "fresh", "approved"}
    assert {one for one in (base, old, champion, failed, expired, fresh, approved) if one in found.live} == {
        base,
        old,
        champion,
        fresh,
        approved,
    }
    assert reports[fresh] in found.live
    assert {reports[failed], reports[expired]} <= set(found.evidence)
    record_rollback(ledger, release=champion, to=old, reason="slow", actor="ann")
    assert ledger_roots(ledger.entries(), later).live[old] == "champion of faq"


def test_two_reasons_for_one_root_are_one() -> None:
    digest = digest_bytes(b"x")
    merged = merge_roots(Roots({digest: "first"}), Roots({digest: "second"}, {digest: "third"}))
    assert merged == Roots({digest: "first"}, {digest: "third"})
