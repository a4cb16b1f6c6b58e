"""What may be recorded about releases. Each function checks its rule against the very entries that it appends to.

All take the application's `Ledger` and the `actor` who acts, and return the ledger's entry. Recording the same words
again as the last thing about a release is success and adds nothing, so that a killed process may simply run again.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import get_args

from sluice.infra.errors import ConflictError, GateRefused, InputError
from sluice.provenance.approvals import APPROVERS, Approval, names_of
from sluice.provenance.canonical import Json, require_digest, short
from sluice.provenance.ledger import Draft, Ledger, LedgerEntry
from sluice.provenance.release_state import (
    Authorization,
    ChampionChange,
    Decision,
    Failure,
    ReleaseState,
    RolloutStep,
    StepVerdict,
    Verdict,
    check_verdict,
)
from sluice.provenance.times import parse_time

__all__ = [
    "Approval",
    "Authorization",
    "ChampionChange",
    "Decision",
    "Failure",
    "ReleaseState",
    "RolloutStep",
    "authorize",
    "promote",
    "read_state",
    "record_approval",
    "record_decision",
    "record_failure",
    "record_rejection",
    "record_rollback",
    "record_rollout_step",
]


def read_state(ledger: Ledger) -> ReleaseState:
    """The view of the ledger as it is now, every entry verified."""
    return ReleaseState(ledger.entries())


def authorize(
    ledger: Ledger, release: str, *, now: datetime | None = None, allow_override: bool = False
) -> Authorization:
    """Why a release may be given weight now. Raises `GateRefused` with the exact reason (`ReleaseState.authorize`)."""
    return read_state(ledger).authorize(release, now or datetime.now(UTC), allow_override=allow_override)


def record_decision(
    ledger: Ledger,
    *,
    adapter: str,
    verdict: Verdict,
    report: str,
    expires: str,
    holdout: str | None,
    champion: str | None,
    actor: str,
    approvers: int = 1,
    person: str = "",
    reason: str = "",
    allow_override: bool = False,
) -> LedgerEntry:
    """Record a gate's decision: digests of adapter, report, holdout and champion, an ISO 8601 time of expiry, and how
    many people must approve it (1 or 2).

    Raises `GateRefused` for an `overridden` one without leave, a named person or a reason.
    """
    _require(verdict, get_args(Verdict), "verdict")
    parse_time(expires, "expires")
    if isinstance(approvers, bool) or approvers not in APPROVERS:
        raise InputError(f"approvers = {approvers!r} is neither 1 nor 2.")
    for name, digest in (("adapter", adapter), ("report", report), ("holdout", holdout), ("champion", champion)):
        if digest is not None:
            require_digest(digest, name)
    if verdict == "overridden":
        check_verdict(verdict, person, reason, short(adapter), allow_override=allow_override)
    body = {
        "adapter": adapter,
        "verdict": verdict,
        "report": report,
        "expires": expires,
        "holdout": holdout,
        "champion": champion,
        "approvers": approvers,
        "person": person,
        "reason": reason,
    }
    return ledger.transact(actor, lambda entries: _unless_recorded(entries, "decision", body, adapter, actor))


def record_approval(
    ledger: Ledger,
    *,
    adapter: str,
    approver: str,
    reason: str = "",
    account: str | None = None,
    decision: str | None = None,
    now: datetime | None = None,
    allow_override: bool = False,
) -> LedgerEntry:
    """Approve the latest decision about `adapter`; `decision` is the entry digest that the approver looked at.

    `account` is who acted, when that is not the approver's own account; empty for a name that nobody checked
    (`approvals.Approval`). A person who has approved the decision gets that entry again. Raises `ConflictError` when
    there is a later decision, `GateRefused` when that decision cannot be approved.
    """
    _require_named(approver)
    acted = approver if account is None else account

    def decide(entries: list[LedgerEntry]) -> Draft | LedgerEntry:
        state = ReleaseState(entries)
        state.require_unfailed(adapter)
        given = [one.entry for one in state.approvals_for(adapter) if one.names & names_of(approver, acted)]
        if given and state.approval_for(adapter) is not None:
            # Whatever came after: what this approval let happen may have happened before its answer arrived.
            _require_latest(state.decision_for(adapter), decision, adapter)
            return given[0]
        found = state.require_decision(adapter, now or datetime.now(UTC), allow_override=allow_override)
        _require_latest(found, decision, adapter)
        if given:
            return given[0]
        body = {
            "adapter": adapter,
            "decision": found.entry.digest,
            "approver": approver,
            "account": acted,
            "reason": reason,
        }
        return _unless_recorded(entries, "approval", body, adapter, approver)

    return ledger.transact(approver, decide)


def record_rejection(
    ledger: Ledger, *, adapter: str, approver: str, reason: str, decision: str | None = None
) -> LedgerEntry:
    """Reject a candidate, before or after an approval; only a new decision opens it again."""

    def decide(entries: list[LedgerEntry]) -> Draft | LedgerEntry:
        found = ReleaseState(entries).decision_for(adapter)
        if found is None:
            raise GateRefused(f"Release {short(adapter)} has no gate decision to reject.")
        _require_latest(found, decision, adapter)
        body = {"adapter": adapter, "decision": found.entry.digest, "approver": approver, "reason": reason}
        return _unless_recorded(entries, "rejection", body, adapter, approver)

    return ledger.transact(_require_named(approver), decide)


def record_rollout_step(
    ledger: Ledger,
    *,
    release: str,
    step: int,
    weight: float,
    verdict: StepVerdict,
    analysis: str | None,
    actor: str,
    ordered_by: str = "",
    reason: str = "",
    now: datetime | None = None,
    allow_override: bool = False,
) -> LedgerEntry:
    """Record a canary step: `weight` in percent, and its analysis (digest of the evidence, or None).

    Record it as `pending` before the gateway gets the weight, and again with the verdict after. A larger weight than
    the ledger gives the release so far needs its authorization, no failure, and a passed analysis of the step before:
    `inconclusive` and `pending` hold. Raises `GateRefused` otherwise. The verdict `fail` is a failure of the release.
    A step may pass by order of a person (`ordered_by`, with a `reason`) while its analysis is inconclusive; what has
    failed does not.
    """
    _require(verdict, get_args(StepVerdict), "verdict")
    require_digest(release, "release")
    if isinstance(weight, bool) or not math.isfinite(weight) or not 0 <= weight <= 100:
        raise InputError(f"weight = {weight!r} is not a percentage from 0 to 100.")
    body = {"release": release, "step": step, "weight": weight, "verdict": verdict, "analysis": analysis}
    if ordered_by:
        if verdict != "pass" or not reason.strip():
            raise InputError(f"verdict = {verdict!r}, reason = {reason!r}: an order lets a step pass, and says why.")
        body |= {"ordered_by": ordered_by, "reason": reason}

    def decide(entries: list[LedgerEntry]) -> Draft | LedgerEntry:
        state = ReleaseState(entries)
        if ordered_by:
            state.require_unfailed(release)
        if weight > state.weight(release):
            state.authorize(release, now or datetime.now(UTC), allow_override=allow_override)
            _require_passed(state, release, f"weight {weight}")
        return _unless_recorded(entries, "rollout", body, release, actor)

    return ledger.transact(actor, decide)


def promote(
    ledger: Ledger,
    *,
    release: str,
    expected_champion: str | None,
    actor: str,
    now: datetime | None = None,
    allow_override: bool = False,
) -> LedgerEntry:
    """Make `release` the champion if the champion is still `expected_champion` (None: there was none).

    Raises `ConflictError` naming the actual champion and who put it there, `GateRefused` when the release is not
    authorized or its last canary step did not pass. The same actor promoting the same again gets the entry it made.
    """

    def decide(entries: list[LedgerEntry]) -> Draft | LedgerEntry:
        state = ReleaseState(entries)
        changes = state.history()
        last = changes[-1] if changes else None
        done = ("promotion", release, expected_champion, actor)
        if last and (last.kind, last.release, last.previous, last.entry.actor) == done:
            return last.entry
        if (last.release if last else None) != expected_champion:
            actual = (
                f"{short(last.release)}, by a {last.kind} of {last.entry.actor} at {last.entry.time}" if last else ""
            )
            raise ConflictError(
                f"Release {short(release)} was to replace "
                f"{short(expected_champion) if expected_champion else 'no champion'}, but the champion is "
                f"{actual or 'not chosen yet'}.",
                hint="Evaluate against the present champion, then promote again.",
            )
        if release == expected_champion:
            raise GateRefused(f"Release {short(release)} is the champion already.")
        state.authorize(release, now or datetime.now(UTC), allow_override=allow_override)
        _require_passed(state, release, "promotion")
        return Draft("promotion", {"release": release, "previous": expected_champion})

    return ledger.transact(actor, decide)


def record_rollback(ledger: Ledger, *, release: str, to: str, reason: str, actor: str) -> LedgerEntry:
    """Record that traffic of `release` went back to `to`: the champion when `release` was a canary, an earlier
    champion when it was the champion.

    Raises `ConflictError` when `to` is not that, `GateRefused` when `to` has failed itself. Nothing else is asked:
    going back needs no decision that is still valid.
    """
    body = {"release": require_digest(release, "release"), "to": require_digest(to, "to"), "reason": reason}

    def decide(entries: list[LedgerEntry]) -> Draft | LedgerEntry:
        state = ReleaseState(entries)
        drafted = _unless_recorded(entries, "rollback", body, release, actor)
        if isinstance(drafted, LedgerEntry):
            return drafted
        champion = state.champion()
        allowed = state.previous_champions() if release == champion else [champion]
        if to not in allowed:
            names = ", ".join(short(one) for one in allowed if one) or "none"
            raise ConflictError(f"Release {short(release)} cannot go back to {short(to)}: possible is {names}.")
        if state.failed(to):
            raise GateRefused(f"Release {short(release)} cannot go back to {short(to)}, which has failed.")
        return drafted

    return ledger.transact(actor, decide)


def record_failure(
    ledger: Ledger, *, release: str, reason: str, actor: str, analysis: str | None = None
) -> LedgerEntry:
    """Record that a release failed. It never gets a larger weight again. `analysis` is the digest of the evidence."""
    body = {"release": require_digest(release, "release"), "reason": reason}
    if analysis is not None:
        body["analysis"] = require_digest(analysis, "analysis")
    return ledger.transact(actor, lambda entries: _unless_recorded(entries, "failure", body, release, actor))


def _unless_recorded(
    entries: list[LedgerEntry], kind: str, body: Json, release: str, actor: str
) -> Draft | LedgerEntry:
    """The draft; or the entry itself, when exactly this is the last thing recorded about the release."""
    for entry in reversed(entries):
        if release in (entry.body.get("release"), entry.body.get("adapter"), entry.body.get("to")):
            if (entry.kind, entry.body, entry.actor) == (kind, body, actor):
                return entry
            break
    return Draft(kind, body)


def _require_latest(found: Decision | None, decision: str | None, release: str) -> None:
    if found is not None and decision is not None and decision != found.entry.digest:
        raise ConflictError(
            f"There is a later decision about release {short(release)}: {found.verdict} at {found.entry.time}.",
            hint="Read its report, then approve or reject that one.",
        )


def _require_passed(state: ReleaseState, release: str, wanted: str) -> None:
    steps = state.rollout_steps(release)
    if steps and steps[-1].weight > 0 and steps[-1].verdict != "pass":
        last = steps[-1]
        raise GateRefused(
            f"Release {short(release)} holds at weight {last.weight}: the analysis of step {last.step} is "
            f"{last.verdict!r}, so {wanted} is refused.",
            hint="Run the analysis of that step to a pass, or roll back.",
        )


def _require(value: str, allowed: tuple[str, ...], name: str) -> None:
    if value not in allowed:
        raise InputError(f"{name} = {value!r} is none of {', '.join(allowed)}.")


def _require_named(person: str) -> str:
    if not person.strip():
        raise InputError("approver is empty; an approval or rejection is somebody's word.")
    return person
