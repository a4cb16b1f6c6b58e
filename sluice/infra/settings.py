"""One typed settings object for both profiles.

Precedence, highest first: environment (`SLUICE_OBJECT_STORE__BUCKET=...`), the settings file (`sluice.yaml`, or the
path in `SLUICE_SETTINGS`), what `sluice up` wrote down about the parts it started (`.sluice/endpoints.json`, local
profile only), the defaults below. Secrets are `SecretStr`: they come from the environment or a secrets file, never
print, and never enter a parameter, a log or an artifact.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from sluice.infra.errors import InputError
from sluice.infra.home import write_private, writing

SETTINGS_VARIABLE = "SLUICE_SETTINGS"
ENDPOINTS_FILE = "endpoints.json"
_SHOW = "`sluice config show` lists every setting with its meaning."


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ObjectStoreSettings(Section):
    """Where artifacts, step records and the ledger live."""

    endpoint_url: str | None = Field(None, description="S3 endpoint; empty means Amazon S3")
    region: str = "us-east-1"
    bucket: str = "sluice"
    access_key: str | None = None
    secret_key: SecretStr | None = None


class MlflowSettings(Section):
    """Tracking server, model registry and, in the local profile, the trace store."""

    tracking_uri: str | None = Field(None, description="http(s) address of the MLflow server")
    webhook_secret: SecretStr | None = Field(
        None,
        description="what MLflow signs its webhook calls with; empty: keys/webhook.secret in home, made on first use",
    )
    loopback_webhooks: bool = Field(
        False,
        description="let the embedded MLflow call webhooks on this machine; whoever reaches it can then make it "
        "call any address that this machine reaches",
    )


class TraceSettings(Section):
    """Where production traces go and are read from."""

    backend: Literal["mlflow", "langfuse"] = "mlflow"
    experiment: str = Field("production-traces", description="MLflow experiment that holds the traces")
    settle_s: float = Field(2.0, ge=0, description="seconds that a trace must be quiet before it is harvested")
    judge_score: str = Field(
        "judge", description="name of the score, 0 to 1, that an online judge writes to traces; a rollout compares it"
    )


class VectorSettings(Section):
    """The Milvus server that holds the RAG index."""

    uri: str | None = Field(None, description="http address of Milvus")


class TrainingSettings(Section):
    """Where a recipe trains on the cluster profile (docs/cluster-training.md)."""

    node_type: str = Field("p5.48xlarge", description="instance type of the nodes that train")
    image: str = Field("", description="image of the training environment, pinned: NAME@sha256:...")
    net_plugin: str = Field("aws-ofi", description="NCCL_NET_PLUGIN of that image: aws-ofi (NVIDIA's images) or ofi")
    namespace: str = Field("ml-training", description="Kubernetes namespace of training jobs")
    service_account: str = Field("sluice-training", description="service account of their pods")
    claim: str = Field("", description="PersistentVolumeClaim of the file system that the nodes share (FSx for Lustre)")
    mount: PurePosixPath = Field(PurePosixPath("/fsx"), description="where they mount it")
    object_store_secret: str | None = Field(
        None, description="Secret with access_key and secret_key; empty: the service account may use the bucket itself"
    )
    queue: str | None = Field(None, description="Kueue's LocalQueue that jobs wait in; empty: no queue")
    priority: str | None = Field(None, description="Kueue's WorkloadPriorityClass of jobs; needs a queue")


class ServingSettings(Section):
    """vLLM and the gateway in front of it."""

    vllm_url: str | None = Field(None, description="address of vLLM, reached by the rollout only")
    vllm_replicas: tuple[str, ...] = Field(
        (), description="addresses of further vLLM servers that hold the same models and see home's adapters folder"
    )
    gateway_url: str | None = Field(None, description="address that clients use")
    gateway_admin_url: str | None = Field(None, description="Envoy's admin address")
    mode: Literal["adapters", "merged"] = Field(
        "adapters",
        description="adapters: releases side by side in one vLLM; merged: a server for each, with the adapter merged "
        "into its base (docs/merged-models.md)",
    )
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    max_model_len: int = Field(
        4096, ge=64, description="tokens of prompt and answer; a judge's prompts need 1,500 and more"
    )
    max_loras: int = Field(4, ge=1, description="adapters that one server holds at once")
    max_lora_rank: int = Field(16, ge=1, description="largest rank of an adapter that the server takes")
    requests_per_s: int = Field(
        200, ge=0, description="requests a second that one API key may send, in bursts of twice as many; 0: no limit"
    )
    first_byte_timeout_s: float = Field(300.0, gt=0, description="until vLLM begins to answer; then 504")
    idle_timeout_s: float = Field(300.0, gt=0, description="silence within an answer that ends it")
    answer_timeout_s: float = Field(3600.0, gt=0, description="longest answer")
    kv_cache_gib: int = Field(1, ge=1, description="CPU only: vLLM's key-value cache, whole GiB")
    input_price: float = Field(1.0, ge=0, description="price of a million prompt tokens, in any currency")
    output_price: float = Field(4.0, ge=0, description="price of a million tokens of answers, in the same currency")


class ClusterSettings(Section):
    """The gateway of the cluster profile (docs/kubernetes-routing.md)."""

    router: Literal["http-route", "model-rewrite"] = Field(
        "http-route", description="what sends requests to releases: HTTPRoutes (Kgateway) or llm-d's model rewrites"
    )
    namespace: str = Field("ml-serving", description="Kubernetes namespace of the servers and the routes")
    gateway: str = Field("llm", description="http-route: name of the Gateway")
    gateway_namespace: str = Field("", description="http-route: its namespace; empty: the same")
    listener: str = Field("", description="http-route: its listener; empty: all")
    hostname: str = Field("", description="host name that clients ask; empty: any")
    gateway_service: str = Field("", description="http-route: name:port of the proxies' Service; needed to shadow")
    pool: str = Field("llm", description="model-rewrite: name of the InferencePool")
    proxies_url: str = Field("", description="http(s) address of the proxies themselves, to confirm changes by asking")
    metrics_url: str = Field("", description="http(s) address of their Prometheus metrics, to count running requests")


class JudgeSettings(Section):
    """The model that judges answers (docs/judge.md)."""

    url: str = Field(
        "", description="OpenAI-compatible address, ending in /v1; empty: the base model in the local vLLM"
    )
    model: str = Field("", description="its name there")
    model_digest: str = Field("", description="digest of its weights, or a revision that its owner never changes")
    api_key: SecretStr | None = None


class ReleasePolicy(Section):
    """Who may put a release before users."""

    allow_override: bool = Field(False, description="may a named person force a release past a gate that refused it")
    decision_valid_hours: float = Field(168.0, gt=0, description="age after which a gate's decision has expired")
    accept_decisions_of: tuple[str, ...] = Field(
        (), description="sites whose gate decides for imported releases here too; an approval is always asked for"
    )


class EventSettings(Section):
    """Who is told what happens in a rollout (docs/watching.md)."""

    url: SecretStr | None = Field(None, description="http(s) address that each event is posted to; empty: nobody")
    format: Literal["cloudevents", "slack"] = Field(
        "cloudevents", description="CloudEvents 1.0 as JSON, or a line of text as Slack's incoming webhooks take it"
    )
    secret: SecretStr | None = Field(None, description="what each call is signed with (standardwebhooks.com)")
    authorization: SecretStr | None = Field(None, description="value of the header Authorization of each call")

    @field_validator("url")
    @classmethod
    def _address(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and not re.match(r"https?://[^/\s]+", url.get_secret_value()):
            raise ValueError("it is not an http(s) address")
        return url


Role = Literal["viewer", "operator", "approver", "administrator"]


class AccessSettings(Section):
    """Who may destroy or promote (docs/access.md). On the cluster profile the cluster's RBAC decides instead."""

    roles: dict[str, list[Role]] = Field({}, description="roles by login name; empty: the owner of home has all")
    default: list[Role] | None = Field(None, description="roles of everybody whom access.roles does not name")
    trust_actor: bool = Field(False, description="take SLUICE_ACTOR for the name of whoever acts")
    approve_in_mlflow: bool | None = Field(
        None, description="take over approvals made in MLflow, whose names nobody checks; empty: on the local profile"
    )


class SigningSettings(Section):
    """What signs statements, ledger entries and models, and whose signatures count."""

    key_file: Path | None = Field(
        None, description="private key; empty: keys/signing.pem, made on first use; a relative path is below home"
    )
    pkcs11_uri: str | None = Field(None, description="RFC 7512 URI of a key on a token, used in place of key_file")
    pin: SecretStr | None = Field(None, description="the token's PIN")
    trust_policy: Path | None = Field(None, description="whose signatures count; empty: trust.yaml in home")
    sigstore: bool = Field(False, description="sign models through Sigstore, with this machine's workload identity")
    sigstore_identity: str | None = Field(None, description="identity that a Sigstore signature of a model must carry")
    sigstore_issuer: str | None = Field(None, description="OpenID Connect issuer of that identity")
    sigstore_trust_config: Path | None = Field(None, description="trust configuration of a private Sigstore")


class PortSettings(Section):
    """Fixed ports of the local parts; 0 lets `sluice up` choose a free one and keep it."""

    s3: int = Field(0, ge=0, le=65535)
    mlflow: int = Field(0, ge=0, le=65535)
    milvus: int = Field(0, ge=0, le=65535)
    vllm: int = Field(0, ge=0, le=65535)
    gateway: int = Field(0, ge=0, le=65535)
    gateway_admin: int = Field(0, ge=0, le=65535)
    rollouts: int = Field(0, ge=0, le=65535, description="figures of the rollouts for Prometheus")


class Settings(BaseSettings):
    """Everything that may differ between two installations of Sluice."""

    model_config = SettingsConfigDict(
        env_prefix="SLUICE_",
        env_nested_delimiter="__",
        # An empty variable means "not set", as it does for SLUICE_SETTINGS: an empty home would be the current folder.
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        populate_by_name=True,
    )

    profile: Literal["local", "cluster"] = "local"
    application: str = Field(
        "assistant",
        pattern=r"^[a-z][a-z0-9-]{1,40}$",
        description="registered model in MLflow, and the model name that clients ask the gateway for",
    )
    site: str = Field(
        "",
        pattern=r"^([a-z0-9][a-z0-9-]{0,40})?$",
        description="name of this site in what it hands over; empty: made of its key",
    )
    home: Path = Field(Path(".sluice"), description="state of this installation: services, keys, runs, caches")
    serve_python: Path = Field(Path(".venv-serve/bin/python"), description="interpreter of the vLLM environment")
    base_model: Literal["smollm2-135m-instruct", "tiny-random-llama"] = Field(
        "smollm2-135m-instruct", description="base model; the random one is for tests"
    )
    object_store: ObjectStoreSettings = ObjectStoreSettings()
    mlflow: MlflowSettings = MlflowSettings()
    traces: TraceSettings = TraceSettings()
    vectors: VectorSettings = VectorSettings()
    training: TrainingSettings = TrainingSettings()
    serving: ServingSettings = ServingSettings()
    cluster: ClusterSettings = ClusterSettings()
    judge: JudgeSettings = JudgeSettings()
    release: ReleasePolicy = ReleasePolicy()
    events: EventSettings = EventSettings()
    access: AccessSettings = AccessSettings()
    signing: SigningSettings = SigningSettings()
    ports: PortSettings = PortSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # The environment wins over the files, which `load_settings` hands in as initial values.
        return env_settings, init_settings

    @property
    def logs(self) -> Path:
        """Folder of the local parts' logs."""
        return self.home / "logs"

    @property
    def runs(self) -> Path:
        """Folder of pipeline runs: one folder a run."""
        return self.home / "runs"


def load_settings(path: Path | None = None) -> Settings:
    """Read the settings. Raises `InputError` that names the field, the value and the source's name."""
    chosen = path or (Path(os.environ[SETTINGS_VARIABLE]) if os.environ.get(SETTINGS_VARIABLE) else None)
    if chosen is not None and not chosen.is_file():
        raise InputError(
            f"The settings file {str(chosen)!r} does not exist.",
            hint=f"Create it, or unset {SETTINGS_VARIABLE} to use ./sluice.yaml or the defaults.",
        )
    file = chosen or Path("sluice.yaml")
    from_file = _read_yaml(file) if file.is_file() else {}
    home = Path(str(os.environ.get("SLUICE_HOME") or from_file.get("home") or ".sluice")).expanduser()
    profile = os.environ.get("SLUICE_PROFILE") or from_file.get("profile") or "local"
    endpoints = read_endpoints(home) if profile == "local" else {}
    try:
        settings = Settings(**_merge(endpoints, from_file))
    except ValidationError as error:
        raise InputError(_explain(error, file), hint=_SHOW) from error
    except SettingsError as error:
        # A whole section in one variable must be JSON, such as SLUICE_PORTS='{"s3": 8333}'.
        raise InputError(f"An environment variable SLUICE_... cannot be read: {error}.", hint=_SHOW) from error
    # A step's process may run in another folder: every path of the settings is absolute from here on. The
    # interpreter's path is not resolved: following the link would leave its virtual environment.
    return settings.model_copy(
        update={
            "home": settings.home.expanduser().absolute(),
            "serve_python": settings.serve_python.expanduser().absolute(),
        }
    )


def read_endpoints(home: Path) -> dict[str, Any]:
    """What `sluice up` wrote down about the parts it started, in the shape of the settings; empty before."""
    try:
        found = json.loads((home / ENDPOINTS_FILE).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(
            f"The file {str(home / ENDPOINTS_FILE)!r} cannot be read: {error}.",
            hint="Remove it and run `sluice up`, which writes it anew.",
        ) from error
    return found if isinstance(found, dict) else {}


def write_endpoints(home: Path, endpoints: dict[str, Any]) -> None:
    """Publish the local parts' addresses and credentials, readable by the owner only. Raises `UnavailableError`."""
    with writing(home):
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(home / ENDPOINTS_FILE, json.dumps(endpoints, indent=2))


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"The settings file {str(path)!r} cannot be read: {error}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"The settings file {str(path)!r} must hold a mapping, not a {type(content).__name__}.")
    if strange := [key for key in content if not isinstance(key, str)]:
        raise InputError(f"The settings file {str(path)!r} has {strange[0]!r} where the name of a setting belongs.")
    return content


def _merge(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _explain(error: ValidationError, file: Path) -> str:
    sentences = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"])
        variable = "SLUICE_" + "__".join(str(part) for part in problem["loc"]).upper()
        source = f"environment variable {variable}" if variable in os.environ else str(file)
        shown = _shown(field, problem["input"])
        sentences.append(f"Setting {field} = {shown} ({source}): {problem['msg']}.")
    return " ".join(sentences)


def _shown(field: str, value: object) -> str:
    """The value for a message. A whole section may hold a secret, and so may a misspelt field; a chat's address is
    one."""
    if field == "events.url" or re.search("secret|key|password|token|auth", field.rpartition(".")[2], re.IGNORECASE):
        return "(hidden)"
    return repr(value) if isinstance(value, str | int | float | None) else f"(a {type(value).__name__})"
