"""Envoy's routes for a state of the gateway, as plain values ready for YAML.

All listeners share them. A request that comes a second time, through a listener inside Envoy, carries PASS_HEADER:
`shadow` for a mirrored one, `failover` for one whose own servers are gone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sluice.serving.envoy_clusters import FAILOVER, SHADOW, cluster_name, guarded_cluster, shadow_cluster
from sluice.serving.routes import RouteState, Target

ROUTE_CONFIG = "sluice"
USERS_ROUTE = "split"
FORCE_HEADER = "x-sluice-force"
PROBE_KEY_HEADER = "x-sluice-probe-key"
MODEL_HEADER = "x-sluice-model"
RELEASE_HEADER = "x-sluice-release"
ADAPTER_HEADER = "x-sluice-adapter"
PASS_HEADER = "x-sluice-pass"
SESSION_HEADER = "x-session-id"
INTERNAL_HEADERS = (MODEL_HEADER, RELEASE_HEADER, ADAPTER_HEADER, PASS_HEADER)
"""Headers that only the gateway may set: what a client sends under these names is removed first."""

_TYPE = "type.googleapis.com/"
_PATHS = "/v1/(chat/completions|completions)"
_OVERWRITE = "OVERWRITE_IF_EXISTS_OR_ADD"


@dataclass(frozen=True)
class Timeouts:
    """How long a server may take, in seconds: until it begins to answer (a plain answer comes as one piece, so this
    bounds all of it), in silence within an answer, and in all. Then the answer is 504, or ends where it is."""

    first_byte_s: float = 300.0
    idle_s: float = 300.0
    answer_s: float = 3600.0


def routes(
    application: str, state: RouteState | None, version: str, probe_key: str, timeouts: Timeouts | None = None
) -> dict[str, Any]:
    """The route file. Without a state every question is answered with 503: there is no release yet."""
    answers = _answer_routes(application, state, probe_key, timeouts or Timeouts()) if state else []
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
                "request_headers_to_remove": [FORCE_HEADER, PROBE_KEY_HEADER, MODEL_HEADER, PASS_HEADER],
                "response_headers_to_add": [_set("traceparent", "%REQ(TRACEPARENT)%")],
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


def _answer_routes(application: str, state: RouteState, probe_key: str, timeouts: Timeouts) -> list[dict[str, Any]]:
    def split(name: str, match: dict[str, Any], shares: list[dict[str, Any]]) -> dict[str, Any]:
        return {"name": name, "match": match, "route": _action(shares, timeouts)}

    stable, canary = state.stable, state.canary
    found = [split(FAILOVER, _passed(FAILOVER), [_share(stable, 100)])]
    if canary is not None:
        found.append(split(SHADOW, _passed(SHADOW), [_share(canary, 100, cluster=shadow_cluster(canary.release))]))
    else:
        found.append(_reply(SHADOW, _passed(SHADOW), 409, "there is no canary"))
    for role, target in (("stable", stable), ("canary", canary)):
        match = _posted(application, _header(FORCE_HEADER, role), _header(PROBE_KEY_HEADER, probe_key))
        name = f"forced-{role}"
        found.append(
            split(name, match, [_share(target, 100)]) if target else _reply(name, match, 409, "there is no canary")
        )
    # Envoy walks the shares in this order along a session's hash: with stable first, a larger weight only ever adds
    # sessions to the canary, and nobody who was moved is moved back.
    shares = [_share(stable, 100 - state.weight)]
    if canary is not None and state.weight:
        guarded = guarded_cluster(canary.release) if canary.dedicated else None
        shares.append(_share(canary, state.weight, cluster=guarded))
    users = split(USERS_ROUTE, _posted(application), shares)
    if state.shadow:
        fraction = {"default_value": {"numerator": state.shadow, "denominator": "HUNDRED"}}
        users["route"]["request_mirror_policies"] = [{"cluster": SHADOW, "runtime_fraction": fraction}]
    return [*found, users]


def _action(shares: list[dict[str, Any]], timeouts: Timeouts) -> dict[str, Any]:
    return {
        "timeout": _seconds(timeouts.answer_s),
        "idle_timeout": _seconds(timeouts.idle_s),
        "hash_policy": [{"header": {"header_name": SESSION_HEADER}}],
        "retry_policy": {
            # Only what no server has begun to work on: a question that kills one server is not given to the next.
            "retry_on": "connect-failure,refused-stream",
            "num_retries": 2,
            "per_try_timeout": _seconds(timeouts.first_byte_s),
            "retry_priority": _extension(
                "previous", "retry.priority.previous_priorities.v3.PreviousPrioritiesConfig", update_frequency=1
            ),
            "retry_host_predicate": [_extension("previous", "retry.host.previous_hosts.v3.PreviousHostsPredicate")],
            "host_selection_retry_max_attempts": 3,
        },
        "weighted_clusters": {"use_hash_policy": True, "clusters": shares},
    }


def _share(target: Target, weight: int, *, cluster: str | None = None) -> dict[str, Any]:
    # Behind a guarded cluster another release may have answered, which says so itself.
    action = _OVERWRITE if cluster is None else "ADD_IF_ABSENT"
    return {
        "name": cluster or cluster_name(target.release),
        "weight": weight,
        "response_headers_to_add": [
            _set(RELEASE_HEADER, target.release, action),
            _set(ADAPTER_HEADER, target.adapter, action),
        ],
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


def _extension(name: str, kind: str, **config: Any) -> dict[str, Any]:
    return {"name": name, "typed_config": {"@type": _TYPE + "envoy.extensions." + kind, **config}}


def _seconds(value: float) -> str:
    return f"{value:g}s"


def _passed(name: str) -> dict[str, Any]:
    return {"safe_regex": {"regex": _PATHS}, "headers": [_header(PASS_HEADER, name)]}


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


def _set(name: str, value: str, action: str = _OVERWRITE) -> dict[str, Any]:
    return {"header": {"key": name, "value": value}, "append_action": action}
