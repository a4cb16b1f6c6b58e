"""A stand-in for vLLM that holds adapters under names and says what it is told: for tests without a model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from sluice.provenance.canonical import digest_file
from sluice.serving.parity import ReferenceAnswer

PROMPT = (1, 2, 3)
Said = Sequence[tuple[int, float]]
"""An answer's tokens: number and log-probability."""
PLAIN: Said = ((10, -0.5), (11, -0.4))


@dataclass
class VllmServer:
    """`says(model, adapter's folder or None)` is every answer; `refuses` are served names that do not load; `slots` is
    what /metrics tells (None: nothing yet); `asked` the models of all questions."""

    base: str
    says: Callable[[str, Path | None], Said] = lambda *_: PLAIN
    url: str = ""
    adapters: dict[str, Path] = field(default_factory=dict)
    refuses: set[str] = field(default_factory=set)
    slots: int | None = 4
    asked: list[str] = field(default_factory=list)
    prompt: tuple[int, ...] = PROMPT
    on_load: Callable[[Path], object] = lambda _: None

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, object]:
        if path == "/v1/models":
            adapters = [{"id": name, "parent": self.base, "root": str(at)} for name, at in self.adapters.items()]
            return 200, {"data": [{"id": self.base, "parent": None, "root": "base"}, *adapters]}
        if path == "/metrics":
            told = f'vllm:lora_requests_info{{max_lora="{self.slots}",running_lora_adapters=""}} 1.0'
            return 200, "" if self.slots is None else told
        if path == "/v1/load_lora_adapter":
            if body["lora_name"] in self.refuses:
                return 500, {"error": {"message": "no memory for it"}}
            self.adapters[body["lora_name"]] = Path(body["lora_path"])
            self.on_load(Path(body["lora_path"]))
            return 200, "Success"
        if path == "/v1/unload_lora_adapter":
            found = self.adapters.pop(body["lora_name"], None)
            return (200 if found else 404), "done"
        model = body["model"]
        self.asked.append(model)
        if model != self.base and model not in self.adapters:
            return 404, {"error": {"message": f"no model {model}"}}
        said = self.says(model, self.adapters.get(model))[: body["max_tokens"]]
        steps: list[dict[str, Any]] = [
            {"token": f"t{token}", "logprob": value, "top_logprobs": [{"token": f"t{token}", "logprob": value}]}
            for token, value in said
        ]
        text = " ".join(step["token"] for step in steps)
        choice = {"message": {"content": text}, "finish_reason": "length", "logprobs": {"content": steps}}
        return 200, {
            "choices": [choice | {"token_ids": [token for token, _ in said]}],
            "prompt_token_ids": list(self.prompt),
        }


@contextmanager
def vllm_server(server: VllmServer) -> Iterator[VllmServer]:
    """Serve on a free port until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._send(*server.answer("GET", self.path, {}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self._send(*server.answer("POST", self.path, body))

        def _send(self, status: int, content: object) -> None:
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def reference(said: Said, prompts: int = 1, prompt: Sequence[int] = PROMPT) -> tuple[ReferenceAnswer, ...]:
    """What the training library would say where it says the same."""
    steps = [[[token, value], [900, value - 1.0]] for token, value in said]
    return (ReferenceAnswer.from_json({"prompt": list(prompt), "steps": steps}),) * prompts


def digests_of(folder: Path) -> dict[str, str]:
    """Digests of an adapter's files, as its manifest has them."""
    return {file.name: digest_file(file) for file in sorted(folder.iterdir())}
