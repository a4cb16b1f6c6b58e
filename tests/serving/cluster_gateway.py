"""A gateway of a cluster, small: follows an HTTPRoute or an InferenceModelRewrite of an API server, and answers by it.

It does what the Gateway API's specification says of rules, filters and weights (not more), so that what a driver
writes is tried with requests.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jinja2

from sluice.infra.kubernetes_objects import Kind, KubernetesObjects
from sluice.serving.http_route_rules import DIRECT_RESPONSE, HTTP_ROUTE, TRAFFIC_POLICY


class ClusterGateway:
    """`mode`: "follow", "silent" (the controller is dead, the proxies keep what they have) or "refuse". `behind`: the
    controller accepts and the proxies keep what they have. `models` are
    the names that the servers hold. `running` are lines of the metrics page. `seen` are (rule, model) of answers."""

    def __init__(self, objects: KubernetesObjects, kind: Kind, name: str) -> None:
        self.mode = "follow"
        self.live: dict[str, Any] = {}
        self.models: set[str] = set()
        self.running: list[str] = []
        self.seen: list[tuple[str, str]] = []
        self.address = ""
        self._objects = objects
        self._kind = kind
        self._name = name
        self._looked: tuple[int, str] = (0, "")
        self._named: dict[str, dict[str, Any]] = {}
        self.behind = False
        self._end = threading.Event()

    def follow(self) -> None:
        while not self._end.wait(0.03):
            if self.mode == "silent":
                continue
            try:
                self._look()
            except Exception:  # noqa: BLE001
                # The API is away, or somebody wrote in between: look again, as controllers do.
                continue

    def stop(self) -> None:
        self._end.set()

    def _look(self) -> None:
        found = self._objects.get(self._kind, self._name)
        if found is None or (found["metadata"]["generation"], self.mode) == self._looked:
            return
        if self._kind is HTTP_ROUTE:
            refused = self.mode == "refuse"
            condition = {
                "observedGeneration": found["metadata"]["generation"],
                "lastTransitionTime": "2026-11-21T12:00:00Z",
                "reason": "UnsupportedValue" if refused else "Accepted",
                "message": "a filter is not supported" if refused else "",
                "status": "False" if refused else "True",
            }
            conditions = [condition | {"type": "Accepted"}, condition | {"type": "ResolvedRefs", "status": "True"}]
            parent = {"parentRef": found["spec"]["parentRefs"][0], "controllerName": "kgateway.dev/kgateway"}
            body = found | {"status": {"parents": [parent | {"conditions": conditions}]}}
            self._objects._ask("PUT", self._kind, f"{self._name}/status", body)
            self._looked = (found["metadata"]["generation"], self.mode)
            if refused:
                return
        if not self.behind:
            self.live = found

    def answer(self, method: str, path: str, headers: dict[str, str], body: Any) -> tuple[int, dict[str, str], Any]:
        if path == "/metrics":
            return 200, {}, "\n".join(self.running)
        if not self.live:
            return 404, {}, "no route"
        if self._kind is HTTP_ROUTE:
            return self._by_route(method, path, headers, body)
        return self._by_rewrite(body)

    def _by_rewrite(self, body: Any) -> tuple[int, dict[str, str], Any]:
        def exact(rule: dict[str, Any]) -> bool:
            return any(match["model"]["value"] == body["model"] for match in rule.get("matches", []))

        rules = self.live["spec"]["rules"]
        rule = next((one for one in rules if exact(one)), None) or next(one for one in rules if "matches" not in one)
        weights = [target["weight"] for target in rule["targets"]]
        model = random.choices(rule["targets"], weights)[0]["modelRewrite"]
        self.seen.append((body["model"], model))
        return (200, {}, {"model": model}) if model in self.models else (404, {}, "no such model")

    def _by_route(self, method: str, path: str, headers: dict[str, str], body: Any) -> tuple[int, dict[str, str], Any]:
        rule = _matching(self.live["spec"]["rules"], method, path, headers)
        if rule is None:
            return 404, {}, "no rule"
        for one in rule.get("filters", []):
            if one["type"] == "RequestRedirect":
                return 302, {"location": one["requestRedirect"]["path"]["replaceFullPath"]}, ""
            if one["type"] == "ExtensionRef":
                reply = self._get(DIRECT_RESPONSE, one)["spec"]
                return reply["status"], {"content-type": "application/json"}, reply["bodyFormat"]["json"]
            if one["type"] == "RequestHeaderModifier":
                headers = headers | {new["name"]: new["value"] for new in one["requestHeaderModifier"].get("set", [])}
        backend = random.choices(rule["backendRefs"], [ref["weight"] for ref in rule["backendRefs"]])[0]
        told: dict[str, str] = {}
        for one in backend["filters"]:
            if one["type"] == "ResponseHeaderModifier":
                told |= {new["name"]: new["value"] for new in one["responseHeaderModifier"]["set"]}
            if one["type"] == "ExtensionRef":
                body = rewritten(self._get(TRAFFIC_POLICY, one)["spec"]["transformation"]["request"]["body"], body)
        for one in rule.get("filters", []):
            if one["type"] == "RequestMirror" and random.random() < one["requestMirror"]["percent"] / 100:
                self.answer(method, path, headers, body)
        self.seen.append((rule["name"], body["model"]))
        return 200, told, {"model": body["model"]}

    def _get(self, kind: Kind, one: dict[str, Any]) -> dict[str, Any]:
        assert one["extensionRef"]["kind"] == kind.name
        name = one["extensionRef"]["name"]
        # What routes name is made before them and does not change.
        found = self._named.get(name) or self._objects.get(kind, name)
        assert found is not None, one
        return self._named.setdefault(name, found)


def rewritten(transformed: dict[str, Any], body: Any) -> Any:
    """The body after Kgateway's transformation, with another engine of the same template language."""
    assert transformed["parseAs"] == "AsJson"
    text = _template(transformed["value"]).render(context=lambda: body, raw_string=lambda text: json.dumps(text)[1:-1])
    return json.loads(text)


@cache
def _template(text: str) -> jinja2.Template:
    return jinja2.Environment().from_string(text)


def _matching(rules: list[Any], method: str, path: str, headers: dict[str, str]) -> Any:
    """All paths here are exact: more header matches come first, then the earlier rule."""
    found = [
        (-len(match.get("headers", [])), index)
        for index, rule in enumerate(rules)
        for match in rule["matches"]
        if match["path"]["value"] == path
        and match["method"] == method
        and all(_holds(one, headers.get(one["name"])) for one in match.get("headers", []))
    ]
    return rules[min(found)[1]] if found else None


def _holds(match: dict[str, Any], value: str | None) -> bool:
    if value is None:
        return False
    return value == match["value"] if match["type"] == "Exact" else bool(re.fullmatch(match["value"], value))


@contextmanager
def running(objects: KubernetesObjects, kind: Kind, name: str) -> Iterator[ClusterGateway]:
    gateway = ClusterGateway(objects, kind, name)

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            headers = {key.lower(): value for key, value in self.headers.items()}
            code, told, answer = gateway.answer(self.command, self.path, headers, body)
            data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(code)
            for key, value in told.items():
                self.send_header(key, value)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    gateway.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    threading.Thread(target=gateway.follow, daemon=True).start()
    try:
        yield gateway
    finally:
        gateway.stop()
        server.shutdown()
        server.server_close()


def eventually(holds: Any, seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)
