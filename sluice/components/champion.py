"""The champion and the base model as the chain knows them."""

from __future__ import annotations

import json

from sluice.components.workspace import Workspace
from sluice.infra.errors import ConflictError, UnavailableError
from sluice.infra.object_store import ObjectExists, ObjectMissing
from sluice.provenance.canonical import canonical_json, require_digest
from sluice.provenance.releases import read_state


def current_champion(workspace: Workspace) -> str:
    """Digest of the release that users get. Raises `UnavailableError` before the first one."""
    champion = read_state(workspace.ledger).champion()
    if champion is None:
        raise UnavailableError("There is no champion yet.", hint="`sluice up` makes the base model the first champion.")
    return champion


def base_digest(workspace: Workspace) -> str:
    """Digest of the base model that this installation adapts. Raises `UnavailableError` before it is unpacked."""
    try:
        found = json.loads(workspace.objects.get(_key(workspace)))
    except ObjectMissing as error:
        raise UnavailableError("The base model is not unpacked yet.", hint="`sluice up` unpacks it.") from error
    return require_digest(str(found["digest"]), "base model")


def name_base(workspace: Workspace, digest: str) -> None:
    """Remember which artifact the base model `settings.base_model` is. The name never gets another digest."""
    try:
        workspace.objects.put(_key(workspace), canonical_json({"digest": digest}), if_absent=True)
    except ObjectExists:
        known = base_digest(workspace)
        if known != digest:
            raise ConflictError(
                f"The base model {workspace.settings.base_model!r} is {known}, but was unpacked as {digest}.",
                hint="Its package changed: use another SLUICE_APPLICATION, or a new SLUICE_HOME.",
            ) from None


def _key(workspace: Workspace) -> str:
    return f"base-models/{workspace.settings.application}/{workspace.settings.base_model}.json"
