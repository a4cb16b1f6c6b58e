"""Answers Prometheus on this machine: GET /metrics, with figures of that moment; GET /healthz asks nothing."""

from __future__ import annotations

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sluice.infra.errors import SluiceError, UnavailableError
from sluice.infra.ports import LOOPBACK
from sluice.serving.rollout_metrics import CONTENT_TYPE


def metrics_server(port: int, text: Callable[[], str]) -> ThreadingHTTPServer:
    """A server that is bound and not yet started; `text` is asked at every call. Raises `UnavailableError`."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0  # s: who connects and asks nothing keeps no thread

        def do_GET(self) -> None:  # the name http.server calls
            if self.path == "/healthz":
                self._answer(200, "ok\n")
                return
            if self.path.partition("?")[0] != "/metrics":
                self._answer(404, "GET /metrics\n")
                return
            try:
                self._answer(200, text(), CONTENT_TYPE)
            except SluiceError as error:
                # No figures are no zero: Prometheus notes the target as down.
                self._answer(503, f"{error.message}\n")

        def _answer(self, code: int, body: str, kind: str = "text/plain; charset=utf-8") -> None:
            content = body.encode()
            self.send_response(code)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            """Scrapes are no news."""

    try:
        return ThreadingHTTPServer((LOOPBACK, port), Handler)
    except OSError as error:
        raise UnavailableError(
            f"Port {port} of {LOOPBACK} cannot be opened: {error.strerror or error}.",
            hint="Choose another --serve PORT.",
        ) from error


def serve_metrics(port: int, text: Callable[[], str]) -> None:
    """Serve until the process is told to stop."""
    with metrics_server(port, text) as server:
        server.serve_forever()
