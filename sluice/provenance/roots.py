"""What garbage collection starts from: the artifacts that something live names, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from sluice.provenance.ledger import LedgerEntry
from sluice.provenance.release_state import ReleaseState
from sluice.provenance.times import parse_time


@dataclass(frozen=True)
class Roots:
    """What must stay, digests with the reason. From `live` everything behind it stays too; `evidence` stays alone."""

    live: Mapping[str, str] = field(default_factory=dict)
    evidence: Mapping[str, str] = field(default_factory=dict)


def ledger_roots(entries: Iterable[LedgerEntry], now: datetime) -> Roots:
    """What one application's verified ledger keeps: releases that may serve, and the evidence of all decisions.

    Live are the champion, the champions that a rollback may go to, releases with weight, those with an approval, and
    those whose decision has not expired. What a live release's decision rests on stays whole.
    """
    state = ReleaseState(list(entries))
    name = state.entries[0].ledger if state.entries else ""
    live: dict[str, str] = {}
    champion = state.champion()
    if champion is not None:
        live[champion] = f"champion of {name}"
    for release in state.previous_champions():
        live.setdefault(release, f"earlier champion of {name}: a rollback may go there")
    releases = [e.body.get("adapter") or e.body.get("release") for e in state.entries]
    for release in dict.fromkeys(one for one in releases if one):
        decision = state.decision_for(release)
        if state.weight(release) > 0:
            live.setdefault(release, f"release of {name} with users")
        elif state.approval_for(release) is not None and not state.failed(release):
            live.setdefault(release, f"approved release of {name}")
        elif decision is not None and parse_time(decision.expires, "expires") > now:
            live.setdefault(release, f"candidate of {name} with an unexpired decision")
    for entry in state.entries:
        if entry.kind == "import" and state.decision_for(entry.body["release"]) is None:
            live.setdefault(entry.body["release"], f"imported into {name}, not decided on yet")
        if entry.kind == "revocation":
            # Without it nobody can tell any more what that key's signatures still count for.
            live.setdefault(entry.body["kept"], f"what a revoked key of {name} had signed")
    evidence: dict[str, str] = {}
    for entry in state.entries:
        about = entry.body.get("adapter") or entry.body.get("release")
        for part in ("report", "holdout", "analysis"):
            digest = entry.body.get(part)
            if digest and about in live:
                live.setdefault(digest, f"what decided on a live release of {name}")
            elif digest:
                evidence.setdefault(digest, f"evidence in the ledger of {name}")
    return Roots(live, evidence)


def merge_roots(*roots: Roots) -> Roots:
    """All of them; where two give a reason, the first one's."""
    live: dict[str, str] = {}
    evidence: dict[str, str] = {}
    for one in roots:
        for digest, reason in one.live.items():
            live.setdefault(digest, reason)
        for digest, reason in one.evidence.items():
            evidence.setdefault(digest, reason)
    return Roots(live, evidence)
