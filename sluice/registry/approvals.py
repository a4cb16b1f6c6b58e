"""A person's yes or no to a candidate, given in MLflow's page or on the command line.

In the page a person sets the version's tag `approval` to `approved` or `rejected`, and may add `approval.by` and
`approval.comment`. MLflow's tags are no proof of anything: the caller checks the decision, writes the signed approval
to the ledger, and then calls `mark`, which notes on the version what the ledger holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sluice.infra.errors import InputError
from sluice.registry.mlflow_registry import MlflowRegistry
from sluice.registry.versions import BLOCKED, PASSING, UNGATED, WAITING, Version, get_version, list_versions, set_tag

ApprovalState = Literal["approved", "rejected"]

COMMENT_LENGTH = 2000
UNNAMED = "somebody in MLflow"

_WORDS: dict[str, ApprovalState] = {
    "approved": "approved", "approve": "approved", "yes": "approved",
    "rejected": "rejected", "reject": "rejected", "no": "rejected",
}  # fmt: skip


@dataclass(frozen=True)
class UiApproval:
    """What the tags of a version say. `recorded`: the ledger holds this very state already (`mark` was called)."""

    state: ApprovalState
    approver: str
    comment: str
    recorded: bool


def pending_approvals(registry: MlflowRegistry, application: str) -> list[Version]:
    """Versions that a person has to decide on, or has decided on without the ledger knowing; newest first."""
    return [
        version
        for version in list_versions(registry, application)
        if version.tags.get("gate") in PASSING and "approval.recorded" not in version.tags
    ]


def read_ui_approval(registry: MlflowRegistry, version: Version) -> UiApproval | None:
    """The approval or rejection on the version's page as it is now; None while nobody decided.

    Raises `InputError` for a word that is neither: a typing mistake must not pass for silence.
    """
    tags = get_version(registry, version.name, version.number).tags
    text = tags.get("approval", "").strip()
    if text.lower() in ("", UNGATED, WAITING, BLOCKED):
        return None
    state = _WORDS.get(text.lower())
    if state is None:
        raise InputError(
            f"Tag approval = {text!r} of {version.name} version {version.number} is neither approved nor rejected.",
            hint=f"Correct it at {version.url}.",
        )
    approver = tags.get("approval.by", "").strip() or UNNAMED
    return UiApproval(state, approver, tags.get("approval.comment", "").strip(), tags.get("approval.recorded") == state)


def mark(registry: MlflowRegistry, version: Version, state: ApprovalState, approver: str, comment: str) -> Version:
    """Note on the version what the ledger holds. Repeating it is harmless; `approval.recorded` is written last."""
    if state not in ("approved", "rejected"):
        raise InputError(f"state = {state!r} is neither approved nor rejected.")
    if not approver.strip():
        raise InputError("approver is empty: an approval has a name.")
    set_tag(registry, version, "approval", state)
    set_tag(registry, version, "approval.by", approver)
    if comment:
        set_tag(registry, version, "approval.comment", comment[:COMMENT_LENGTH])
    set_tag(registry, version, "approval.recorded", state)
    return get_version(registry, version.name, version.number)
