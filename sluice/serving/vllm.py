"""vLLM: how it is started here, and a client for what a rollout needs of it.

One server holds the base model and several adapters, each under its own immutable name; a server without a shelf holds
one model alone. Its port has no password and can load adapters: only the gateway and the rollout talk to it, on the
loopback interface.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sluice.infra.errors import ConflictError, InputError, UnavailableError
from sluice.infra.services import HealthCheck, ServiceSpec
from sluice.provenance.canonical import short
from sluice.serving.adapters import LORA_MODULES, AdapterShelf

if TYPE_CHECKING:
    import httpx

_DRAIN_S = 30
_WORKER_FOLDER = Path(__file__).parent / "vllm_worker"


def served_name(application: str, digest: str) -> str:
    """The immutable name of a release or base model inside vLLM: the application and 12 digits of the digest."""
    return f"{application}-{short(digest)}"


@dataclass(frozen=True)
class VllmSettings:
    """One vLLM server. `python` is the interpreter of its own environment, `model` the model's folder.

    `base_name` is that model's served name, `also_named` are further ones; `shelf` keeps the adapters that the server
    holds besides, so that a restart comes back with them (None: it takes no adapters, and runs at the model's own
    speed). `part` is its name among the local parts. `grouped_lora` replaces vLLM's slow LoRA operators for CPUs
    (`vllm_worker/grouped_lora.py`).
    `max_lora_rank` is the largest rank that can be loaded (memory for that many rows is set aside in every slot).
    `omp_threads` is VLLM_CPU_OMP_THREADS_BIND: "auto" keeps one core free for everything else, which on a busy
    machine is faster than taking all, because threads that wait for each other spin.
    """

    python: Path
    model: Path
    base_name: str
    shelf: AdapterShelf | None
    port: int
    host: str = "127.0.0.1"
    part: str = "vllm"
    also_named: tuple[str, ...] = ()
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    max_model_len: int = 4096
    max_loras: int = 4
    max_lora_rank: int = 16
    max_num_seqs: int = 64
    kv_cache_gib: int = 1
    omp_threads: str = "auto"
    grouped_lora: bool = True

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


def vllm_service(settings: VllmSettings) -> ServiceSpec:
    """How to run the server. Writes the shelf's list first, if there is one: the command reads it at every start."""
    if not settings.python.exists():
        raise InputError(
            f"serve_python = {str(settings.python)!r} does not exist.",
            hint="`make setup` creates the environment for vLLM; or set SLUICE_SERVE_PYTHON to its interpreter.",
        )
    if not (settings.model / "config.json").is_file():
        raise InputError(f"The model's folder {str(settings.model)!r} holds no config.json.")
    command = (
        str(settings.python), "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(settings.model),
        "--served-model-name", settings.base_name, *settings.also_named,
        "--host", settings.host,
        "--port", str(settings.port),
        "--dtype", settings.dtype,
        "--max-model-len", str(settings.max_model_len),
        "--max-num-seqs", str(settings.max_num_seqs),
        "--enforce-eager",
        "--shutdown-timeout", str(_DRAIN_S),
        *(_adapters(settings, settings.shelf) if settings.shelf else ()),
    )  # fmt: skip
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": settings.omp_threads,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    if settings.shelf:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
        if settings.grouped_lora:
            environment["PYTHONPATH"] = str(_WORKER_FOLDER)
    return ServiceSpec(
        name=settings.part,
        command=command,
        environment=environment,
        health=HealthCheck.http(f"{settings.url}/health"),
        ready_timeout_s=300.0,
        stop_wait_s=_DRAIN_S + 10,
        # Its first process drains the streams and ends the workers; a signal to the workers would cut the streams.
        stop_group=False,
        url=settings.url,
    )


def _adapters(settings: VllmSettings, shelf: AdapterShelf) -> tuple[str, ...]:
    shelf.write_list()
    return (
        "--config", str(shelf.list_file),
        "--enable-lora",
        "--max-loras", str(settings.max_loras),
        "--max-lora-rank", str(settings.max_lora_rank),
        # Without this the embedding and the head are wrapped too, and pay for adapters that never touch them.
        "--lora-target-modules", *LORA_MODULES,
        *(("--worker-extension-cls", "grouped_lora.GroupedLora") if settings.grouped_lora else ()),
    )  # fmt: skip


@dataclass(frozen=True)
class ServedModel:
    """One model that the server lists. `parent` is the base model's name for an adapter, None for the base itself;
    `root` the folder it was loaded from."""

    name: str
    parent: str | None
    root: str


@dataclass(frozen=True)
class Answer:
    """One answer. `tokens` are (text, log-probability) of each token; `first` the most likely first tokens; `prompt`
    and `ids` the numbers of the prompt's and the answer's tokens, the one that ended it included."""

    text: str
    finish_reason: str
    tokens: tuple[tuple[str, float], ...] = ()
    first: dict[str, float] = field(default_factory=dict)
    prompt: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()


class VllmClient:
    """Speaks to one vLLM server, or to the gateway where only `ask` is meant. Close it, or use it in `with`."""

    def __init__(self, url: str, *, timeout_s: float = 60.0) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._client: httpx.Client | None = None

    def __enter__(self) -> VllmClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def healthy(self) -> bool:
        """Does the server answer, with a live engine behind it?"""
        try:
            return self._request("GET", "/health").status_code == 200
        except UnavailableError:
            return False

    def models(self) -> tuple[ServedModel, ...]:
        """The base model and every loaded adapter. Raises `UnavailableError`."""
        listed = self._json(self._request("GET", "/v1/models"))["data"]
        return tuple(ServedModel(entry["id"], entry.get("parent"), str(entry.get("root") or "")) for entry in listed)

    def load_adapter(self, name: str, folder: Path) -> bool:
        """Load an adapter under a new name. False when it was loaded already from the same folder.

        Raises `ConflictError` when the name is taken by another folder: a live name is never replaced, since answers
        in flight would mix two adapters.
        """
        if self._held(name, folder):
            return False
        response = self._request("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        if response.status_code != 200 and not self._held(name, folder):
            raise UnavailableError(
                f"vLLM at {self.url} refused the adapter {name!r} from {str(folder)!r}: {_message(response)}.",
                hint="Its log tells more: `sluice logs vllm`.",
            )
        return True

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter; one that is not loaded is success. Send no request to it any more, then wait, first."""
        response = self._request("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        if response.status_code not in (200, 404):
            raise UnavailableError(f"vLLM at {self.url} did not unload {name!r}: {_message(response)}.")

    def running_requests(self) -> int:
        """Requests that run or wait in the server now, of all models together."""
        text = self._request("GET", "/metrics").text
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting{", "vllm:num_requests_waiting ")
        return int(sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(names)))

    def adapter_slots(self) -> int | None:
        """How many adapters the server holds at once. It tells only when it has been asked something: None before."""
        text = self._request("GET", "/metrics").text
        found = re.search(r'^vllm:lora_requests_info\{[^}]*max_lora="(\d+)"', text, re.MULTILINE)
        return int(found[1]) if found else None

    def wait_idle(self, *, timeout_s: float) -> None:
        """Wait until nothing runs in the server. Raises `UnavailableError` after `timeout_s` seconds."""
        import time

        until = time.monotonic() + timeout_s
        while running := self.running_requests():
            if time.monotonic() >= until:
                raise UnavailableError(f"{running} request(s) still run in vLLM after {timeout_s:g} s.")
            time.sleep(0.1)

    def ask(
        self,
        model: str,
        messages: Sequence[dict[str, str]],
        *,
        max_tokens: int,
        headers: dict[str, str] | None = None,
    ) -> tuple[Answer, dict[str, str]]:
        """Ask greedily (temperature 0), with log-probabilities. Returns the answer and the response's headers."""
        body = {
            "model": model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 5,
            "return_token_ids": True,
        }
        response = self._request("POST", "/v1/chat/completions", body, headers)
        if response.status_code != 200:
            raise UnavailableError(
                f"{self.url} answers {response.status_code} for the model {model!r}: {_message(response)}."
            )
        content = self._json(response)
        choice = content["choices"][0]
        steps = (choice.get("logprobs") or {}).get("content") or []
        answer = Answer(
            text=choice["message"].get("content") or "",
            finish_reason=str(choice.get("finish_reason")),
            tokens=tuple((step["token"], float(step["logprob"])) for step in steps),
            first={top["token"]: float(top["logprob"]) for top in steps[0]["top_logprobs"]} if steps else {},
            prompt=tuple(content.get("prompt_token_ids") or ()),
            ids=tuple(choice.get("token_ids") or ()),
        )
        return answer, dict(response.headers)

    def _held(self, name: str, folder: Path) -> bool:
        for model in self.models():
            if model.name == name:
                if model.root != str(folder):
                    raise ConflictError(
                        f"vLLM at {self.url} holds {name!r} from {model.root!r} already, not from {str(folder)!r}.",
                        hint="A served name belongs to one digest for ever; unload it first if that is meant.",
                    )
                return True
        return False

    def _request(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        import httpx

        if self._client is None:
            self._client = httpx.Client(base_url=self.url, timeout=self._timeout_s, trust_env=False)
        try:
            return self._client.request(method, path, json=body, headers=headers)
        except httpx.HTTPError as error:
            raise UnavailableError(
                f"{self.url} does not answer {path}: {error or type(error).__name__}.",
                hint="Is it running? `sluice status` tells.",
            ) from error

    def _json(self, response: httpx.Response) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise UnavailableError(f"{self.url} answered something that is not JSON: {response.text[:200]!r}.") from (
                error
            )


def _message(response: httpx.Response) -> str:
    try:
        content = response.json()
        return str(content["error"]["message"] if "error" in content else content.get("message", content))
    except (ValueError, KeyError, TypeError, AttributeError):
        return response.text[:300] or f"status {response.status_code}"
