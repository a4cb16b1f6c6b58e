"""A person's yes or no to a version, said on its page in MLflow; and what the page says back.

A person sets the version's tag `approval` to `approved` or `rejected` (with `approval.by` and `approval.reason`), or
puts the alias `approved` on it. That alias is nobody else's: `challenger` and the others are moved by releases too, and
a move that broke off halfway must never pass for somebody's approval. Tags and aliases prove nothing: the caller checks
the decision, writes the signed approval to the ledger, and then calls `show`, by which the page says what the ledger
holds. `approval.recorded` notes what we last wrote into `approval`: so a person's word can be told from ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sluice.infra.errors import GateRefused
from sluice.infra.markdown import plain
from sluice.provenance.canonical import short
from sluice.provenance.ledger import LedgerEntry
from sluice.provenance.release_state import Decision, ReleaseState
from sluice.registry.mlflow_registry import MlflowRegistry, RegistryMissing
from sluice.registry.page_note import put_note
from sluice.registry.versions import BLOCKED, UNGATED, WAITING, Version, get_version, set_tag

ApprovalState = Literal["approved", "rejected"]

TAG, ANSWER = "approval", "approval.answer"
APPROVED_ALIAS = "approved"
APPROVED: ApprovalState = "approved"
REJECTED: ApprovalState = "rejected"
HALF, EXPIRED, OUTDATED, FAILED = "1 of 2", "expired", "outdated", "release failed"
OPEN = (WAITING, HALF)
"""What the tag says while a person may still decide."""

UNNAMED = "somebody in MLflow"
_LENGTH = 2000
_OURS = ("", UNGATED, WAITING, BLOCKED, HALF, EXPIRED, OUTDATED, FAILED)
_WORDS: dict[str, ApprovalState] = {
    "approved": APPROVED, "approve": APPROVED, "yes": APPROVED,
    "rejected": REJECTED, "reject": REJECTED, "no": REJECTED,
}  # fmt: skip


@dataclass(frozen=True)
class Standing:
    """How the approval of a version stands by the ledger: the tag's `word`, and a sentence for people. `by` and
    `reason` are of who approved or rejected it."""

    word: str
    sentence: str
    by: str = ""
    reason: str = ""


@dataclass(frozen=True)
class UiWord:
    """What a person said on a version's page; `state` is None for a word that is neither yes nor no."""

    text: str
    state: ApprovalState | None
    approver: str
    reason: str


def standing_of(state: ReleaseState, release: str, now: datetime, *, allow_override: bool) -> Standing:
    """What the page of a release has to say about its approval at `now`."""
    decision = state.decision_for(release)
    if decision is None:
        return Standing(UNGATED, f"Release {short(release)} has no gate decision.")
    failure, rejection = state.failure_of(release), state.rejection_of(release)
    approvals = state.approvals_for(release)
    by = " and ".join(one.approver for one in approvals)
    if failure is not None:
        return Standing(FAILED, f"The release failed at {_when(failure.entry)}: {failure.reason}.")
    if rejection is not None:
        who, why = rejection.body["approver"], rejection.body["reason"]
        return Standing(REJECTED, f"Rejected by {who} at {_when(rejection)}.", who, why)
    if state.approval_for(release) is not None:
        last = approvals[-1]
        return Standing(APPROVED, f"Approved by {by} at {_when(last.entry)}.", by, last.reason)
    try:
        state.require_decision(release, now, allow_override=allow_override)
    except GateRefused as refusal:
        return Standing(_closed(state, decision, allow_override), str(refusal))
    if not approvals:
        return Standing(WAITING, f"It waits for {'two people' if decision.approvers > 1 else 'a person'}.")
    first = approvals[0]
    how = (
        "Another person must approve it too."
        if first.account
        else "Another person must approve it with `sluice approve`: all who approve in MLflow, where nobody checks "
        "names, count as one person."
    )
    return Standing(HALF, f"Approved by {by} at {_when(first.entry)}; the decision asks for two people. {how}", by)


def read_ui_word(version: Version) -> UiWord | None:
    """What a person said on the page, as far as it is not what we wrote there; None when nobody said anything."""
    tags = version.tags
    text = tags.get(TAG, "").strip()
    if text.lower() in _OURS or text == tags.get("approval.recorded"):
        text = ""
    if not text and APPROVED_ALIAS not in version.aliases:
        return None
    approver = tags.get("approval.by", "").strip() or UNNAMED
    state = _WORDS.get(text.lower()) if text else APPROVED
    return UiWord(text or f"alias {APPROVED_ALIAS}", state, approver, tags.get("approval.reason", "").strip())


def is_shown(version: Version, standing: Standing) -> bool:
    """Whether the page says what the ledger holds."""
    said, recorded = version.tags.get(TAG, ""), version.tags.get("approval.recorded")
    decided = standing.word in (APPROVED, REJECTED)
    return said == standing.word and (recorded == said or (recorded is None and not decided))


def show(registry: MlflowRegistry, version: Version, standing: Standing, answer: str = "") -> Version:
    """Make the page say what the ledger holds, and `answer` a person. Again is harmless.

    The tag `approval` is written last: killed before that, the person's word still stands there and is read again.
    """
    now = get_version(registry, version.name, version.number)
    word = standing.word
    closed = word in (HALF, EXPIRED, OUTDATED, FAILED)
    # "" removes a tag. Whoever comes after the first of two approvers gives their own name.
    wanted = {ANSWER: answer or (standing.sentence if closed else "")}
    if word in (APPROVED, REJECTED, HALF):
        names = ("", "") if word == HALF else (standing.by, standing.reason)
        wanted |= dict(zip(("approval.by", "approval.reason"), names, strict=True))
    # Names and reasons are what anybody typed. Code is the one markup that our own sentences have, and does no harm.
    said = plain(standing.sentence, 300).replace("\\`", "`")
    put_note(registry, now, "Approval", "" if word in (WAITING, BLOCKED, UNGATED) else f"{word}.** {said}")
    if APPROVED_ALIAS in now.aliases:
        _call(registry, "registered-models/alias", name=now.name, alias=APPROVED_ALIAS)
    for key, value in {**wanted, "approval.recorded": word, TAG: word}.items():
        if value and value != now.tags.get(key):
            set_tag(registry, now, key, value[:_LENGTH])
        elif not value and key in now.tags:
            _call(registry, "model-versions/delete-tag", name=now.name, version=str(now.number), key=key)
    return get_version(registry, version.name, version.number)


def _when(entry: LedgerEntry) -> str:
    return f"{entry.time[:16].replace('T', ' ')} UTC"


def _closed(state: ReleaseState, decision: Decision, allow_override: bool) -> str:
    """The word for a decision that cannot be approved."""
    if decision.verdict != "pass" and not (decision.verdict == "overridden" and allow_override):
        return BLOCKED
    return OUTDATED if state.champion() not in (None, decision.champion) else EXPIRED


def _call(registry: MlflowRegistry, path: str, **body: str) -> None:
    try:
        registry.delete(path, **body)
    except RegistryMissing:
        # Somebody else was first.
        pass
