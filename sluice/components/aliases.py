"""MLflow's aliases follow the ledger."""

from __future__ import annotations

from sluice.components.workspace import Workspace
from sluice.infra.errors import UnavailableError
from sluice.provenance.release_state import ReleaseState
from sluice.provenance.releases import read_state


def follow_ledger(workspace: Workspace) -> list[str]:
    """Repair MLflow's aliases; each repair as a sentence. An MLflow that does not answer is told, and changes nothing:
    the ledger holds without it, and the next call repairs."""
    from sluice.registry.aliases import reconcile
    from sluice.registry.mlflow_registry import MlflowRegistry

    state = read_state(workspace.ledger)
    try:
        return reconcile(
            MlflowRegistry(workspace.settings.mlflow.tracking_uri),
            workspace.settings.application,
            champion_digest=state.champion(),
            candidate_digest=candidate(state),
            previous_champions=state.previous_champions(),
        )
    except UnavailableError as error:
        return [f"MLflow's aliases were not updated: {error.message}"]


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
