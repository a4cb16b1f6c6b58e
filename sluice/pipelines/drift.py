"""What is live against what should be: routes in the data plane, adapters on the servers, champion, aliases.

What should be: the gateway's decision for the routes, the ledger for champion and aliases. A part that does not answer
is a difference too, for nobody knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sluice.components.adapter_drift import odd_adapters
from sluice.components.aliases import candidate, challenger, follow_ledger
from sluice.components.champion import base_digest
from sluice.components.rollout_facts import store_of
from sluice.components.served import router
from sluice.components.workspace import Workspace
from sluice.infra.errors import SluiceError
from sluice.infra.settings import Settings
from sluice.pipelines.stack import serve_champion
from sluice.provenance.canonical import short
from sluice.provenance.release_state import ReleaseState
from sluice.provenance.releases import read_state
from sluice.serving.routes import RouteState
from sluice.serving.vllm import VllmClient

_ASK_S = 5.0


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it should be. `part`: gateway, server, champion or aliases."""

    part: str
    sentence: str


def find_drift(settings: Settings) -> tuple[Difference, ...]:
    """All differences; changes nothing. Raises `UnavailableError` when the gateway was never given routes."""
    routes = router(settings)
    state = routes.state()
    found: list[Difference] = []
    try:
        found += [Difference("gateway", sentence) for sentence in routes.drift()]
    except SluiceError as error:
        found.append(Difference("gateway", error.message))
    found += _servers(state)
    try:
        ledger = read_state(Workspace(settings).ledger)
    except SluiceError as error:
        return (*found, Difference("champion", f"The ledger does not say who should answer: {error.message}"))
    found += [Difference("server", sentence) for sentence in odd_adapters(Workspace(settings))]
    found += _champion(settings, state, ledger)
    found += _aliases(settings, ledger)
    return tuple(found)


def repair_drift(settings: Settings) -> tuple[str, ...]:
    """Make it so; what was put right, a sentence each. What cannot be put right stays a difference.

    Raises what the parts raise that are needed: `UnavailableError`, `IntegrityError` for an adapter that is not what
    it was.
    """
    before = find_drift(settings)
    # First, and with the gateway alone: users.
    router(settings).reconcile()
    workspace = Workspace(settings)
    serve_champion(workspace, base_digest(workspace))
    told = follow_ledger(workspace)
    after = find_drift(settings)
    return (*(f"{one.part}: {one.sentence}" for one in before if one not in after and one.part != "aliases"), *told)


def _servers(state: RouteState) -> Iterator[Difference]:
    """Every server behind a route holds that release under its name."""
    for one in state.targets():
        for upstream in one.upstreams:
            try:
                with VllmClient(f"http://{upstream}", timeout_s=_ASK_S) as client:
                    names = {model.name for model in client.models()}
            except SluiceError as error:
                yield Difference("server", error.message)
                continue
            if one.served_name not in names:
                share = state.share(one.release)
                yield Difference(
                    "server", f"{upstream} does not hold {one.served_name}, which has {share}% of the users."
                )


def _champion(settings: Settings, state: RouteState, ledger: ReleaseState) -> Iterator[Difference]:
    """Stable is the ledger's champion, but for the moments of a promotion."""
    champion = ledger.champion()
    moving = any(not one.ended for one in store_of(settings).states())
    if champion is not None and champion != state.stable.release and not moving:
        yield Difference(
            "champion", f"{state.stable.served_name} answers, and the ledger's champion is {short(champion)}."
        )


def _aliases(settings: Settings, ledger: ReleaseState) -> Iterator[Difference]:
    """MLflow's aliases are where the ledger has them."""
    from sluice.registry.mlflow_registry import MlflowRegistry
    from sluice.registry.versions import list_versions

    try:
        versions = list_versions(MlflowRegistry(settings.mlflow.tracking_uri), settings.application)
    except SluiceError as error:
        yield Difference("aliases", error.message)
        return
    shown = {alias: version.digest for version in versions for alias in version.aliases}
    known = {version.digest for version in versions}
    wanted = {"champion": ledger.champion(), "challenger": challenger(ledger), "candidate": candidate(ledger)}
    for alias, digest in wanted.items():
        if shown.get(alias) != digest and (digest is None or digest in known):
            now, right = (short(one) if one else "nowhere" for one in (shown.get(alias), digest))
            yield Difference("aliases", f"Alias {alias} points at {now}; by the ledger it is {right}.")
