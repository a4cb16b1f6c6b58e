"""The local gateway: Envoy's fixed configuration, and how it is started.

The bootstrap never changes while Envoy runs. Routes and clusters are files beside it that Envoy watches; the router
replaces them by rename. Only two POST paths and the list of models reach a server; everything else of vLLM (loading
adapters, metrics) stays behind the gateway.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sluice.infra.errors import InputError
from sluice.infra.services import HealthCheck, ServiceSpec
from sluice.serving.answer_watch import SCRIPT
from sluice.serving.durable import replace_file
from sluice.serving.envoy_routes import INTERNAL_HEADERS, MODEL_HEADER, ROUTE_CONFIG, clusters, routes

_TYPE = "type.googleapis.com/envoy.extensions."
CONFIG_VERSION_STATS = ("cluster_manager.cds.version_text", f"http.{ROUTE_CONFIG}.rds.{ROUTE_CONFIG}.version_text")


@dataclass(frozen=True)
class GatewaySettings:
    """One gateway: the application it serves, its folder of files and its two addresses.

    `max_body_bytes` bounds a question; a larger one is answered with 413. `idle_timeout_s` is how long a request may
    stay silent before it is ended.
    """

    application: str
    folder: Path
    port: int
    admin_port: int
    host: str = "127.0.0.1"
    max_body_bytes: int = 1 << 20
    idle_timeout_s: float = 300.0

    @property
    def url(self) -> str:
        """The address that clients use, without a path."""
        return f"http://{self.host}:{self.port}"

    @property
    def admin_url(self) -> str:
        """Envoy's admin address; never leaves the loopback interface."""
        return f"http://127.0.0.1:{self.admin_port}"

    @property
    def bootstrap(self) -> Path:
        return self.folder / "envoy.yaml"

    @property
    def clusters_file(self) -> Path:
        return self.folder / "cds" / "cds.yaml"

    @property
    def routes_file(self) -> Path:
        return self.folder / "rds" / "rds.yaml"

    @property
    def state_file(self) -> Path:
        """What the router decided; the two files above follow from it."""
        return self.folder / "routes.json"

    @property
    def access_log(self) -> Path:
        return self.folder / "log" / "access.jsonl"

    @property
    def probe_key_file(self) -> Path:
        return self.folder / "probe.key"


def gateway_service(settings: GatewaySettings, envoy: str, *, depends_on: tuple[str, ...] = ()) -> ServiceSpec:
    """How to run the gateway. `envoy` is the binary. Call `prepare_gateway` first: Envoy needs its files."""
    command = (
        envoy,
        "--config-path", str(settings.bootstrap),
        # Two installations on one machine would otherwise meet in the shared memory of hot restarts.
        "--disable-hot-restart",
        "--concurrency", "2",
        # The analysis reads the log while it is written; the default keeps lines back for 10 seconds.
        "--file-flush-interval-msec", "200",
        "--log-level", "warning",
    )  # fmt: skip
    return ServiceSpec(
        name="gateway",
        command=command,
        health=HealthCheck.http(f"{settings.admin_url}/ready"),
        ready_timeout_s=30.0,
        stop_wait_s=5,
        depends_on=depends_on,
        url=settings.url,
    )


def prepare_gateway(settings: GatewaySettings) -> None:
    """Write what Envoy needs to start. Routes that were decided before are left as they are."""
    if not 0 < settings.max_body_bytes <= 1 << 30:
        raise InputError(f"max_body_bytes = {settings.max_body_bytes} is not between 1 and 1 GiB.")
    settings.access_log.parent.mkdir(parents=True, exist_ok=True)
    key = probe_key(settings)
    # JSON is YAML, and needs no YAML library to be written exactly.
    replace_file(settings.bootstrap, json.dumps(bootstrap(settings), indent=1))
    if not settings.clusters_file.exists():
        replace_file(settings.clusters_file, json.dumps(clusters((), "0")))
    if not settings.routes_file.exists():
        replace_file(settings.routes_file, json.dumps(routes(settings.application, None, "0", key)), mode=0o600)


def probe_key(settings: GatewaySettings) -> str:
    """The key that lets a probe choose its release, made on first use and readable by the owner only.

    Without it the header that forces a release is ignored: a user cannot reach a release that has no approval.
    """
    if not settings.probe_key_file.exists():
        replace_file(settings.probe_key_file, secrets.token_hex(24), mode=0o600)
    return settings.probe_key_file.read_text().strip()


def bootstrap(settings: GatewaySettings) -> dict[str, Any]:
    """Envoy's static configuration."""
    return {
        "node": {"id": f"{settings.application}-gateway", "cluster": "sluice"},
        "admin": {"address": _address("127.0.0.1", settings.admin_port)},
        "dynamic_resources": {"cds_config": _watched(settings.clusters_file)},
        "static_resources": {
            "listeners": [
                {
                    "name": "openai",
                    "address": _address(settings.host, settings.port),
                    "per_connection_buffer_limit_bytes": settings.max_body_bytes,
                    "filter_chains": [{"filters": [_connection_manager(settings)]}],
                }
            ]
        },
    }


def _connection_manager(settings: GatewaySettings) -> dict[str, Any]:
    config = {
        "@type": _TYPE + "filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": ROUTE_CONFIG,
        "stream_idle_timeout": f"{settings.idle_timeout_s:g}s",
        "request_headers_timeout": "10s",
        "use_remote_address": True,
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        "preserve_external_request_id": True,
        "always_set_request_id_in_response": True,
        "rds": {"route_config_name": ROUTE_CONFIG, "config_source": _watched(settings.routes_file)},
        "access_log": [
            {
                "name": "file",
                "typed_config": {
                    "@type": _TYPE + "access_loggers.file.v3.FileAccessLog",
                    "path": str(settings.access_log),
                    "log_format": {"json_format": _LOG_FIELDS},
                },
            }
        ],
        "early_header_mutation_extensions": [
            {
                "name": "strip",
                "typed_config": {
                    "@type": _TYPE + "http.early_header_mutation.header_mutation.v3.HeaderMutation",
                    "mutations": [{"remove": name} for name in INTERNAL_HEADERS],
                },
            }
        ],
        # What the gateway itself answers has the shape of an OpenAI error, so that clients show its message.
        "local_reply_config": {
            "mappers": [
                {
                    "filter": {
                        "status_code_filter": {
                            "comparison": {"op": "GE", "value": {"default_value": 400, "runtime_key": "sluice.error"}}
                        }
                    },
                    "body_format_override": {
                        "json_format": {
                            "error": {
                                "message": "%LOCAL_REPLY_BODY%",
                                "type": "gateway_error",
                                "code": "%RESPONSE_CODE%",
                            }
                        }
                    },
                }
            ]
        },
        "http_filters": [
            _filter("size", "filters.http.buffer.v3.Buffer", max_request_bytes=settings.max_body_bytes),
            # The body's model becomes a header, and the route is looked up again with it.
            _filter(
                "model-to-header",
                "filters.http.transform.v3.TransformConfig",
                clear_route_cache=True,
                request_transformation={
                    "headers_mutations": [
                        {
                            "append": {
                                "header": {"key": MODEL_HEADER, "value": "%REQUEST_BODY(model)%"},
                                "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
                            }
                        }
                    ]
                },
            ),
            # What this one does is in the chosen release's part of the route: its name inside vLLM.
            _filter("model-rewrite", "filters.http.transform.v3.TransformConfig"),
            _filter("answer-watch", "filters.http.lua.v3.Lua", default_source_code={"inline_string": SCRIPT}),
            _filter("router", "filters.http.router.v3.Router", suppress_envoy_headers=True),
        ],
    }
    return {"name": "http", "typed_config": config}


_LOG_FIELDS = {
    "ts": "%START_TIME(%s.%6f)%",
    "request_id": "%REQ(X-REQUEST-ID)%",
    "traceparent": "%REQ(TRACEPARENT)%",
    "session": "%REQ(X-SESSION-ID)%",
    "route": "%ROUTE_NAME%",
    "cluster": "%UPSTREAM_CLUSTER_RAW%",
    "status": "%RESPONSE_CODE%",
    "flags": "%RESPONSE_FLAGS%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "total_ms": "%DURATION%",
    "bytes": "%BYTES_SENT%",
    **{
        name: f"%DYNAMIC_METADATA(sluice:{name})%"
        for name in ("streamed", "ttft_ms", "chunks", "text", "truncated", "ended", "error")
    },
}


def _filter(name: str, kind: str, **config: Any) -> dict[str, Any]:
    return {"name": name, "typed_config": {"@type": _TYPE + kind, **config}}


def _watched(file: Path) -> dict[str, Any]:
    source = {"path": str(file), "watched_directory": {"path": str(file.parent)}}
    return {"resource_api_version": "V3", "path_config_source": source}


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}
