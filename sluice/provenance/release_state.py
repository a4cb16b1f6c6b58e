"""What the ledger's entries mean for releases: a pure view, and the rule that lets a release before users.

A release is named by the digest of its adapter (or base model). Time is given in, never read, and every refusal
says its exact reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sluice.infra.errors import GateRefused, InputError
from sluice.provenance.approvals import APPROVERS, Approval, of_different_people
from sluice.provenance.canonical import short
from sluice.provenance.ledger import LedgerEntry
from sluice.provenance.times import parse_time

Verdict = Literal["pass", "fail", "inconclusive", "overridden"]
StepVerdict = Literal["pending", "pass", "fail", "inconclusive"]


@dataclass(frozen=True)
class Decision:
    """A gate's decision about `release`. `champion` is the release it was compared with; `expires` ISO 8601;
    `approvers` how many people must approve it."""

    entry: LedgerEntry
    release: str
    verdict: str
    report: str
    expires: str
    holdout: str | None
    champion: str | None
    person: str
    reason: str
    approvers: int


@dataclass(frozen=True)
class RolloutStep:
    """One canary step: `weight` in percent of the traffic, and what the analysis said. `ordered_by` is who had it pass
    before the analysis did, with a `reason`; empty for nobody."""

    entry: LedgerEntry
    release: str
    step: int
    weight: float
    verdict: str
    analysis: str | None
    ordered_by: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Failure:
    """Why a release must never get a larger weight again."""

    entry: LedgerEntry
    release: str
    reason: str


@dataclass(frozen=True)
class ChampionChange:
    """One change of the champion: `kind` is `promotion` or `rollback`."""

    entry: LedgerEntry
    release: str
    previous: str | None
    kind: str
    reason: str


@dataclass(frozen=True)
class Reign:
    """A release's time as champion: from `since` until `until` (ISO 8601 UTC; None: still), both from the ledger.

    `how` is `promotion` or `rollback`, `by` who did it. `approver` (both, where two were asked for), `verdict` and
    `reason` are those of the latest decision before it; of a rollback `reason` is why users went back. `entry` is the
    ledger's entry, by its digest.
    """

    release: str
    since: str
    until: str | None
    how: str
    by: str
    approver: str
    verdict: str
    reason: str
    entry: str

    def covers(self, moment: datetime) -> bool:
        """Whether the release was champion at `moment`. At the moment of a change it is the new one."""
        ended = parse_time(self.until, "until") if self.until else None
        return parse_time(self.since, "since") <= moment and (ended is None or moment < ended)


@dataclass(frozen=True)
class Authorization:
    """Why a release may have weight: its decision and approvals, or that it is the champion (`standing`)."""

    release: str
    decision: Decision | None
    approvals: tuple[Approval, ...]
    standing: bool


class ReleaseState:
    """The view over one application's verified ledger entries (`Ledger.entries()`)."""

    def __init__(self, entries: Sequence[LedgerEntry]) -> None:
        self.entries = tuple(entries)

    def champion(self) -> str | None:
        """The release that serves all traffic, by the last promotion or rollback; None before the first."""
        changes = self.history()
        return changes[-1].release if changes else None

    def history(self) -> list[ChampionChange]:
        """All changes of the champion, oldest first."""
        changes: list[ChampionChange] = []
        for entry in self.entries:
            body = entry.body
            if entry.kind == "promotion":
                changes.append(ChampionChange(entry, body["release"], body["previous"], entry.kind, ""))
            elif entry.kind == "rollback" and (not changes or changes[-1].release != body["to"]):
                changes.append(ChampionChange(entry, body["to"], body["release"], entry.kind, body["reason"]))
        return changes

    def reigns(self) -> list[Reign]:
        """Who was champion when, oldest first, without gaps from the first promotion on."""
        changes = self.history()
        found = []
        for number, change in enumerate(changes, start=1):
            until = changes[number].entry.time if number < len(changes) else None
            # What was known when it happened: a later decision or approval did not put it there.
            then = ReleaseState(self.entries[: change.entry.sequence])
            decision = then.decision_for(change.release)
            approvals = then.approvals_for(change.release)
            reason = change.reason or (decision.reason if decision and decision.verdict == "overridden" else "")
            if not reason and approvals:
                reason = approvals[-1].reason
            found.append(
                Reign(
                    change.release,
                    change.entry.time,
                    until,
                    change.kind,
                    change.entry.actor,
                    " and ".join(approval.approver for approval in approvals),
                    decision.verdict if decision else "",
                    reason,
                    change.entry.digest,
                )
            )
        return found

    def previous_champions(self) -> list[str]:
        """Where the champion may go back to, latest first: its predecessors, without those gone back from."""
        line: list[str] = []
        for change in self.history():
            if change.kind == "rollback" and change.release in line:
                while line[-1] != change.release:
                    line.pop()
            else:
                line.append(change.release)
        return [release for release in dict.fromkeys(reversed(line[:-1])) if release != line[-1]]

    def decision_for(self, release: str) -> Decision | None:
        """The latest decision about a release, whatever its verdict."""
        for entry in reversed(self.entries):
            if entry.kind == "decision" and entry.body["adapter"] == release:
                body = entry.body
                return Decision(
                    entry,
                    release,
                    body["verdict"],
                    body["report"],
                    body["expires"],
                    body.get("holdout"),
                    body.get("champion"),
                    body.get("person", ""),
                    body.get("reason", ""),
                    body.get("approvers", 1),
                )
        return None

    def approvals_for(self, release: str) -> tuple[Approval, ...]:
        """The approvals of the latest decision about a release that count, oldest first: at most one of each person,
        and none of before it was last rejected or rolled back."""
        decision = self.decision_for(release)
        given: list[Approval] = []
        for entry in reversed(self.entries):
            body = entry.body
            if (
                decision is None
                or entry.sequence <= decision.entry.sequence
                or (entry.kind == "rollback" and body["release"] == release)
                or (entry.kind == "rejection" and body["adapter"] == release)
            ):
                break
            if (entry.kind, body.get("adapter"), body.get("decision")) == ("approval", release, decision.entry.digest):
                said = (body["approver"], body.get("account", ""), body["reason"])
                given.append(Approval(entry, release, decision.entry.digest, *said))
        return of_different_people(given[::-1], decision.approvers) if decision and given else ()

    def approval_for(self, release: str) -> Approval | None:
        """The approval that completed those of the latest decision; None while one is missing."""
        decision, approvals = self.decision_for(release), self.approvals_for(release)
        complete = decision is not None and decision.approvers in APPROVERS and len(approvals) >= decision.approvers
        return approvals[-1] if complete else None

    def rejection_of(self, release: str) -> LedgerEntry | None:
        """The rejection that came after the latest decision about a release."""
        decision = self.decision_for(release)
        for entry in reversed(self.entries):
            if decision is not None and entry.sequence <= decision.entry.sequence:
                break
            if entry.kind == "rejection" and entry.body["adapter"] == release:
                return entry
        return None

    def failure_of(self, release: str) -> Failure | None:
        """The first failure of a release: recorded as such, or a rollout step whose analysis failed."""
        for entry in self.entries:
            if entry.kind == "failure" and entry.body["release"] == release:
                return Failure(entry, release, entry.body["reason"])
            if entry.kind == "rollout" and entry.body["release"] == release and entry.body["verdict"] == "fail":
                step, weight = entry.body["step"], entry.body["weight"]
                return Failure(entry, release, f"the analysis of step {step} at weight {weight} failed")
        return None

    def failed(self, release: str) -> bool:
        """Whether a release has failed. It stays so: no later entry takes a failure back."""
        return self.failure_of(release) is not None

    def rollout_steps(self, release: str) -> list[RolloutStep]:
        """The steps of a release's present rollout: those since it was last rolled back or promoted."""
        steps: list[RolloutStep] = []
        for entry in self._about(release):
            if entry.kind == "rollout":
                body = entry.body
                said = (body["step"], body["weight"], body["verdict"], body["analysis"])
                steps.append(RolloutStep(entry, release, *said, body.get("ordered_by", ""), body.get("reason", "")))
            else:
                steps = []
        return steps

    def weight(self, release: str) -> float:
        """The share of traffic, in percent, that the ledger gives a release."""
        weight = 0.0
        for entry in self.entries:
            body = entry.body
            if entry.kind == "rollout" and body["release"] == release:
                weight = body["weight"]
            elif entry.kind == "promotion":
                weight = 100.0 if body["release"] == release else 0.0
            elif entry.kind == "rollback" and release in (body["release"], body["to"]):
                weight = 100.0 if body["to"] == release else 0.0
        return weight

    def authorize(self, release: str, now: datetime, *, allow_override: bool = False) -> Authorization:
        """Why `release` may be given weight at `now`. Raises `GateRefused` with the exact reason.

        It may with a passing, unexpired decision that compared it with the present champion, approved since by as many
        people as it asks for and neither rejected nor rolled back after, and without any failure. An `overridden`
        decision counts only with `allow_override`, a named person and a reason. The champion itself may stay when its
        decision expires, or every route would close a week after a promotion; a failure ends that too.
        """
        name = short(release)
        self.require_unfailed(release)
        if self.champion() == release:
            return Authorization(release, self.decision_for(release), self.approvals_for(release), standing=True)
        decision = self.require_decision(release, now, allow_override=allow_override)
        approvals = self.approvals_for(release)
        if not approvals:
            raise GateRefused(
                f"Release {name} has no approval of its decision of {decision.entry.time}.",
                hint="Approve it (again, when it was rolled back or decided anew since).",
            )
        if self.approval_for(release) is None:
            first = approvals[0]
            raise GateRefused(
                f"Release {name} is approved by {first.approver} alone (at {first.entry.time}): its decision asks for "
                f"{decision.approvers} people.",
                hint="Another person must approve it; the same one again counts once.",
            )
        return Authorization(release, decision, approvals, standing=False)

    def require_unfailed(self, release: str) -> None:
        """Raise `GateRefused` for a release that has failed."""
        failure = self.failure_of(release)
        if failure is not None:
            raise GateRefused(
                f"Release {short(release)} failed at {failure.entry.time}: {failure.reason}.",
                hint="A failed release does not come back; train and evaluate a new one.",
            )

    def require_decision(self, release: str, now: datetime, *, allow_override: bool) -> Decision:
        """The latest decision, if one may approve it at `now`; else `GateRefused` with the exact reason.

        One may while it passes, has not expired, was not rejected, and compared with the present champion.
        """
        name = short(release)
        decision = self.decision_for(release)
        if decision is None:
            raise GateRefused(f"Release {name} has no gate decision.", hint="Evaluate it first.")
        check_verdict(decision.verdict, decision.person, decision.reason, name, allow_override=allow_override)
        try:
            expires = parse_time(decision.expires, "expires")
        except InputError as error:
            raise GateRefused(f"The decision about release {name} does not say when it expires.") from error
        if now >= expires:
            raise GateRefused(
                f"The decision about release {name} expired at {decision.expires}.", hint="Evaluate it again."
            )
        rejection = self.rejection_of(release)
        if rejection is not None:
            raise GateRefused(
                f"Release {name} was rejected by {rejection.body['approver']} at {rejection.time}: "
                f"{rejection.body['reason'] or 'no reason given'}.",
                hint="Only a new decision opens it again.",
            )
        champion = self.champion()
        if champion is not None and decision.champion != champion:
            compared = short(decision.champion) if decision.champion else "no champion"
            raise GateRefused(
                f"Release {name} was compared with {compared}, but the champion is {short(champion)} now.",
                hint="Evaluate it against the present champion.",
            )
        if decision.approvers not in APPROVERS:
            raise GateRefused(f"The decision about release {name} asks for {decision.approvers!r} approvers.")
        return decision

    def _about(self, release: str) -> Iterator[LedgerEntry]:
        """Entries that move the traffic of a release, oldest first."""
        for entry in self.entries:
            body = entry.body
            if (entry.kind in ("rollout", "promotion", "rollback") and body["release"] == release) or (
                entry.kind == "rollback" and body["to"] == release
            ):
                yield entry


def check_verdict(verdict: str, person: str, reason: str, name: str, *, allow_override: bool) -> None:
    """Nothing, when a decision lets its release through; else `GateRefused` with the exact reason."""
    if verdict == "overridden":
        if not allow_override:
            raise GateRefused(
                f"The gate refused release {name}, and overriding it is not allowed here.",
                hint="The policy's allow_override is off.",
            )
        if not person.strip() or not reason.strip():
            raise GateRefused(f"The override for release {name} needs a named person and a reason.")
    elif verdict != "pass":
        raise GateRefused(f"The gate's verdict about release {name} is {verdict!r}, not 'pass'.")
