"""What lets a release leave its site: a passing decision about this very digest, and an approval of that decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sluice.infra.errors import GateRefused
from sluice.provenance.canonical import short
from sluice.provenance.ledger import LedgerEntry
from sluice.provenance.release_state import ReleaseState, check_verdict


@dataclass(frozen=True)
class Release:
    """Why a release may leave. `decision` and `approval` are digests of ledger entries, `report` of the artifact;
    `person` overrode the gate, where one did; `expires` is the decision's, ISO 8601."""

    release: str
    decision: str
    verdict: str
    person: str
    reason: str
    report: str
    expires: str
    decided: str
    approval: str
    approver: str
    champion: str | None
    approvers: int
    was_champion: bool


def find_release(entries: Sequence[LedgerEntry], release: str) -> Release:
    """What the ledger says for a release. Raises `GateRefused` with the exact reason when it may not leave.

    The decision may have expired: that ends the time in which it could be approved, not what was shown.
    """
    state = ReleaseState(entries)
    name = short(release)
    failure = state.failure_of(release)
    if failure is not None:
        raise GateRefused(f"Release {name} failed at {failure.entry.time}: {failure.reason}.")
    decision = state.decision_for(release)
    if decision is None:
        raise GateRefused(f"Release {name} has no gate decision.", hint="Evaluate it first.")
    check_verdict(decision.verdict, decision.person, decision.reason, name, allow_override=True)
    approval = state.approval_for(release)
    approvals = state.approvals_for(release)
    if approval is None:
        which = "only half of the approvals" if approvals else "no approval"
        raise GateRefused(
            f"Release {name} has {which} of its decision of {decision.entry.time}.",
            hint="Only what people approved, and nobody rejected or rolled back since, leaves this site.",
        )
    return Release(
        release,
        decision.entry.digest,
        decision.verdict,
        decision.person,
        decision.reason,
        decision.report,
        decision.expires,
        decision.entry.time,
        approval.entry.digest,
        " and ".join(one.approver for one in approvals),
        decision.champion,
        decision.approvers,
        any(change.release == release for change in state.history()),
    )


def find_releases(entries: Sequence[LedgerEntry]) -> list[str]:
    """All releases that may leave, in the order of their first decision."""
    decided = dict.fromkeys(str(entry.body["adapter"]) for entry in entries if entry.kind == "decision")
    found = []
    for release in decided:
        try:
            find_release(entries, release)
        except GateRefused:
            continue
        found.append(release)
    return found
