"""Envoy's clusters and routes for a state of the gateway, as plain values ready for YAML.

One cluster for each release, named by its full digest: statistics and the access log are per release although two
releases may share one server, and a promotion changes weights only, never a name.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable
from typing import Any

from sluice.provenance.canonical import hex_of
from sluice.serving.routes import RouteState, Target

ROUTE_CONFIG = "sluice"
FORCE_HEADER = "x-sluice-force"
PROBE_KEY_HEADER = "x-sluice-probe-key"
MODEL_HEADER = "x-sluice-model"
RELEASE_HEADER = "x-sluice-release"
ADAPTER_HEADER = "x-sluice-adapter"
SESSION_HEADER = "x-session-id"
INTERNAL_HEADERS = (MODEL_HEADER, RELEASE_HEADER, ADAPTER_HEADER)
"""Headers that only the gateway may set: what a client sends under these names is removed first."""

_TYPE = "type.googleapis.com/"
_CLUSTER_PREFIX = "release-"
_OVERWRITE = "OVERWRITE_IF_EXISTS_OR_ADD"


def cluster_name(release: str) -> str:
    """Envoy's name of a release: `release-` and the 64 digits of its digest."""
    return _CLUSTER_PREFIX + hex_of(release)


def release_of(cluster: str) -> str | None:
    """The digest of the release behind a cluster's name, or None for a name that is not a release."""
    digits = cluster.removeprefix(_CLUSTER_PREFIX)
    return f"sha256:{digits}" if cluster.startswith(_CLUSTER_PREFIX) and len(digits) == 64 else None


def clusters(targets: Iterable[Target], version: str) -> dict[str, Any]:
    """The cluster file: one cluster a release, each with limits of its own so that one cannot starve another."""
    unique = {target.release: target for target in targets}
    return {"version_info": version, "resources": [_cluster(target) for target in unique.values()]}


def routes(application: str, state: RouteState | None, version: str, probe_key: str) -> dict[str, Any]:
    """The route file. Without a state every question is answered with 503: there is no release yet."""
    answers = _answer_routes(application, state, probe_key) if state else []
    if not state:
        answers = [_reply("no-release", _posted(application), 503, f"no release of {application} is being served")]
    listed = {"object": "list", "data": [{"id": application, "object": "model", "owned_by": "sluice"}]}
    models = _reply("models", {"path": "/v1/models", "headers": [_header(":method", "GET")]}, 200, json.dumps(listed))
    models["response_headers_to_add"] = [_set("content-type", "application/json")]
    no_model = {"safe_regex": {"regex": _PATHS}, "headers": [_header(":method", "POST"), _absent(MODEL_HEADER)]}
    unknown = f"unknown model or path: ask for the model {application} at /v1/chat/completions or /v1/completions"
    return {
        "version_info": version,
        "resources": [
            {
                "@type": _TYPE + "envoy.config.route.v3.RouteConfiguration",
                "name": ROUTE_CONFIG,
                # A route to a cluster that is not there must be refused as a whole, not answered with 503.
                "validate_clusters": True,
                "request_headers_to_remove": [FORCE_HEADER, PROBE_KEY_HEADER, MODEL_HEADER],
                "virtual_hosts": [
                    {
                        "name": ROUTE_CONFIG,
                        "domains": ["*"],
                        "routes": [
                            *answers,
                            models,
                            _reply("no-model", no_model, 400, "the body must be JSON with a field model"),
                            _reply("unknown", {"prefix": "/"}, 404, unknown),
                        ],
                    }
                ],
            }
        ],
    }


_PATHS = "/v1/(chat/completions|completions)"


def _cluster(target: Target) -> dict[str, Any]:
    name = cluster_name(target.release)
    addresses = [(host, int(port)) for host, _, port in (one.rpartition(":") for one in target.upstreams)]
    endpoints = [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": port}}}} for host, port in addresses
    ]
    return {
        "@type": _TYPE + "envoy.config.cluster.v3.Cluster",
        "name": name,
        "type": "STATIC" if all(_is_address(host) for host, _ in addresses) else "STRICT_DNS",
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
        "circuit_breakers": {
            "thresholds": [{"max_connections": 4096, "max_pending_requests": 4096, "max_requests": 4096}]
        },
    }


def _answer_routes(application: str, state: RouteState, probe_key: str) -> list[dict[str, Any]]:
    forced = []
    for role, target in (("stable", state.stable), ("canary", state.canary)):
        match = _posted(application, _header(FORCE_HEADER, role), _header(PROBE_KEY_HEADER, probe_key))
        name = f"forced-{role}"
        forced.append(
            _split(name, match, [(target, 100)]) if target else _reply(name, match, 409, "there is no canary")
        )
    # Envoy walks the shares in this order along a session's hash: with stable first, a larger weight only ever adds
    # sessions to the canary, and nobody who was moved is moved back.
    shares = [(state.stable, 100 - state.weight)]
    if state.canary is not None and state.weight:
        shares.append((state.canary, state.weight))
    return [*forced, _split("split", _posted(application), shares)]


def _split(name: str, match: dict[str, Any], shares: list[tuple[Target, int]]) -> dict[str, Any]:
    return {
        "name": name,
        "match": match,
        "route": {
            # A long answer is not a failure: only silence is. The listener bounds that.
            "timeout": "0s",
            "hash_policy": [{"header": {"header_name": SESSION_HEADER}}],
            "retry_policy": {"retry_on": "connect-failure,refused-stream", "num_retries": 1},
            "weighted_clusters": {"use_hash_policy": True, "clusters": [_weighted(*share) for share in shares]},
        },
    }


def _weighted(target: Target, weight: int) -> dict[str, Any]:
    return {
        "name": cluster_name(target.release),
        "weight": weight,
        "response_headers_to_add": [_set(RELEASE_HEADER, target.release), _set(ADAPTER_HEADER, target.adapter)],
        "typed_per_filter_config": {
            "model-rewrite": {
                "@type": _TYPE + "envoy.extensions.filters.http.transform.v3.TransformConfig",
                "request_transformation": {
                    "body_transformation": {
                        "body_format": {"json_format": {"model": target.served_name}},
                        "action": "MERGE",
                    }
                },
            }
        },
    }


def _posted(application: str, *headers: dict[str, Any]) -> dict[str, Any]:
    return {
        "safe_regex": {"regex": _PATHS},
        "headers": [_header(":method", "POST"), _header(MODEL_HEADER, application), *headers],
    }


def _reply(name: str, match: dict[str, Any], status: int, body: str) -> dict[str, Any]:
    return {"name": name, "match": match, "direct_response": {"status": status, "body": {"inline_string": body}}}


def _header(name: str, value: str) -> dict[str, Any]:
    return {"name": name, "string_match": {"exact": value}}


def _absent(name: str) -> dict[str, Any]:
    # An empty value is what a body without the field leaves behind.
    return {"name": name, "string_match": {"safe_regex": {"regex": ".+"}}, "invert_match": True,
            "treat_missing_header_as_empty": True}  # fmt: skip


def _set(name: str, value: str) -> dict[str, Any]:
    return {"header": {"key": name, "value": value}, "append_action": _OVERWRITE}


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
