"""A chat server that streams like vLLM, on a free port, and misbehaves as told: for tests without a model."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """One answer: streamed words, then the finish reason (None: the stream just ends), or an HTTP error status.

    `calls` are pieces of tool calls, one event each: what stands in `delta.tool_calls`. `cut`: the connection drops
    after the first word. `junk`: a first event that is no JSON.
    """

    text: str = "an answer"
    finish: str | None = "stop"
    status: int = 200
    pause_s: float = 0.0
    calls: Sequence[dict[str, Any]] = ()
    cut: bool = False
    junk: bool = False


@dataclass
class ChatServer:
    """`asked`: last message of each request; `bodies`: each request as it came."""

    url: str = ""
    asked: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def asked_of(self, model: str) -> list[str]:
        """Questions that this model was asked."""
        return [body["messages"][-1]["content"] for body in self.bodies if body["model"] == model]


@contextmanager
def chat_server(
    reply: Callable[[str, int], Reply] | None = None,
    *,
    by_model: Callable[[str, str], Reply] | None = None,
    port: int = 0,
) -> Iterator[ChatServer]:
    """Serve; `reply(question, attempt)` says what to do, `attempt` counting from 1 for each question; or
    `by_model(model, question)`."""
    state = ChatServer()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            content = json.dumps({"object": "list", "data": []}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            question = body["messages"][-1]["content"]
            with state.lock:
                state.asked.append(question)
                state.bodies.append(body)
                attempt = state.asked.count(question)
                state.at_once += 1
                state.most_at_once = max(state.most_at_once, state.at_once)
            try:
                plan = by_model(body["model"], question) if by_model else reply(question, attempt) if reply else Reply()
                self._reply(plan, body)
            finally:
                with state.lock:
                    state.at_once -= 1

        def _reply(self, plan: Reply, body: dict[str, Any]) -> None:
            time.sleep(plan.pause_s)
            self.send_response(plan.status)
            self.send_header("content-type", "text/event-stream" if plan.status == 200 else "application/json")
            if plan.cut:
                self.send_header("content-length", "100000")
            self.end_headers()
            if plan.status != 200:
                self.wfile.write(json.dumps({"error": {"message": "made to fail"}}).encode())
                return
            if plan.junk:
                self.wfile.write(b"data: <html>504</html>\n\n")
            words = plan.text.split(" ") if plan.text else []
            deltas: list[dict[str, Any]] = [{"content": (" " if i else "") + word} for i, word in enumerate(words)]
            deltas += [{"tool_calls": [piece]} for piece in plan.calls]
            choices: list[list[dict[str, Any]]] = [
                [{"index": 0, "delta": delta, "finish_reason": None}] for delta in deltas
            ]
            if plan.finish:
                choices.append([{"index": 0, "delta": {}, "finish_reason": plan.finish}])
            for choice in choices:
                self._event({"choices": choice}, body)
                if plan.cut:
                    return
            usage = {"prompt_tokens": 7, "completion_tokens": len(words), "total_tokens": 7 + len(words)}
            self._event({"choices": [], "usage": usage}, body)
            self.wfile.write(b"data: [DONE]\n\n")

        def _event(self, content: dict[str, Any], body: dict[str, Any]) -> None:
            event: dict[str, Any] = {
                "id": "x",
                "object": "chat.completion.chunk",
                "created": 0,
                "model": body["model"],
                **content,
            }
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

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
