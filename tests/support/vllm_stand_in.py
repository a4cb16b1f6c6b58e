"""A small program in the place of the vLLM environment's interpreter: starts in a moment, and serves as vLLM does.

`stand_in(folder)` makes it executable. Answers to the names of `--served-model-name`, counts what runs in /metrics, and
drains on SIGTERM. A question's content is how many pieces the answer has, one every 50 ms.
"""

from __future__ import annotations

import http.server
import json
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

running = 0
counting = threading.Lock()


def stand_in(folder: Path) -> Path:
    """An executable that stands for `python` of the vLLM environment."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P "{__file__}" "$@"\n')
    script.chmod(0o755)
    return script


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    names: tuple[str, ...] = ()

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self._send(200, f'vllm:num_requests_running{{engine="0"}} {running}.0\n'.encode())
        elif self.path == "/v1/models":
            self._json(200, {"data": [{"id": name, "parent": None, "root": ""} for name in self.names]})
        else:
            self._send(200, b"")

    def do_POST(self) -> None:
        global running
        size = self.headers["content-length"]
        body = json.loads(self.rfile.read(int(size)) if size else self._chunks())
        if body["model"] not in self.names:
            self._json(404, {"error": {"message": f"no model {body['model']}"}})
            return
        with counting:
            running += 1
        try:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for number in range(int(body["messages"][-1]["content"])):
                time.sleep(0.05)
                self._chunk({"model": self.names[0], "choices": [{"delta": {"content": f"{number} "}}]})
            self._chunk({"choices": [{"delta": {}, "finish_reason": "stop"}]})
            self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        finally:
            with counting:
                running -= 1

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _chunk(self, content: dict[str, Any]) -> None:
        data = b"data: " + json.dumps(content).encode() + b"\n\n"
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _json(self, status: int, content: dict[str, Any]) -> None:
        self._send(status, json.dumps(content).encode())

    def _send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


def main(arguments: list[str]) -> None:
    port = int(arguments[arguments.index("--port") + 1])
    after = arguments[arguments.index("--served-model-name") + 1 :]
    Answer.names = tuple(after[: next((n for n, word in enumerate(after) if word.startswith("--")), len(after))])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Answer)
    server.daemon_threads = True

    def drain(*_: object) -> None:
        threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, drain)
    server.serve_forever(poll_interval=0.05)
    while running:
        time.sleep(0.02)


if __name__ == "__main__":
    main(sys.argv[1:])
