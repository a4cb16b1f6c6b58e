"""Envoy's clusters for the releases of a gateway, as plain values ready for YAML.

Three clusters for each release, named by its full digest, so that statistics are per release although two releases may
share one server, and a promotion changes weights only, never a cluster: `release-` is what users and probes reach;
`shadow-` reaches the same servers with mirrored requests, counted apart and few at once; `guarded-`, for a release
with servers of its own, tries these first and stable when they are gone.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import Any

from sluice.provenance.canonical import hex_of
from sluice.serving.routes import Target

SHADOW = "shadow"
FAILOVER = "failover"
SECOND_PASSES = (SHADOW, FAILOVER)
"""Listeners inside Envoy, and the clusters that lead to them: a request goes through the routes a second time, because
its body must get another release's name."""

_TYPE = "type.googleapis.com/"
_NAME = re.compile(r"^(?:release|shadow|guarded)-([0-9a-f]{64})$")
_MOST_SHADOWS = 64
_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


def cluster_name(release: str) -> str:
    """Envoy's name of a release: `release-` and the 64 digits of its digest."""
    return f"release-{hex_of(release)}"


def shadow_cluster(release: str) -> str:
    return f"shadow-{hex_of(release)}"


def guarded_cluster(release: str) -> str:
    return f"guarded-{hex_of(release)}"


def release_of(cluster: str) -> str | None:
    """The digest of the release behind a cluster's name, or None for a name that is not a release."""
    found = _NAME.match(cluster)
    return f"sha256:{found.group(1)}" if found else None


def clusters(targets: Iterable[Target], version: str) -> dict[str, Any]:
    """The cluster file. Every cluster has limits of its own, so that no release can starve another."""
    unique = {target.release: target for target in targets}
    found = []
    for target in unique.values():
        found.append(_with_health(_cluster(cluster_name(target.release), target, most=4096), target))
        found.append(_cluster(shadow_cluster(target.release), target, most=_MOST_SHADOWS))
        if target.dedicated:
            found.append(_guarded(target))
    return {"version_info": version, "resources": found}


def second_pass_cluster(name: str) -> dict[str, Any]:
    """The way from a route to the listener `name` inside the same Envoy."""
    endpoint = {"endpoint": {"address": {"envoy_internal_address": {"server_listener_name": name}}}}
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
        "circuit_breakers": _limits(_MOST_SHADOWS if name == SHADOW else 4096),
    }


def _cluster(name: str, target: Target, *, most: int) -> dict[str, Any]:
    addresses = [(host, int(port)) for host, _, port in (one.rpartition(":") for one in target.upstreams)]
    endpoints = [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": port}}}} for host, port in addresses
    ]
    return {
        "@type": _TYPE + "envoy.config.cluster.v3.Cluster",
        "name": name,
        "type": "STATIC" if all(_is_address(host) for host, _ in addresses) else "STRICT_DNS",
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": endpoints}],
            # One replica that lives takes all: nothing spills over to stable while there is one.
            "policy": {"overprovisioning_factor": 100 * max(2, len(endpoints))},
        },
        "circuit_breakers": _limits(most),
        # vLLM closes a connection that was idle for 5 s. One that it closes just as a request leaves is lost, so the
        # gateway closes them first.
        "typed_extension_protocol_options": {
            _HTTP_OPTIONS: {
                "@type": _TYPE + _HTTP_OPTIONS,
                "common_http_protocol_options": {"idle_timeout": "3s"},
                "explicit_http_config": {"http_protocol_options": {}},
            }
        },
    }


def _with_health(cluster: dict[str, Any], target: Target) -> dict[str, Any]:
    """Replicas that are down are passed over; when all seem down, all are tried: a slow check must end nothing."""
    cluster["common_lb_config"] = {"healthy_panic_threshold": {"value": 1}}
    if target.dedicated or len(target.upstreams) > 1:
        cluster["health_checks"] = [
            {
                "timeout": "5s",
                "interval": "2s",
                "no_traffic_interval": "2s",
                "unhealthy_threshold": 2,
                "healthy_threshold": 1,
                "http_health_check": {"path": "/health"},
            }
        ]
        # A cluster waits for its first check. A server that hangs must not hold back the routes to the others.
        cluster["outlier_detection"] = {
            "consecutive_5xx": 10,
            "consecutive_gateway_failure": 5,
            "base_ejection_time": "10s",
            "max_ejection_percent": 50,
        }
    return cluster


def _guarded(target: Target) -> dict[str, Any]:
    config = {
        "@type": _TYPE + "envoy.extensions.clusters.aggregate.v3.ClusterConfig",
        "clusters": [cluster_name(target.release), FAILOVER],
    }
    return {
        "@type": _TYPE + "envoy.config.cluster.v3.Cluster",
        "name": guarded_cluster(target.release),
        "connect_timeout": "1s",
        "lb_policy": "CLUSTER_PROVIDED",
        "cluster_type": {"name": "envoy.clusters.aggregate", "typed_config": config},
    }


def _limits(most: int) -> dict[str, Any]:
    return {"thresholds": [{"max_connections": most, "max_pending_requests": most, "max_requests": most}]}


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
