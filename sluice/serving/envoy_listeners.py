"""Envoy's static configuration: one listener for clients, two inside Envoy for requests that go round again.

Limits, request ids, the log's fields and what may be asked at all are here; who answers is in the routes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.serving.answer_watch import ANSWER_SCRIPT, TRACE_SCRIPT
from sluice.serving.envoy_clusters import FAILOVER, SECOND_PASSES, SHADOW, second_pass_cluster
from sluice.serving.envoy_routes import (
    INTERNAL_HEADERS,
    MODEL_HEADER,
    PASS_HEADER,
    PROBE_KEY_HEADER,
    ROUTE_CONFIG,
)

if TYPE_CHECKING:
    from sluice.serving.envoy import GatewaySettings

_TYPE = "type.googleapis.com/envoy.extensions."
_KEY_HEADERS = ("authorization", "api-key", "x-api-key", PROBE_KEY_HEADER)
_MOST_KEYS = 10_000
"""Keys whose buckets are remembered; the one not seen for longest is forgotten, and starts with a full one."""


def bootstrap(settings: GatewaySettings) -> dict[str, Any]:
    """Envoy's static configuration."""
    return {
        "node": {"id": f"{settings.application}-gateway", "cluster": "sluice"},
        "admin": {"address": _address("127.0.0.1", settings.admin_port)},
        "bootstrap_extensions": [
            {
                "name": "internal-listeners",
                "typed_config": {"@type": _TYPE + "bootstrap.internal_listener.v3.InternalListener"},
            }
        ],
        "dynamic_resources": {"cds_config": _watched(settings.clusters_file)},
        "static_resources": {
            "clusters": [second_pass_cluster(name) for name in SECOND_PASSES],
            "listeners": [
                {
                    "name": "openai",
                    "address": _address(settings.host, settings.port),
                    "per_connection_buffer_limit_bytes": settings.max_body_bytes,
                    "filter_chains": [{"filters": [_for_clients(settings)]}],
                },
                *(_second_pass(settings, name) for name in SECOND_PASSES),
            ],
        },
    }


def _for_clients(settings: GatewaySettings) -> dict[str, Any]:
    # The body's model becomes a header, and the route is looked up again with it.
    name_the_model = {
        "append": {
            "header": {"key": MODEL_HEADER, "value": "%REQUEST_BODY(model)%"},
            "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
        }
    }
    return _connection_manager(
        settings,
        log=True,
        use_remote_address=True,
        stream_idle_timeout=f"{settings.timeouts.idle_s:g}s",
        request_headers_timeout="10s",
        normalize_path=True,
        merge_slashes=True,
        path_with_escaped_slashes_action="REJECT_REQUEST",
        always_set_request_id_in_response=True,
        early_header_mutation_extensions=[_early(*({"remove": name} for name in INTERNAL_HEADERS))],
        local_reply_config={"mappers": _ERRORS},
        http_filters=[
            _filter("trace", "filters.http.lua.v3.Lua", default_source_code={"inline_string": TRACE_SCRIPT}),
            *([_rate_limit(settings.requests_per_s)] if settings.requests_per_s else []),
            _filter("size", "filters.http.buffer.v3.Buffer", max_request_bytes=settings.max_body_bytes),
            _filter(
                "model-to-header",
                "filters.http.transform.v3.TransformConfig",
                clear_route_cache=True,
                request_transformation={"headers_mutations": [name_the_model]},
            ),
            # What this one does is in the chosen release's part of the route: its name inside vLLM.
            _filter("model-rewrite", "filters.http.transform.v3.TransformConfig"),
            _filter("answer-watch", "filters.http.lua.v3.Lua", default_source_code={"inline_string": ANSWER_SCRIPT}),
            _filter("router", "filters.http.router.v3.Router", suppress_envoy_headers=True),
        ],
    )


def _second_pass(settings: GatewaySettings, name: str) -> dict[str, Any]:
    """No address: nobody outside this Envoy can reach it. A mirrored request is logged, under the same request id; one
    that fell back to stable is logged where it came in."""
    watch = _filter("answer-watch", "filters.http.lua.v3.Lua", default_source_code={"inline_string": ANSWER_SCRIPT})
    mark = {"append": {"header": {"key": PASS_HEADER, "value": name}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}}
    manager = _connection_manager(
        settings,
        log=name == SHADOW,
        early_header_mutation_extensions=[_early(mark)],
        http_filters=[
            _filter("model-rewrite", "filters.http.transform.v3.TransformConfig"),
            *([watch] if name == SHADOW else []),
            _filter("router", "filters.http.router.v3.Router", suppress_envoy_headers=True),
        ],
    )
    if name == FAILOVER:
        manager["typed_config"]["local_reply_config"] = {"mappers": _ERRORS}
    return {
        "name": name,
        "internal_listener": {},
        "per_connection_buffer_limit_bytes": settings.max_body_bytes,
        "filter_chains": [{"filters": [manager]}],
    }


def _connection_manager(settings: GatewaySettings, *, log: bool, **config: Any) -> dict[str, Any]:
    writer = {
        "name": "file",
        "typed_config": {
            "@type": _TYPE + "access_loggers.file.v3.FileAccessLog",
            "path": str(settings.access_log),
            "log_format": {"json_format": _LOG_FIELDS},
        },
    }
    return {
        "name": "http",
        "typed_config": {
            "@type": _TYPE + "filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": ROUTE_CONFIG,
            "preserve_external_request_id": True,
            "rds": {"route_config_name": ROUTE_CONFIG, "config_source": _watched(settings.routes_file)},
            "access_log": [writer] if log else [],
            **config,
        },
    }


def _rate_limit(per_second: int) -> dict[str, Any]:
    """A bucket for each key that a client sends, and one for all that send none. Keys are neither stored nor logged."""
    bucket = {"max_tokens": 2 * per_second, "tokens_per_fill": per_second, "fill_interval": "1s"}
    always = {"default_value": {"numerator": 100, "denominator": "HUNDRED"}}
    return _filter(
        "rate-limit",
        "filters.http.local_ratelimit.v3.LocalRateLimit",
        stat_prefix="keys",
        token_bucket=bucket,
        filter_enabled=always,
        filter_enforced=always,
        always_consume_default_token_bucket=False,
        max_dynamic_descriptors=_MOST_KEYS,
        # No value: each one that comes gets a bucket of its own.
        descriptors=[{"entries": [{"key": name}], "token_bucket": bucket} for name in _KEY_HEADERS],
        rate_limits=[
            {"actions": [{"request_headers": {"header_name": name, "descriptor_key": name}}]} for name in _KEY_HEADERS
        ],
        response_headers_to_add=[{"header": {"key": "retry-after", "value": "1"}}],
    )


def _error(kind: str) -> dict[str, Any]:
    return {"error": {"message": "%LOCAL_REPLY_BODY%", "type": kind, "code": "%RESPONSE_CODE%"}}


def _status(operator: str, value: int) -> dict[str, Any]:
    compared = {"op": operator, "value": {"default_value": value, "runtime_key": f"sluice.error_{value}"}}
    return {"status_code_filter": {"comparison": compared}}


_TRACEPARENT = {
    "header": {"key": "traceparent", "value": "%REQ(TRACEPARENT)%"},
    "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
}
# What the gateway itself answers has the shape of an OpenAI error, so that clients show its message.
_ERRORS = [
    {
        "filter": _status("EQ", 429),
        "body": {"inline_string": "too many requests with this key: wait, then ask again"},
        "body_format_override": {"json_format": _error("rate_limit_error")},
        "headers_to_add": [_TRACEPARENT],
    },
    {
        "filter": _status("GE", 400),
        "body_format_override": {"json_format": _error("gateway_error")},
        "headers_to_add": [_TRACEPARENT],
    },
]

_LOG_FIELDS = {
    "ts": "%START_TIME(%s.%6f)%",
    "request_id": "%REQ(X-REQUEST-ID)%",
    "traceparent": "%REQ(TRACEPARENT)%",
    "session": "%REQ(X-SESSION-ID)%",
    "route": "%ROUTE_NAME%",
    "cluster": "%UPSTREAM_CLUSTER_RAW%",
    "answered": "%RESP(X-SLUICE-RELEASE)%",
    "status": "%RESPONSE_CODE%",
    "flags": "%RESPONSE_FLAGS%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "total_ms": "%DURATION%",
    "bytes": "%BYTES_SENT%",
    **{
        name: f"%DYNAMIC_METADATA(sluice:{name})%"
        for name in ("streamed", "ttft_ms", "last_ms", "tokens", "text", "truncated", "ended", "error")
    },
}


def _early(*mutations: dict[str, Any]) -> dict[str, Any]:
    return _filter("headers", "http.early_header_mutation.header_mutation.v3.HeaderMutation", mutations=list(mutations))


def _filter(name: str, kind: str, **config: Any) -> dict[str, Any]:
    return {"name": name, "typed_config": {"@type": _TYPE + kind, **config}}


def _watched(file: Path) -> dict[str, Any]:
    source = {"path": str(file), "watched_directory": {"path": str(file.parent)}}
    return {"resource_api_version": "V3", "path_config_source": source}


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}
