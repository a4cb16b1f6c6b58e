"""Which release answers: the state of the gateway in plain values, and what every gateway router can do.

`Router` is the protocol; `router.EnvoyRouter` implements it over Envoy's files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from sluice.infra.errors import ConflictError, InputError
from sluice.provenance.canonical import require_digest

Role = Literal["stable", "canary"]

_UPSTREAM = re.compile(r"^[A-Za-z0-9.-]+:[0-9]{1,5}$")
_SERVED_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")


class StaleToken(ConflictError):
    """A controller with a newer token has changed the routes since: this one must stop."""


@dataclass(frozen=True)
class Target:
    """One release as the gateway reaches it.

    `release` and `adapter` are digests (equal for an adapter; for the base model alone both are the base's digest);
    `served_name` is the immutable name inside vLLM; `upstreams` are `host:port` of every server that holds it (its
    replicas). `dedicated`: these servers hold this release alone (a merged model), and not adapters side by side.
    """

    release: str
    adapter: str
    served_name: str
    upstreams: tuple[str, ...]
    dedicated: bool = False

    def __post_init__(self) -> None:
        require_digest(self.release, "release")
        require_digest(self.adapter, "adapter")
        # Both go into the gateway's configuration: nothing that could mean more than a name may pass.
        if not _SERVED_NAME.match(self.served_name):
            raise InputError(f"served_name = {self.served_name!r} is not a name of letters, digits, '.', '_' and '-'.")
        if not self.upstreams:
            raise InputError(f"upstreams of {self.served_name!r} is empty: no server holds it.")
        for upstream in self.upstreams:
            if not _UPSTREAM.match(upstream) or not 0 < int(upstream.rpartition(":")[2]) < 65536:
                raise InputError(f"upstreams: {upstream!r} is not host:port.")

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Target:
        """The inverse of `asdict`. Raises `KeyError`, `TypeError` or `InputError` on foreign content."""
        return cls(**{**content, "upstreams": tuple(content["upstreams"])})


@dataclass(frozen=True)
class RouteState:
    """The stable release, the canary if there is one, and the canary's share of the sessions in percent (0 to 100).

    `shadow` is the share of stable's requests, in percent, that the canary is asked too without anybody seeing what it
    answers.
    """

    stable: Target
    canary: Target | None = None
    weight: int = 0
    shadow: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 100:
            raise InputError(f"weight = {self.weight} is not between 0 and 100.")
        if self.canary is None and self.weight:
            raise InputError(f"weight = {self.weight} without a canary to send it to.")
        if not 0 <= self.shadow <= 100 or (self.canary is None and self.shadow):
            raise InputError(f"shadow = {self.shadow} is not between 0 and 100, or there is no canary to ask.")
        if self.canary is not None and self.canary.release == self.stable.release:
            raise InputError(f"The release {self.stable.release} cannot be stable and canary at once.")

    def share(self, release: str) -> int:
        """Percent of the sessions that `release` answers in this state."""
        if self.canary is not None and self.canary.release == release:
            return self.weight
        return 100 - self.weight if self.stable.release == release else 0

    def targets(self) -> tuple[Target, ...]:
        """Stable, then the canary if there is one."""
        return (self.stable,) if self.canary is None else (self.stable, self.canary)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RouteState:
        """The inverse of `to_json`. Raises `KeyError`, `TypeError` or `InputError` on foreign content."""
        canary = content["canary"]
        found = Target.from_json(canary) if canary else None
        return cls(Target.from_json(content["stable"]), found, int(content["weight"]), int(content["shadow"]))


class Router(Protocol):
    """Changes the routes of one application and confirms that the data plane follows: from what it reports and, where
    there is traffic, from what it does."""

    def state(self) -> RouteState:
        """The routes as last decided. Raises `UnavailableError` when there are none yet."""

    def apply(self, state: RouteState, *, expected: RouteState | None = None, token: int = 0) -> RouteState:
        """Change the routes and wait until the data plane confirms.

        With `expected`, raises `ConflictError` and changes nothing when the routes are no longer those (somebody
        rolled back meanwhile). `token` fences: the router remembers the largest it was given, and raises `StaleToken`
        for a smaller one above 0, so that a controller that was replaced changes nothing any more. Raises
        `GateRefused` when a release that was rolled back would get a larger share, `UnavailableError` when the data
        plane did not confirm in time; a raised weight is taken back then.
        """

    def rollback(self, reason: str, *, absorb: bool = True) -> RouteState:
        """Send everybody to stable, drop the canary and, with `absorb`, never let that release rise again.

        Needs nothing but the gateway. Without a canary nothing changes. Raises `UnavailableError` when the data plane
        did not confirm; the decision stands all the same, and a data plane that comes back comes back to it.
        """

    def restore_previous(self, reason: str) -> RouteState:
        """Undo a promotion: the stable release before this one is stable again, and this one may not rise again. The
        earlier release must still be loaded. Raises `ConflictError` when none is remembered."""

    def previous(self) -> tuple[Target, ...]:
        """The stable releases before this one, latest last."""

    def refusal(self, release: str) -> str | None:
        """Why the gateway will not raise this release, or None."""

    def drift(self) -> tuple[str, ...]:
        """How the data plane differs from the routes as last decided, a sentence each; empty when it follows."""

    def reconcile(self) -> RouteState:
        """Make the data plane follow the routes as last decided. Raises `UnavailableError`."""

    def active_requests(self, release: str) -> int:
        """Requests running on this release now. Raises `UnavailableError` when the data plane does not tell."""

    def wait_idle(self, release: str, *, timeout_s: float) -> None:
        """Wait until no request is running on `release`. Raises `UnavailableError` after `timeout_s` seconds."""
