"""MLflow's aliases follow the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice.components.workspace import Workspace
from sluice.infra.access import login
from sluice.infra.audit import AuditLine, append, ship
from sluice.infra.errors import UnavailableError
from sluice.provenance.release_state import ReleaseState
from sluice.provenance.releases import read_state

if TYPE_CHECKING:
    from sluice.registry.aliases import Repair

REPAIR = "repair alias"
"""The verb of the audit log's lines about what somebody had moved by hand in MLflow."""


def follow_ledger(workspace: Workspace) -> list[str]:
    """Repair MLflow's aliases; each repair as a sentence. An MLflow that does not answer is told, and changes nothing:
    the ledger holds without it, and the next call repairs. What was moved by hand is noted in the audit log."""
    from sluice.registry.aliases import reconcile
    from sluice.registry.mlflow_registry import MlflowRegistry

    state = read_state(workspace.ledger)
    try:
        repairs = reconcile(
            MlflowRegistry(workspace.settings.mlflow.tracking_uri),
            workspace.settings.application,
            champion_digest=state.champion(),
            candidate_digest=candidate(state),
            challenger_digest=challenger(state),
            previous_champions=state.previous_champions(),
        )
        return note_repairs(workspace, workspace.settings.application, repairs)
    except UnavailableError as error:
        return [f"MLflow's aliases were not updated: {error.message}"]


def note_repairs(workspace: Workspace, model: str, repairs: list[Repair]) -> list[str]:
    """The repairs as sentences; those of what was moved by hand are noted in the audit log, which is copied to the
    object store here. Raises `UnavailableError`."""
    home = workspace.settings.home
    for repair in repairs:
        if repair.by_hand:
            append(home, AuditLine(login(), REPAIR, f"{model}@{repair.subject}", "repaired", repair.sentence))
    ship(home, workspace.objects)
    return [str(repair) for repair in repairs]


def candidate(state: ReleaseState) -> str | None:
    """The newest release that a gate passed and that is neither champion, nor failed, nor rejected."""
    champions = {state.champion(), *state.previous_champions()}
    for entry in reversed(state.entries):
        release = entry.body.get("adapter") if entry.kind == "decision" else None
        if not release:
            continue
        decision = state.decision_for(release)
        open_ = decision is not None and decision.verdict in ("pass", "overridden")
        if open_ and release not in champions and not state.failed(release) and not state.rejection_of(release):
            return str(release)
    return None


def challenger(state: ReleaseState) -> str | None:
    """The release in canary: the latest with users beside the champion, and no failure."""
    for entry in reversed(state.entries):
        release = entry.body.get("release") if entry.kind == "rollout" else None
        if release and release != state.champion() and state.weight(release) > 0 and not state.failed(release):
            return str(release)
    return None
