"""The server that answers: vLLM's client, its shelf of adapters, and the gateway's router, from the settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from sluice.components.cluster_routes import cluster_router
from sluice.components.verification import verify_release
from sluice.components.workspace import Workspace
from sluice.infra.errors import InputError, UnavailableError
from sluice.serving.adapters import AdapterShelf, load_adapter, unload_adapter
from sluice.serving.envoy import GatewaySettings
from sluice.serving.router import EnvoyRouter
from sluice.serving.routes import Role, Router, RouteState, Target
from sluice.serving.vllm import VllmClient, served_name

if TYPE_CHECKING:
    from sluice.infra.settings import Settings


def vllm_url(settings: Settings) -> str:
    """Address of vLLM. Raises `UnavailableError` when the settings have none."""
    if not settings.serving.vllm_url:
        raise UnavailableError("vLLM has no address: setting serving.vllm_url is empty.", hint="Start it: `sluice up`.")
    return settings.serving.vllm_url


def adapter_shelf(settings: Settings) -> AdapterShelf:
    """The adapters that the local server holds, also after a restart."""
    return AdapterShelf(settings.home / "adapters", settings.serving.max_lora_rank)


def gateway_settings(settings: Settings) -> GatewaySettings:
    """The local gateway's folder and addresses. Raises `UnavailableError` before it has any."""
    url, admin = settings.serving.gateway_url, settings.serving.gateway_admin_url
    if not url or not admin:
        raise UnavailableError(
            "The gateway has no address: setting serving.gateway_url is empty.", hint="Start it: `sluice up`."
        )
    port, admin_port = urlsplit(url).port, urlsplit(admin).port
    if port is None or admin_port is None:
        raise InputError(f"Setting serving.gateway_url = {url!r} or gateway_admin_url = {admin!r} names no port.")
    return GatewaySettings(settings.application, settings.home / "gateway", port, admin_port)


class GatewayRouter(Router, Protocol):
    """What every router can besides: begin, and be made to choose a release."""

    def seed(self, stable: Target) -> RouteState:
        """Routes for a gateway that has none: everybody to `stable`. Routes decided before are kept as they are."""

    def probe_headers(self, role: Role) -> dict[str, str]:
        """Request headers by which a probe reaches this role. Raises `InputError` where headers cannot do that."""


def router(settings: Settings) -> GatewayRouter:
    """The router of the gateway that the profile names."""
    return local_router(settings) if settings.profile == "local" else cluster_router(settings)


def local_router(settings: Settings) -> EnvoyRouter:
    """The router of the local gateway."""
    return EnvoyRouter(gateway_settings(settings))


def release_name(settings: Settings, release: str) -> str:
    """The immutable name of a release inside vLLM."""
    return served_name(settings.application, release)


def target(settings: Settings, release: str) -> Target:
    """A release as the gateway reaches it."""
    parts = urlsplit(vllm_url(settings))
    return Target(release, release, release_name(settings, release), (f"{parts.hostname}:{parts.port}",))


def ensure_loaded(workspace: Workspace, release: str, base: str, client: VllmClient, *, undecided: bool = False) -> str:
    """Make the server hold a release under its immutable name; the name. The base model is always there.

    Before the server sees an adapter its bytes, its signature, the statement of its training and its header are
    verified, and (unless `undecided`: it is loaded to be evaluated) that the ledger holds a decision for it. What the
    server holds already is asked nothing: going back to it must not depend on keys or stores. Raises `IntegrityError`
    or `GateRefused`.
    """
    name = release_name(workspace.settings, release)
    if release != base and name not in {model.name for model in client.models()}:
        folder = verify_release(workspace, release, undecided=undecided)
        load_adapter(client, adapter_shelf(workspace.settings), name, folder)
    return name


def tidy_shelf(workspace: Workspace, client: VllmClient) -> None:
    """Take adapters from the server that no route and no rollback can lead to: a killed evaluation leaves them."""
    from sluice.components.champion import current_champion

    settings = workspace.settings
    routes = router(settings)
    kept = [*routes.state().targets(), *routes.previous(), target(settings, current_champion(workspace))]
    names = {one.served_name for one in kept}
    shelf = adapter_shelf(settings)
    for name in shelf.names():
        if name not in names:
            unload_adapter(client, shelf, name)


@contextmanager
def loaded(workspace: Workspace, release: str, base: str, client: VllmClient) -> Iterator[str]:
    """The release's served name while it is being evaluated; a release without a route is unloaded afterwards."""
    name = release_name(workspace.settings, release)
    was_there = name in {model.name for model in client.models()}
    ensure_loaded(workspace, release, base, client, undecided=True)
    try:
        yield name
    finally:
        routed = {one.release for one in router(workspace.settings).state().targets()}
        if release != base and not was_there and release not in routed:
            unload_adapter(client, adapter_shelf(workspace.settings), name)
