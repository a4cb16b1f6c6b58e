"""A server of completions and chat that answers as told, on a free port: log-likelihoods and answers known exactly."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKENS = ["<unk>", "<s>", "</s>", *(chr(code) for code in range(32, 127)), "\n"]
"""The vocabulary: one token a character."""


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer of single characters, as a base model's folder holds it."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(TOKENS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    return folder


@dataclass
class Reply:
    """`likelihood` of each token of a prompt, or the `text` of a chat answer, or an HTTP `status`. `tokens`: log-
    probabilities more or fewer than were asked for; `hold`: an event to wait for before answering at all."""

    likelihood: float = -1.0
    text: str = ""
    status: int = 200
    tokens: int = 0
    hold: threading.Event | None = None
    body: bytes | None = None


@dataclass
class Server:
    url: str = ""
    asked: list[str] = field(default_factory=list)
    payloads: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def completions_server(reply: Callable[[str], Reply | None], port: int = 0) -> Iterator[Server]:
    """Serve; `reply(text)` says what to do with a prompt's text or a chat's last message, None closes the line."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            chat = "messages" in body
            prompt = body["messages"][-1]["content"] if chat else body["prompt"]
            ids = prompt[0] if isinstance(prompt, list) else []
            text = prompt if isinstance(prompt, str) else "".join(TOKENS[number] for number in ids)
            state.asked.append(text)
            state.payloads.append(body)
            plan = reply(text)
            if plan is None:
                self.close_connection = True
                return
            if plan.hold:
                plan.hold.wait(20)
            content: Any = {"message": {"content": plan.text}} if chat else _echo(ids, plan)
            data = plan.body if plan.body is not None else json.dumps({"choices": [{"index": 0, **content}]}).encode()
            self.send_response(plan.status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _echo(ids: list[int], plan: Reply) -> dict[str, Any]:
    """As vLLM echoes: none for the first token, one for each other, one for the token it had to generate."""
    values = [None, *([plan.likelihood] * len(ids))]
    values = values[: len(values) + plan.tokens] if plan.tokens < 0 else values + [plan.likelihood] * plan.tokens
    return {
        "logprobs": {
            "token_logprobs": values,
            "top_logprobs": [None if value is None else {"x": value} for value in values],
        }
    }
