"""Are the adapters that users are sent to on every server, as they were verified? What is not is told, and mended."""

from __future__ import annotations

from sluice.components.champion import base_digest
from sluice.components.retiring import holders
from sluice.components.served import adapter_shelf, ensure_loaded, router, servers
from sluice.components.workspace import Workspace
from sluice.infra.errors import UnavailableError
from sluice.serving.routes import Target


def adapter_drift(workspace: Workspace) -> tuple[str, ...]:
    """How the servers differ from what the routes need of them, a sentence each; empty when they do not.

    Raises `UnavailableError` when there are no routes yet.
    """
    shelf, held = adapter_shelf(workspace.settings), holders(workspace)
    found = []
    for client in servers(workspace.settings):
        try:
            models = {model.name: model for model in client.models()}
        except UnavailableError as error:
            found.append(f"A server cannot be asked: {error.message}")
            continue
        for one in _routed(workspace):
            model = models.get(one.served_name)
            if model is None:
                found.append(f"{client.url} lacks {one.served_name}: {held[one.served_name]}.")
            elif model.parent is not None and model.root != str(shelf.path(one.served_name)):
                found.append(f"{client.url} serves {one.served_name} from {model.root}, which nobody verified.")
            elif model.parent is not None and one.served_name not in shelf.names():
                found.append(f"The files of {one.served_name} changed on the shelf: a restart would not load it.")
        for name, model in sorted(models.items()):
            if model.parent is not None and name not in held:
                found.append(f"{client.url} holds {name}, and nothing leads to it.")
    return tuple(dict.fromkeys(found))


def mend_adapters(workspace: Workspace) -> tuple[str, ...]:
    """Load what a server that answers lacks of what users are sent to; what is wrong still.

    An adapter that comes from another folder is left to a person: taking it away would fail its users' requests.
    """
    base = base_digest(workspace)
    left = []
    for client in servers(workspace.settings):
        try:
            client.models()
        except UnavailableError as error:
            left.append(f"A server cannot be asked: {error.message}")
            continue
        for one in _routed(workspace):
            ensure_loaded(workspace, one.release, base, (client,))
    return tuple(left)


def _routed(workspace: Workspace) -> list[Target]:
    """What users are sent to at the servers that hold adapters side by side."""
    return [one for one in router(workspace.settings).state().targets() if not one.dedicated]
