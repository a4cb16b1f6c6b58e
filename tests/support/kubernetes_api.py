"""A server that answers as the Kubernetes API does, for a few kinds of one namespace, and notes what it was asked."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Objects = dict[tuple[str, str], dict[str, Any]]


class KubernetesApi:
    """State that a test reads and changes. `on_look` is called before each GET of a TrainJob, with its number (from 1);
    `away` so many requests are answered 503; `refuse` is a status and message for creations."""

    def __init__(self) -> None:
        self.objects: Objects = {}
        self.pods: list[dict[str, Any]] = []
        self.logs: dict[str, str] = {}
        self.asked: list[tuple[str, str]] = []
        self.on_look: Callable[[int], None] = lambda _: None
        self.looks = 0
        self.away = 0
        self.refuse: tuple[int, str] | None = None
        self.keep_deleted = 0
        self.address = ""

    def add(self, plural: str, body: dict[str, Any]) -> None:
        body["metadata"]["uid"] = str(uuid.uuid4())
        self.objects[plural, body["metadata"]["name"]] = body

    def client(self) -> Any:
        from kubernetes import client

        configuration = client.Configuration(host=self.address)
        configuration.api_key = {"authorization": "Bearer token-of-the-pod"}
        configuration.retries = False
        return client.ApiClient(configuration)

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        self.asked.append((method, path))
        if self.away > 0:
            self.away -= 1
            return 503, status(503, "etcd is away")
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            if parts[-1] == "log":
                name = parts[-2]
                return (200, self.logs[name]) if name in self.logs else (404, status(404, f"pods {name} not found"))
            return 200, {"kind": "PodList", "items": self.pods}
        plural, name = parts[5], parts[6] if len(parts) > 6 else ""
        if method == "POST":
            if self.refuse:
                return self.refuse[0], status(*self.refuse)
            if (plural, body["metadata"]["name"]) in self.objects:
                return 409, status(409, f"{plural} {body['metadata']['name']!r} already exists")
            self.add(plural, body)
            return 201, body
        if not name:
            wanted = query["labelSelector"][0].partition("=")[::2]
            items = [
                one
                for (kind, _), one in self.objects.items()
                if kind == plural and one["metadata"].get("labels", {}).get(wanted[0]) == wanted[1]
            ]
            return 200, {"items": items}
        if method == "GET" and plural == "trainjobs":
            self.looks += 1
            self.on_look(self.looks)
        found = self.objects.get((plural, name))
        if found is None:
            return 404, status(404, f"{plural} {name!r} not found")
        if method == "DELETE":
            found["metadata"]["deletionTimestamp"] = "2026-11-21T12:00:00Z"
        if found["metadata"].get("deletionTimestamp"):
            # With foreground deletion an object is there until its pods are gone.
            if self.keep_deleted <= 0:
                del self.objects[plural, name]
            self.keep_deleted -= 1
        return 200, found


def status(code: int, message: str) -> dict[str, Any]:
    return {"kind": "Status", "status": "Failure", "code": code, "message": message}


@contextmanager
def serve() -> Iterator[KubernetesApi]:
    api = KubernetesApi()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            url = urlsplit(self.path)
            answer: Any
            if self.headers["authorization"] != "Bearer token-of-the-pod":
                code, answer = 401, status(401, "Unauthorized")
            else:
                code, answer = api.answer(self.command, url.path, parse_qs(url.query), body)
            data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("content-type", "text/plain" if isinstance(answer, str) else "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = _answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    api.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
