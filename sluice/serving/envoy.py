"""The local gateway: Envoy's fixed configuration, and how it is started.

The bootstrap never changes while Envoy runs. Routes and clusters are files beside it that Envoy watches; the router
replaces them by rename. Only two POST paths and the list of models reach a server; everything else of vLLM (loading
adapters, metrics) stays behind the gateway.
"""

from __future__ import annotations

import json
import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sluice.infra.errors import InputError, UnavailableError
from sluice.infra.services import HealthCheck, ServiceSpec
from sluice.provenance.canonical import digest_json
from sluice.serving.durable import replace_file
from sluice.serving.envoy_admin import EnvoyAdmin
from sluice.serving.envoy_clusters import clusters
from sluice.serving.envoy_listeners import bootstrap
from sluice.serving.envoy_routes import ROUTE_CONFIG, Timeouts, routes
from sluice.serving.log_rotation import rotate

CONFIG_VERSION_STATS = ("cluster_manager.cds.version_text", f"http.{ROUTE_CONFIG}.rds.{ROUTE_CONFIG}.version_text")


@dataclass(frozen=True)
class GatewaySettings:
    """One gateway: the application it serves, its folder of files and its two addresses.

    `max_body_bytes` bounds a question; a larger one is answered with 413. `requests_per_s` bounds what one API key may
    ask, in bursts of twice as many (0: no bound); more is answered with 429. `max_log_bytes`: the access log is put
    aside when it is larger, and the last `kept_logs` of those are kept.
    """

    application: str
    folder: Path
    port: int
    admin_port: int
    host: str = "127.0.0.1"
    max_body_bytes: int = 1 << 20
    requests_per_s: int = 200
    timeouts: Timeouts = field(default_factory=Timeouts)
    max_log_bytes: int = 64 << 20
    kept_logs: int = 4

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
        # Envoy reads its bootstrap once: a changed one (another release of Sluice, a setting) starts it anew.
        environment={"SLUICE_GATEWAY_BOOTSTRAP": digest_json(bootstrap(settings))},
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
    with suppress(UnavailableError):  # one that does not run yet opens its log by name anyway
        rotate(settings, EnvoyAdmin(settings.admin_port))
    key = probe_key(settings)
    # JSON is YAML, and needs no YAML library to be written exactly.
    replace_file(settings.bootstrap, json.dumps(bootstrap(settings), indent=1))
    if not settings.clusters_file.exists():
        replace_file(settings.clusters_file, json.dumps(clusters((), "0")))
    if not settings.routes_file.exists():
        replace_file(
            settings.routes_file,
            json.dumps(routes(settings.application, None, "0", key, settings.timeouts)),
            mode=0o600,
        )


def probe_key(settings: GatewaySettings) -> str:
    """The key that lets a probe choose its release, made on first use and readable by the owner only.

    Without it the header that forces a release is ignored: a user cannot reach a release that has no approval.
    """
    if not settings.probe_key_file.exists():
        replace_file(settings.probe_key_file, secrets.token_hex(24), mode=0o600)
    return settings.probe_key_file.read_text().strip()
