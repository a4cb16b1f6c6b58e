"""The servers that answer: vLLM's clients, their shelf of adapters, and the gateway's router, from the settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from sluice.components.cluster_routes import cluster_router
from sluice.components.verification import require_base, verify_release
from sluice.components.workspace import Workspace
from sluice.infra.errors import InputError, IntegrityError, UnavailableError
from sluice.infra.ports import LOOPBACK, PortBook
from sluice.provenance.canonical import short
from sluice.serving.adapters import AdapterShelf, load_adapter, unload_adapter
from sluice.serving.envoy import GatewaySettings
from sluice.serving.envoy_routes import Timeouts
from sluice.serving.router import EnvoyRouter
from sluice.serving.routes import Role, Router, RouteState, Target
from sluice.serving.servers import ServerBook, part_name
from sluice.serving.vllm import VllmClient, served_name

if TYPE_CHECKING:
    from sluice.infra.settings import Settings


def vllm_url(settings: Settings) -> str:
    """Address of vLLM. Raises `UnavailableError` when the settings have none."""
    if not settings.serving.vllm_url:
        raise UnavailableError("vLLM has no address: setting serving.vllm_url is empty.", hint="Start it: `sluice up`.")
    return settings.serving.vllm_url


def server_urls(settings: Settings) -> tuple[str, ...]:
    """Addresses of every vLLM server that holds the adapters: the first one, then its replicas."""
    return tuple(dict.fromkeys((vllm_url(settings), *settings.serving.vllm_replicas)))


def servers(settings: Settings, *, timeout_s: float = 60.0) -> tuple[VllmClient, ...]:
    """A client for each vLLM server."""
    return tuple(VllmClient(url, timeout_s=timeout_s) for url in server_urls(settings))


def answering_servers(settings: Settings) -> tuple[VllmClient, ...]:
    """Those that answer now. Raises `UnavailableError` when none does."""
    found = tuple(client for client in servers(settings) if client.healthy())
    if not found:
        raise UnavailableError(
            f"No vLLM server answers ({', '.join(server_urls(settings))}).",
            hint="`sluice status` tells, `sluice up` mends.",
        )
    return found


def adapter_shelf(settings: Settings) -> AdapterShelf:
    """The adapters that the servers hold, also after a restart."""
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
    serving = settings.serving
    return GatewaySettings(
        settings.application,
        settings.home / "gateway",
        port,
        admin_port,
        requests_per_s=serving.requests_per_s,
        timeouts=Timeouts(serving.first_byte_timeout_s, serving.idle_timeout_s, serving.answer_timeout_s),
    )


class GatewayRouter(Router, Protocol):
    """What every router can besides: begin, be made to choose a release, and tell what requests show of a change."""

    def seed(self, stable: Target) -> RouteState:
        """Routes for a gateway that has none: everybody to `stable`. Routes decided before are kept as they are."""

    def probe_headers(self, role: Role) -> dict[str, str]:
        """Request headers by which a probe reaches this role. Raises `InputError` where headers cannot do that."""

    def confirm_traffic(self, state: RouteState, *, within_s: float) -> str:
        """What requests show of `state` within so many seconds, in a sentence. Raises `UnavailableError` when they
        still begin on a release without a share, or nobody can tell."""


def router(settings: Settings) -> GatewayRouter:
    """The router of the gateway that the profile names."""
    return local_router(settings) if settings.profile == "local" else cluster_router(settings)


def local_router(settings: Settings) -> EnvoyRouter:
    """The router of the local gateway."""
    return EnvoyRouter(gateway_settings(settings))


def release_name(settings: Settings, release: str) -> str:
    """The immutable name of a release inside vLLM."""
    return served_name(settings.application, release)


def server_book(settings: Settings) -> ServerBook:
    """Which releases have a server of their own here."""
    return ServerBook(settings.home / "servers.json")


def server_url(settings: Settings, release: str) -> str:
    """Address of the server that users of this release are answered by: its own, if it has one, or the shared one."""
    if release not in server_book(settings).read():
        return vllm_url(settings)
    port = PortBook(settings.home, {}).read().get(part_name(release))
    if port is None:
        raise UnavailableError(
            f"The server of release {short(release)} has no port.", hint="`sluice up` gives it one and starts it."
        )
    return f"http://{LOOPBACK}:{port}"


def target(settings: Settings, release: str) -> Target:
    """A release as the gateway reaches it: at its own server, or at every server that holds it beside others."""
    upstreams = []
    dedicated = release in server_book(settings).read()
    for url in (server_url(settings, release),) if dedicated else server_urls(settings):
        parts = urlsplit(url)
        if parts.hostname is None or parts.port is None:
            raise InputError(f"Setting serving.vllm_url or vllm_replicas: {url!r} names no host and port.")
        upstreams.append(f"{parts.hostname}:{parts.port}")
    return Target(release, release, release_name(settings, release), tuple(upstreams), dedicated)


def ensure_loaded(
    workspace: Workspace, release: str, base: str, clients: Sequence[VllmClient], *, undecided: bool = False
) -> str:
    """Make every one of these servers hold a release under its immutable name; the name. The base is always there.

    Before a server sees an adapter its bytes, its signature, the statement of its training, its header and its base are
    verified, and (unless `undecided`: it is loaded to be evaluated) that the ledger holds a decision for it. What all
    of them hold already is asked nothing: going back to it must not depend on keys or stores. Raises `IntegrityError`,
    `GateRefused` or `InputError`; a server that refuses it leaves it on none that did not hold it before.
    """
    name = release_name(workspace.settings, release)
    if release != base and any(name not in {model.name for model in client.models()} for client in clients):
        load_verified(workspace, release, base, clients, undecided=undecided)
    return name


def load_verified(
    workspace: Workspace, release: str, base: str, clients: Sequence[VllmClient], *, undecided: bool = False
) -> None:
    """`ensure_loaded`, with everything verified also where the servers hold it already."""
    folder = verify_release(workspace, release, undecided=undecided)
    require_base(workspace, release, base)
    digests = {entry.path: entry.digest for entry in workspace.artifacts.manifest(release).files}
    name = release_name(workspace.settings, release)
    load_adapter(clients, adapter_shelf(workspace.settings), name, folder, digests)
    _require_roots(workspace, name, clients)


def _require_roots(workspace: Workspace, name: str, clients: Sequence[VllmClient]) -> None:
    """Each server says that this name comes from the shelf's folder, whose bytes were verified."""
    expected = str(adapter_shelf(workspace.settings).path(name))
    for client in clients:
        roots = {model.root for model in client.models() if model.name == name}
        if roots != {expected}:
            found = ", ".join(sorted(roots)) or "nowhere"
            raise IntegrityError(f"{client.url} serves {name!r} from {found}, not from the verified {expected}.")


@contextmanager
def loaded(workspace: Workspace, release: str, base: str, client: VllmClient) -> Iterator[str]:
    """The release's served name while it is being evaluated at one server; afterwards it is unloaded there, unless a
    route leads to it, it is kept for a release, or somebody else asks it too."""
    from sluice.components.retiring import needed

    name = release_name(workspace.settings, release)
    shelf = adapter_shelf(workspace.settings)
    was_there = name in {model.name for model in client.models()}
    try:
        with shelf.in_use(name):
            ensure_loaded(workspace, release, base, (client,), undecided=True)
            yield name
    finally:
        if release != base and not was_there:
            with shelf.unused(name) as free:
                if free and name not in needed(workspace):
                    unload_adapter((client,), shelf, name)
