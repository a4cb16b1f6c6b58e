"""Going back: the gateway first and alone, the record afterwards."""

from __future__ import annotations

from typing import Any

from sluice.components.aliases import follow_ledger
from sluice.components.retiring import bring_back
from sluice.components.served import GatewayRouter, router
from sluice.components.workspace import Workspace
from sluice.infra.errors import ConflictError, IntegrityError, SluiceError, UnavailableError
from sluice.infra.settings import Settings
from sluice.provenance.releases import record_failure, record_rollback
from sluice.serving.errand import Errand
from sluice.serving.routes import RouteState

ACTOR = "rollback"
_CONFIRM_S = 1.0
_LEDGER_S = 15.0


def roll_back(settings: Settings, reason: str, *, promoted_too: bool, actor: str = ACTOR) -> dict[str, Any]:
    """Give all users back to stable, or to the release before it. `{"now", "was", "notes"}`, names and sentences.
    `actor` is who asked, for the ledger.

    Raises `ConflictError` when there is nothing to go back from. A ledger that does not answer is a note, not a
    failure: users come first. So is a gateway that has not confirmed yet: its decision stands, and asking for
    another rollback would undo one release more.
    """
    routes = router(settings)
    try:
        before = routes.state()
    except IntegrityError:
        # Who is stable, the copy knows: a canary loses its users before anybody asks which one it was.
        routes.rollback(reason)
        before = routes.state()
        if before.canary is None:
            note = "The gateway's state was damaged and is mended; a rollout that was under way tells the ledger."
            return {"now": before.stable.served_name, "was": "any canary", "notes": [note, *_seen(routes, before)]}
    if before.canary is None and not promoted_too:
        raise ConflictError("No rollout is under way.", hint="`sluice rollback` undoes the last promotion.")
    gone = before.canary or before.stable
    notes: list[str] = []
    if before.canary is None:
        bring_back(Workspace(settings))
    try:
        after = routes.rollback(reason) if before.canary is not None else routes.restore_previous(reason)
    except UnavailableError as error:
        after = routes.state()
        if after == before:
            raise
        notes.append(f"The gateway has not confirmed yet: {error.message} `sluice up` makes it follow.")
    else:
        notes += _seen(routes, after)
    if after.stable.release == gone.release:
        raise ConflictError(
            f"{gone.served_name} was promoted meanwhile and answers everybody; nothing was undone.",
            hint="`sluice rollback` undoes the promotion.",
        )

    def tell() -> list[str]:
        workspace = Workspace(settings)
        tell_ledger(workspace, gone=gone.release, now=after.stable.release, reason=reason, actor=actor)
        return follow_ledger(workspace)

    told = Errand(tell)
    try:
        if told.done(within_s=_LEDGER_S):
            notes += told.result()
        else:
            notes.append(f"The ledger has not answered for {_LEDGER_S:g} s. `sluice up` tells it when it does.")
    except SluiceError as error:
        notes.append(f"The ledger was not told: {error} `sluice up` tells it when it answers.")
    return {"now": after.stable.served_name, "was": gone.served_name, "notes": notes}


def _seen(routes: GatewayRouter, after: RouteState) -> list[str]:
    """What requests show of the change, in the moment after it."""
    try:
        return [routes.confirm_traffic(after, within_s=_CONFIRM_S)]
    except UnavailableError as error:
        return [f"Not seen in the traffic yet: {error.message}"]


def tell_ledger(
    workspace: Workspace, *, gone: str, now: str, reason: str, actor: str = ACTOR, analysis: str | None = None
) -> None:
    """Record what the gateway did already: users went from `gone` to `now`, and `gone` may not rise again. `analysis`
    is the digest of what convicted it."""
    try:
        record_rollback(workspace.ledger, release=gone, to=now, reason=reason, actor=actor)
    except ConflictError:
        # The ledger's champion is another one by now, or was told before. That this release failed holds anyway.
        pass
    record_failure(workspace.ledger, release=gone, reason=reason, actor=actor, analysis=analysis)
