"""A small stand-in for a model server: speaks the OpenAI dialect, streams, and breaks on demand."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Upstream(ThreadingHTTPServer):
    """One server. `mode` says how it answers: "fine", "fail" (500), "cut" (ends mid-stream),
    "empty", "slow", "long" (cut at the limit), "words" (ten pieces, 10 ms apart), "hang" (takes and never answers)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.modes: dict[str, str] = {}
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.dead = threading.Event()
        self._connections: set[socket.socket] = set()

    def die(self) -> None:
        """Like kill -9: nothing listens any more, and every connection ends where it is."""
        self.dead.set()
        self.shutdown()
        self.server_close()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silent: a client that leaves is no news."""

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Upstream

    def do_POST(self) -> None:
        body = json.loads(self._body())
        model = body["model"]
        self.server.seen.append((model, {name.lower(): value for name, value in self.headers.items()}))
        mode = self.server.modes.get(model, "fine")
        if mode == "hang":
            self.server.dead.wait(30)
            self.close_connection = True
        elif mode == "fail":
            self._json(500, {"error": {"message": "broken"}})
        elif body.get("stream"):
            self._stream(mode)
        else:
            content = "" if mode == "empty" else f"answer of {model}"
            self._json(200, {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]})

    def do_GET(self) -> None:
        self._json(200, {"secret": "metrics"})

    def _body(self) -> bytes:
        if "content-length" in self.headers:
            return self.rfile.read(int(self.headers["content-length"]))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _stream(self, mode: str) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self._chunk({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        time.sleep(0.6 if mode == "slow" else 0.05)
        for _ in range(10 if mode == "words" else 1):
            self._chunk({"choices": [{"delta": {"content": "hello"}}]})
            time.sleep(0.01 if mode == "words" else 0)
        if mode == "cut":
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self._chunk({"choices": [{"delta": {}, "finish_reason": "length" if mode == "long" else "stop"}]})
        self._write(b"data: [DONE]\n\n")
        self._write(b"")

    def _chunk(self, content: dict[str, Any]) -> None:
        self._write(b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n")

    def _write(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _json(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content, separators=(",", ":")).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: the test reads what came, not the server's log."""


@contextmanager
def upstream() -> Iterator[Upstream]:
    """A running server."""
    server = Upstream()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        if not server.dead.is_set():
            server.die()
