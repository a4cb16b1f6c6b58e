"""A small API server that is as strict as a real one: schemas, unknown fields, resource versions, generations.

Objects of any kind in any namespace; `kubernetes_api.py` beside it answers for training jobs only. Structure is
checked against the shapes below, and against the real CRDs where they are on this machine. The CRDs' CEL rules that
matter for routes are written out (`_rules`): nothing here can evaluate CEL.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

Key = tuple[str, str, str]
TOKEN = "Bearer token-of-the-pod"

_FILTER: dict[str, Any] = {
    "type!": str,
    "requestHeaderModifier": {"set": [{"name!": str, "value!": str}], "add": [{}], "remove": [str]},
    "responseHeaderModifier": {"set": [{"name!": str, "value!": str}], "add": [{}], "remove": [str]},
    "requestMirror": {"backendRef!": {"group": str, "kind": str, "name!": str, "port": int}, "percent": int},
    "requestRedirect": {"path": {"type!": str, "replaceFullPath": str}, "statusCode": int},
    "extensionRef": {"group!": str, "kind!": str, "name!": str},
}
_MATCHED = [{"name!": str, "type": str, "value!": str}]
_RULE: dict[str, Any] = {
    "name": str,
    "matches": [{"path": {"type": str, "value": str}, "method": str, "headers": _MATCHED}],
    "filters": [_FILTER],
    "backendRefs": [
        {"group": str, "kind": str, "name!": str, "port": int, "weight": int, "filters": [_FILTER], "namespace": str}
    ],
    "timeouts": {"request": str, "backendRequest": str},
}
_PARENT = {"group": str, "kind": str, "name!": str, "namespace": str, "sectionName": str}
SHAPES: dict[str, Any] = {
    "HTTPRoute": {"parentRefs": [_PARENT], "hostnames": [str], "rules": [_RULE]},
    "TrafficPolicy": {"transformation": {"request": {"body": {"parseAs": str, "value": str}}}},
    "DirectResponse": {"status!": int, "body": str, "bodyFormat": {"json": dict, "text": str, "contentType": str}},
    "InferenceModelRewrite": {
        "poolRef!": {"group": str, "kind": str, "name!": str},
        "rules!": [
            {
                "matches": [{"model!": {"type": str, "value!": str}}],
                "targets": [{"modelRewrite!": str, "weight": int}],
            }
        ],
    },
    "Service": {
        "selector": dict,
        "ports": [{"name": str, "port!": int, "targetPort": (int, str), "protocol": str}],
        "clusterIP": str,
        "type": str,
    },
    "Lease": {
        "holderIdentity": str,
        "leaseDurationSeconds": int,
        "acquireTime": str,
        "renewTime": str,
        "leaseTransitions": int,
    },
}
_CRDS = {
    "HTTPRoute": "gateway-api/gateway.networking.k8s.io_httproutes.yaml",
    "TrafficPolicy": "kgateway/gateway.kgateway.dev_trafficpolicies.yaml",
    "DirectResponse": "kgateway/gateway.kgateway.dev_directresponses.yaml",
    "InferenceModelRewrite": "llm-d-router/llm-d.ai_inferencemodelrewrites.yaml",
}
MANIFESTS = next(
    (
        folder / "shared/manifests"
        for folder in Path(__file__).resolve().parents
        if (folder / "shared/manifests").is_dir()
    ),
    Path("/work/shared/manifests"),
)


class KubernetesServer:
    """State that a test reads and changes. So many of the next requests: `away` are answered 503, `conflicts` PUTs are
    answered 409, `lost` PUTs are done and the connection is cut before the answer. `asked` is (method, path) of all."""

    def __init__(self) -> None:
        self.objects: dict[Key, dict[str, Any]] = {}
        self.asked: list[tuple[str, str]] = []
        self.away = 0
        self.conflicts = 0
        self.lost = 0
        self.address = ""
        self._lock = threading.Lock()
        self._version = 0

    def client(self) -> Any:
        from kubernetes import client

        configuration = client.Configuration(host=self.address)
        configuration.api_key = {"authorization": TOKEN}
        configuration.retries = False
        return client.ApiClient(configuration)

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        with self._lock:
            self.asked.append((method, path))
            if self.away > 0:
                self.away -= 1
                return _status(503, "etcd is away")
            parts = path.strip("/").split("/")
            rest = parts[2:] if parts[0] == "api" else parts[3:]
            namespace, plural, name = rest[1], rest[2], rest[3] if len(rest) > 3 else ""
            sub = rest[4] if len(rest) > 4 else ""
            if body is not None and query.get("fieldValidation") != ["Strict"]:
                return _status(400, "this server takes writes with fieldValidation=Strict only")
            if method == "POST":
                return self._create(namespace, plural, body)
            if not name:
                return 200, {"items": self._listed(namespace, plural, query)}
            found = self.objects.get((plural, namespace, name))
            if found is None:
                return _status(404, f"{plural} {name!r} not found")
            if method == "DELETE":
                del self.objects[plural, namespace, name]
            if method == "PUT":
                return self._replace(found, body, sub)
            return 200, copy.deepcopy(found)

    def _create(self, namespace: str, plural: str, body: dict[str, Any]) -> tuple[int, Any]:
        key = (plural, namespace, body["metadata"]["name"])
        if key in self.objects:
            return _status(409, f"{plural} {key[2]!r} already exists")
        stored = copy.deepcopy(body)
        if wrong := invalid(stored):
            return _status(422, "; ".join(wrong))
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        stored["metadata"] |= {"namespace": namespace, "uid": str(uuid.uuid4()), "creationTimestamp": now}
        stored["metadata"] |= {"generation": 1, "resourceVersion": self._next()}
        stored.pop("status", None)
        self.objects[key] = stored
        return 201, copy.deepcopy(stored)

    def _replace(self, found: dict[str, Any], body: dict[str, Any], sub: str) -> tuple[int, Any]:
        if self.conflicts > 0:
            self.conflicts -= 1
            return _status(409, "the object has been modified; please apply your changes to the latest version")
        if body["metadata"].get("resourceVersion") != found["metadata"]["resourceVersion"]:
            return _status(409, "the object has been modified; please apply your changes to the latest version")
        changed = copy.deepcopy(found)
        if sub == "status":
            changed["status"] = copy.deepcopy(body["status"])
        else:
            changed["spec"] = copy.deepcopy(body["spec"])
            for name in ("labels", "annotations"):
                changed["metadata"][name] = copy.deepcopy(body["metadata"].get(name) or {})
            if wrong := invalid(changed):
                return _status(422, "; ".join(wrong))
            changed["metadata"]["generation"] += changed["spec"] != found["spec"]
        if changed != found:
            changed["metadata"]["resourceVersion"] = self._next()
        self.objects[found_key(changed)] = changed
        if self.lost > 0 and not sub:
            self.lost -= 1
            return 0, None
        return 200, copy.deepcopy(changed)

    def _listed(self, namespace: str, plural: str, query: dict[str, list[str]]) -> list[dict[str, Any]]:
        label, _, value = query["labelSelector"][0].partition("=")
        return [
            copy.deepcopy(one)
            for (kind, there, _), one in self.objects.items()
            if (kind, there) == (plural, namespace) and one["metadata"].get("labels", {}).get(label) == value
        ]

    def _next(self) -> str:
        self._version += 1
        return str(self._version)


def found_key(body: dict[str, Any]) -> Key:
    plurals = {"TrafficPolicy": "trafficpolicies"}
    plural = plurals.get(body["kind"], body["kind"].lower() + "s")
    return plural, body["metadata"]["namespace"], body["metadata"]["name"]


def invalid(body: dict[str, Any]) -> list[str]:
    """What the API server would say against the object; adds the CRD's defaults where the CRDs are here."""
    kind = body["kind"]
    wrong = _misshapen(SHAPES[kind], body.get("spec"), "spec")
    size = sum(len(name) + len(value) for name, value in body["metadata"].get("annotations", {}).items())
    if size > 256 * 1024:
        wrong.append("metadata.annotations: Too long: must have at most 262144 bytes")
    if kind == "HTTPRoute" and not wrong:
        wrong += _rules(body["spec"])
    if kind in _CRDS and MANIFESTS.is_dir():
        walk, cel, schema = _real(kind)
        walk(schema, body, "", wrong, cel, True)
    return wrong


@cache
def _real(kind: str) -> tuple[Any, Any, Any]:
    found = importlib.util.spec_from_file_location("check_manifests", MANIFESTS / "check_manifests.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    crd = next(one for one in yaml.load_all((MANIFESTS / "crds" / _CRDS[kind]).read_text(), Loader=loader) if one)
    (version,) = [one for one in crd["spec"]["versions"] if one["name"] in ("v1", "v1alpha1", "v1alpha2")][:1]
    return module.walk, module.Cel("none"), version["schema"]["openAPIV3Schema"]


def _misshapen(shape: Any, value: Any, path: str) -> list[str]:
    if isinstance(shape, dict) and shape:
        if not isinstance(value, dict):
            return [f"{path}: must be of type object"]
        names = {name.rstrip("!"): name for name in shape}
        wrong = [f'unknown field "{path}.{name}"' for name in value if name not in names]
        wrong += [
            f"{path}.{name}: Required value" for name, spelt in names.items() if spelt[-1] == "!" and name not in value
        ]
        for name in value:
            if name in names:
                wrong += _misshapen(shape[names[name]], value[name], f"{path}.{name}")
        return wrong
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{path}: must be of type array"]
        return [error for index, one in enumerate(value) for error in _misshapen(shape[0], one, f"{path}[{index}]")]
    wanted = dict if shape == {} else shape
    return [] if isinstance(value, wanted) and not isinstance(value, bool) else [f"{path}: wrong type"]


def _rules(spec: dict[str, Any]) -> list[str]:
    """The CEL rules of the HTTPRoute that a driver could break."""
    wrong = []
    if sum(len(rule.get("matches", [])) for rule in spec["rules"]) > 128:
        wrong.append("spec.rules: no more than 128 matches")
    if len(spec["rules"]) > 16:
        wrong.append("spec.rules: must have at most 16 items")
    for index, rule in enumerate(spec["rules"]):
        path = f"spec.rules[{index}]"
        for match in rule.get("matches", []):
            if not match["path"]["value"].startswith("/") or "//" in match["path"]["value"]:
                wrong.append(f"{path}.matches.path: must be an absolute path")
        if rule.get("backendRefs") and any(one["type"] == "RequestRedirect" for one in rule.get("filters", [])):
            wrong.append(f"{path}: RequestRedirect filter must not be used together with backendRefs")
        for filters in (rule.get("filters", []), *(one.get("filters", []) for one in rule.get("backendRefs", []))):
            kinds = [one["type"] for one in filters]
            for one in filters:
                field = one["type"][0].lower() + one["type"][1:]
                if set(one) != {"type", field}:
                    wrong.append(f"{path}.filters: filter.{field} must be specified for {one['type']} filter.type")
                if kinds.count(one["type"]) > 1 and one["type"] not in ("ExtensionRef", "RequestMirror"):
                    wrong.append(f"{path}.filters: {one['type']} filter cannot be repeated")
        for ref in rule.get("backendRefs", []):
            if ref.get("kind", "Service") == "Service" and "port" not in ref:
                wrong.append(f"{path}.backendRefs: Must have port for Service reference")
            if not 0 <= ref.get("weight", 1) <= 1_000_000:
                wrong.append(f"{path}.backendRefs.weight: must be between 0 and 1000000")
    return wrong


def _status(code: int, message: str) -> tuple[int, dict[str, Any]]:
    return code, {"kind": "Status", "status": "Failure", "code": code, "message": message}


@contextmanager
def serve() -> Iterator[KubernetesServer]:
    api = KubernetesServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _answer(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            url = urlsplit(self.path)
            if self.headers["authorization"] != TOKEN:
                code, answer = _status(401, "Unauthorized")
            else:
                code, answer = api.answer(self.command, url.path, parse_qs(url.query), body)
            if not code:
                self.close_connection = True
                self.connection.close()
                return
            data = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_DELETE = _answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    api.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
