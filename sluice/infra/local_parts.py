"""The parts of the local profile that hold state: SeaweedFS (S3), MLflow (tracking, registry, traces), Milvus.

All listen on the loopback address only. vLLM and the gateway are described by the room `serving`.
"""

from __future__ import annotations

import base64
import hmac
import importlib.metadata
import json
import secrets as randomness
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from sluice.infra.errors import InputError
from sluice.infra.home import publish_once, write_private, writing
from sluice.infra.mlflow_database import ARTIFACT_ROOT, default_cache, ensure_database
from sluice.infra.ports import LOOPBACK
from sluice.infra.program import program
from sluice.infra.progress import Report, no_report
from sluice.infra.services import HealthCheck, ServiceSpec
from sluice.infra.settings import Settings

# The administration server starts even without its pages, and would take a port that all installations share.
_SEAWEEDFS_SERVERS = ("s3", "master", "volume", "filer", "admin")
LOCAL_PORTS = (
    "s3",
    *(name for server in _SEAWEEDFS_SERVERS for name in (f"weed_{server}", f"weed_{server}_grpc") if name != "weed_s3"),
    "mlflow",
    "milvus",
)
"""Names in the port book. `s3`, `mlflow` and `milvus` can be fixed in the settings; the rest stays inside SeaweedFS."""

SECRETS_FILE = "secrets.json"

_LOOPBACK_WEBHOOKS = {"MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "https,http", "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true"}


@dataclass(frozen=True)
class LocalSecrets:
    """The keys of the local object store."""

    access_key: str
    secret_key: SecretStr


def load_or_create_secrets(settings: Settings) -> LocalSecrets:
    """The object store's keys: those of the settings where both are given, else random ones, made once and kept.

    Raises `InputError` when the file was damaged, `UnavailableError` when it cannot be written.
    """
    store = settings.object_store
    if store.access_key and store.secret_key:
        return LocalSecrets(store.access_key, store.secret_key)
    file = settings.home / SECRETS_FILE
    with writing(settings.home):
        settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not file.exists():
            made = {"access_key": randomness.token_hex(10), "secret_key": randomness.token_urlsafe(30)}
            staging = file.with_name(f".{SECRETS_FILE}.{randomness.token_hex(4)}")
            write_private(staging, json.dumps(made))
            publish_once(staging, file)
    try:
        found = json.loads(file.read_text())
        return LocalSecrets(str(found["access_key"]), SecretStr(str(found["secret_key"])))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"The file {str(file)!r} cannot be read.",
            hint="Remove it; `sluice up` makes new keys and restarts the store.",
        ) from error


def prepare_local_parts(settings: Settings, report: Report = no_report, *, cache: Path | None = None) -> None:
    """What must exist before the parts start: their folders and MLflow's database. Doing it again changes nothing."""
    with writing(settings.home):
        for name in ("seaweedfs", "mlflow", "milvus"):
            (settings.home / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    ensure_database(_mlflow_database(settings), cache or default_cache(), report)


def local_parts(settings: Settings, ports: Mapping[str, int], secrets: LocalSecrets) -> list[ServiceSpec]:
    """The parts' descriptions. `ports` must hold every name of `LOCAL_PORTS`."""
    return [_seaweedfs(settings, ports, secrets), _mlflow(settings, ports, secrets), _milvus(settings, ports)]


def endpoints(settings: Settings, ports: Mapping[str, int], secrets: LocalSecrets) -> dict[str, Any]:
    """Addresses and keys of the parts in the shape of the settings, for `settings.write_endpoints`."""
    return {
        "object_store": {
            "endpoint_url": _url(ports["s3"]),
            "bucket": settings.object_store.bucket,
            "access_key": secrets.access_key,
            "secret_key": secrets.secret_key.get_secret_value(),
        },
        "mlflow": {"tracking_uri": _url(ports["mlflow"])},
        "vectors": {"uri": _url(ports["milvus"])},
    }


def _seaweedfs(settings: Settings, ports: Mapping[str, int], secrets: LocalSecrets) -> ServiceSpec:
    own = [
        option
        for server in _SEAWEEDFS_SERVERS
        for option in (
            f"-{server}.port={ports['s3' if server == 's3' else f'weed_{server}']}",
            f"-{server}.port.grpc={ports[f'weed_{server}_grpc']}",
        )
    ]
    return ServiceSpec(
        name="seaweedfs",
        command=(
            program("weed"),
            "-logtostderr=true",
            "mini",
            f"-dir={settings.home / 'seaweedfs'}",
            f"-ip={LOOPBACK}",
            f"-ip.bind={LOOPBACK}",
            *own,
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-admin.ui=false",
            "-webdav=false",
            "-master.telemetry=false",
            f"-bucket={settings.object_store.bucket}",
        ),
        environment=_keys(settings, secrets),
        health=HealthCheck.http(f"{_url(ports['s3'])}/healthz"),
        ports=tuple(name for name in LOCAL_PORTS if name == "s3" or name.startswith("weed_")),
        ready_timeout_s=60.0,
        # It takes its time to hand volumes over: about 3 s.
        stop_wait_s=15,
        directory=settings.home / "seaweedfs",
        url=_url(ports["s3"]),
    )


def _mlflow(settings: Settings, ports: Mapping[str, int], secrets: LocalSecrets) -> ServiceSpec:
    return ServiceSpec(
        name="mlflow",
        command=(
            sys.executable,
            "-m",
            "mlflow",
            "server",
            f"--backend-store-uri=sqlite:///{_mlflow_database(settings)}",
            f"--default-artifact-root={ARTIFACT_ROOT}",
            f"--artifacts-destination=s3://{settings.object_store.bucket}/mlflow",
            "--serve-artifacts",
            f"--host={LOOPBACK}",
            f"--port={ports['mlflow']}",
            "--workers=1",
        ),
        environment={
            **_keys(settings, secrets),
            "MLFLOW_S3_ENDPOINT_URL": _url(ports["s3"]),
            # Scheduled jobs (scorers on the server) would take four more processes and 0.5 GB.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            "PYTHONUNBUFFERED": "1",
            # Without a key of ours it would make one at each start, and not read its webhooks' secrets any more.
            "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": _webhook_key(secrets),
            **(_LOOPBACK_WEBHOOKS if settings.mlflow.loopback_webhooks else {}),
            # Another version is another part: it must be started anew on the database that it migrated.
            "SLUICE_MLFLOW_VERSION": importlib.metadata.version("mlflow"),
        },
        health=HealthCheck.http(f"{_url(ports['mlflow'])}/health"),
        ports=("mlflow",),
        ready_timeout_s=180.0,
        stop_wait_s=15,
        directory=settings.home / "mlflow",
        url=_url(ports["mlflow"]),
    )


def _milvus(settings: Settings, ports: Mapping[str, int]) -> ServiceSpec:
    return ServiceSpec(
        name="milvus",
        command=(
            program("milvus-lite"),
            "server",
            "--data-dir",
            str(settings.home / "milvus"),
            "--host",
            LOOPBACK,
            "--port",
            str(ports["milvus"]),
        ),
        environment={"PYTHONUNBUFFERED": "1"},
        health=HealthCheck.grpc(LOOPBACK, ports["milvus"]),
        ports=("milvus",),
        ready_timeout_s=60.0,
        stop_wait_s=15,
        directory=settings.home / "milvus",
        url=_url(ports["milvus"]),
    )


def _keys(settings: Settings, secrets: LocalSecrets) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": secrets.access_key,
        "AWS_SECRET_ACCESS_KEY": secrets.secret_key.get_secret_value(),
        "AWS_DEFAULT_REGION": settings.object_store.region,
        # Without this the client looks for a cloud's metadata server, and waits for it, when a key is wrong.
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _webhook_key(secrets: LocalSecrets) -> str:
    """A Fernet key: 32 bytes in base64, derived from the one secret that this home keeps anyway."""
    derived = hmac.digest(secrets.secret_key.get_secret_value().encode(), b"secrets of MLflow's webhooks", "sha256")
    return base64.urlsafe_b64encode(derived).decode()


def _mlflow_database(settings: Settings) -> Path:
    return settings.home / "mlflow" / "mlflow.db"


def _url(port: int) -> str:
    return f"http://{LOOPBACK}:{port}"
