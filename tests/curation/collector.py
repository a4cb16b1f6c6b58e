"""Small HTTP servers for tests: a collector that decodes OTLP, and one that answers from a function."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sluice.provenance.canonical import Json

Respond = Callable[[str, str, bytes, dict[str, str]], tuple[int, bytes]]
"""`respond(method, path with query, body, headers)` gives the status and the body of the answer."""


@contextmanager
def http_server(respond: Respond) -> Iterator[str]:
    """Serve on a free port; gives the base address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, answer = respond(self.command, self.path, body, headers)
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = _answer

        def log_message(self, format: str, *args: object) -> None:
            """Tests do not log requests."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class Collector:
    """Keeps what was sent to /v1/traces: attributes of each span, and the headers of each request."""

    def __init__(self) -> None:
        self.status = 200
        self.spans: list[Json] = []
        self.headers: list[dict[str, str]] = []

    def __call__(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        if self.status != 200:
            return self.status, b""
        self.headers.append({**headers, "path": path})
        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    values = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}
                    self.spans.append(
                        {
                            "trace_id": span.trace_id.hex(),
                            "parent": span.parent_span_id.hex(),
                            "name": span.name,
                            "error": span.status.code == 2,
                            "attributes": values,
                        }
                    )
        return 200, b""


def as_bytes(value: Json) -> bytes:
    return json.dumps(value).encode()
