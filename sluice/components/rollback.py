"""Going back: the gateway first and alone, the record afterwards."""

from __future__ import annotations

from typing import Any

from sluice.components.aliases import follow_ledger
from sluice.components.served import router
from sluice.components.workspace import Workspace
from sluice.infra.errors import ConflictError, SluiceError
from sluice.infra.settings import Settings
from sluice.provenance.releases import record_failure, record_rollback

ACTOR = "rollback"


def roll_back(settings: Settings, reason: str, *, promoted_too: bool) -> dict[str, Any]:
    """Give all users back to stable, or to the release before it. `{"now", "was", "notes"}`, names and sentences.

    Raises `ConflictError` when there is nothing to go back from. A ledger that does not answer is a note, not a
    failure: users come first.
    """
    routes = router(settings)
    before = routes.state()
    if before.canary is not None:
        after, gone = routes.rollback(reason), before.canary
    elif promoted_too:
        after, gone = routes.restore_previous(reason), before.stable
    else:
        raise ConflictError("No rollout is under way.", hint="`sluice rollback` undoes the last promotion.")
    notes: list[str] = []
    try:
        workspace = Workspace(settings)
        tell_ledger(workspace, gone=gone.release, now=after.stable.release, reason=reason)
        notes += follow_ledger(workspace)
    except SluiceError as error:
        notes.append(f"The ledger was not told: {error} `sluice up` tells it when it answers.")
    return {"now": after.stable.served_name, "was": gone.served_name, "notes": notes}


def tell_ledger(workspace: Workspace, *, gone: str, now: str, reason: str) -> None:
    """Record what the gateway did already: users went from `gone` to `now`, and `gone` may not rise again."""
    record_rollback(workspace.ledger, release=gone, to=now, reason=reason, actor=ACTOR)
    record_failure(workspace.ledger, release=gone, reason=reason, actor=ACTOR)
