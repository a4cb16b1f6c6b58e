"""Envoy's admin address: what the data plane itself says of its configuration and its traffic."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from sluice.infra.errors import UnavailableError
from sluice.serving.envoy_clusters import release_of

_TRAFFIC = re.compile(r"^cluster\.(release|shadow)-([0-9a-f]{64})\.upstream_rq_(total|active)$")
_TRAFFIC_FILTER = r"^cluster\.(release|shadow)-.*\.upstream_rq_(total|active)$"


@dataclass(frozen=True)
class Traffic:
    """Requests of one release since Envoy started: those of users and probes that began on its servers and those that
    run there now, and the same of mirrored ones."""

    begun: int = 0
    active: int = 0
    shadows_begun: int = 0
    shadows_active: int = 0

    @property
    def finished(self) -> int:
        return self.begun - self.active + self.shadows_begun - self.shadows_active


class EnvoyAdmin:
    """One Envoy. Everything raises `UnavailableError` when it does not answer within `timeout_s`."""

    def __init__(self, port: int, *, timeout_s: float = 2.0) -> None:
        self._port = port
        self._timeout_s = timeout_s

    def stats(self, pattern: str) -> dict[str, str]:
        """Statistics whose names match a regular expression."""
        text = self._ask("GET", f"/stats?filter={quote(pattern)}")
        pairs = (line.split(": ", 1) for line in text.splitlines() if ": " in line)
        return {name: value.strip().strip('"') for name, value in pairs}

    def traffic(self) -> dict[str, Traffic]:
        """By release, for every release that Envoy knows."""
        counts: dict[str, dict[str, int]] = {}
        for name, value in self.stats(_TRAFFIC_FILTER).items():
            if found := _TRAFFIC.match(name):
                kind, digits, what = found.groups()
                field = ("begun" if what == "total" else "active") if kind == "release" else _shadow_field(what)
                counts.setdefault(f"sha256:{digits}", {})[field] = int(value)
        return {release: Traffic(**fields) for release, fields in counts.items()}

    def shares(self, route_config: str, route: str) -> tuple[dict[str, int], int] | None:
        """What Envoy really does with a route: percent by release, and percent mirrored; None: it has no such route."""
        dump = json.loads(self._ask("GET", "/config_dump?resource=dynamic_route_configs"))
        for config in (entry.get("route_config", {}) for entry in dump.get("configs", [])):
            if config.get("name") == route_config:
                for one in (found for host in config.get("virtual_hosts", []) for found in host.get("routes", [])):
                    if one.get("name") == route and "route" in one:
                        return _weights(one["route"]), _mirrored(one["route"])
        return None

    def reopen_logs(self) -> None:
        """Let Envoy open its logs by their names again."""
        self._ask("POST", "/reopen_logs")

    def _ask(self, method: str, path: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=self._timeout_s)
        try:
            connection.request(method, path)
            return connection.getresponse().read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(
                f"The gateway's admin address http://127.0.0.1:{self._port} does not answer: {error}.",
                hint="Is it running? `sluice status` tells, `sluice up` mends it.",
            ) from error
        finally:
            connection.close()


def _shadow_field(what: str) -> str:
    return "shadows_begun" if what == "total" else "shadows_active"


def _weights(action: Mapping[str, Any]) -> dict[str, int]:
    shares = action.get("weighted_clusters", {}).get("clusters", [])
    return {release_of(share["name"]) or share["name"]: int(share.get("weight", 0)) for share in shares}


def _mirrored(action: Mapping[str, Any]) -> int:
    for policy in action.get("request_mirror_policies", []):
        return int(policy.get("runtime_fraction", {}).get("default_value", {}).get("numerator", 0))
    return 0
