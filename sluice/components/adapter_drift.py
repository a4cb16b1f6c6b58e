"""What is odd about the adapters on the shared servers: not verified, changed since, or needed by nobody."""

from __future__ import annotations

from sluice.components.retiring import holders
from sluice.components.served import adapter_shelf, router, servers
from sluice.components.workspace import Workspace
from sluice.infra.errors import UnavailableError


def odd_adapters(workspace: Workspace) -> tuple[str, ...]:
    """A sentence for each; empty when nothing is. A server that does not answer is passed over.

    Raises `UnavailableError` without routes or ledger.
    """
    shelf, held = adapter_shelf(workspace.settings), holders(workspace)
    routed = {one.served_name for one in router(workspace.settings).state().targets() if not one.dedicated}
    found = []
    for client in servers(workspace.settings):
        try:
            adapters = [model for model in client.models() if model.parent is not None]
        except UnavailableError:
            continue
        for model in sorted(adapters, key=lambda one: one.name):
            if model.name not in held:
                found.append(f"{client.url} holds {model.name}, and nothing leads to it.")
            elif model.root != str(shelf.path(model.name)):
                found.append(f"{client.url} serves {model.name} from {model.root}, which nobody verified.")
            elif model.name in routed and model.name not in shelf.names():
                found.append(f"The files of {model.name} changed on the shelf: a restart would not load it.")
    return tuple(dict.fromkeys(found))
