"""An HTTPRoute as Envoy's routes, in the way Kgateway translates one: to try a real proxy on what the driver writes."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from sluice.serving.durable import replace_file
from tests.serving.gateway import envoy_binary, free_port

_TYPE = "type.googleapis.com/envoy.extensions.filters."
Objects = dict[tuple[str, str, str], dict[str, Any]]


def routes(objects: Objects, version: str) -> dict[str, Any]:
    """Rules as routes: those with more header matches first, then as listed."""
    (spec,) = [one["spec"] for key, one in objects.items() if key[0] == "httproutes"]
    found = [
        (-len(match.get("headers", [])), index, {"match": _match(match), **_action(rule, objects)})
        for index, rule in enumerate(spec["rules"])
        for match in rule["matches"]
    ]
    host = {
        "name": "app",
        "domains": spec["hostnames"],
        "routes": [one[2] for one in sorted(found, key=lambda one: one[:2])],
    }
    config = {"@type": "type.googleapis.com/envoy.config.route.v3.RouteConfiguration", "name": "route"}
    return {"version_info": version, "resources": [config | {"virtual_hosts": [host]}]}


def _match(match: dict[str, Any]) -> dict[str, Any]:
    headers: list[Any] = [{"name": ":method", "string_match": {"exact": match["method"]}}]
    for one in match.get("headers", []):
        how = {"exact": one["value"]} if one["type"] == "Exact" else {"safe_regex": {"regex": one["value"]}}
        headers.append({"name": one["name"], "string_match": how})
    return {"path": match["path"]["value"], "headers": headers}


def _action(rule: dict[str, Any], objects: Objects) -> dict[str, Any]:
    route: dict[str, Any] = {"timeout": rule.get("timeouts", {}).get("request", "15s")}
    outer: dict[str, Any] = {}
    for one in rule.get("filters", []):
        if one["type"] == "RequestRedirect":
            to = one["requestRedirect"]
            return {"redirect": {"path_redirect": to["path"]["replaceFullPath"], "response_code": "FOUND"}}
        if one["type"] == "ExtensionRef":
            reply = _named(objects, "directresponses", one)["spec"]
            body = {"inline_string": json.dumps(reply["bodyFormat"]["json"])}
            return {"direct_response": {"status": reply["status"], "body": body}}
        if one["type"] == "RequestHeaderModifier":
            outer["request_headers_to_add"] = [_set(new) for new in one["requestHeaderModifier"]["set"]]
        if one["type"] == "RequestMirror":
            fraction = {"default_value": {"numerator": one["requestMirror"]["percent"], "denominator": "HUNDRED"}}
            route["request_mirror_policies"] = [{"cluster": "llm", "runtime_fraction": fraction}]
    route["weighted_clusters"] = {"clusters": [_weighted(ref, objects) for ref in rule["backendRefs"]]}
    return {**outer, "route": route}


def _weighted(ref: dict[str, Any], objects: Objects) -> dict[str, Any]:
    found: dict[str, Any] = {"name": ref["name"], "weight": ref["weight"]}
    for one in ref["filters"]:
        if one["type"] == "RequestHeaderModifier":
            found["request_headers_to_remove"] = one["requestHeaderModifier"]["remove"]
        if one["type"] == "ResponseHeaderModifier":
            found["response_headers_to_add"] = [_set(new) for new in one["responseHeaderModifier"]["set"]]
        if one["type"] == "ExtensionRef":
            policy = _named(objects, "trafficpolicies", one)["spec"]
            named = re.search(r'\{"model":"([^"]+)"', policy["transformation"]["request"]["body"]["value"])
            assert named
            # Kgateway's own engine is not in this Envoy; its effect is.
            body = {"body_format": {"json_format": {"model": named[1]}}, "action": "MERGE"}
            config = {"@type": _TYPE + "http.transform.v3.TransformConfig"}
            config["request_transformation"] = {"body_transformation": body}  # type: ignore[assignment]
            found["typed_per_filter_config"] = {"rewrite": config}
    return found


def _set(new: dict[str, str]) -> dict[str, Any]:
    return {"header": {"key": new["name"], "value": new["value"]}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}


def _named(objects: Objects, plural: str, one: dict[str, Any]) -> dict[str, Any]:
    return next(found for key, found in objects.items() if (key[0], key[2]) == (plural, one["extensionRef"]["name"]))


class Proxy:
    """A running Envoy that takes the route of `objects` whenever it is told to."""

    def __init__(self, folder: Path, objects: Objects, clusters: dict[str, int]) -> None:
        self.port, self._admin = free_port(), free_port()
        self._file = folder / "rds" / "rds.yaml"
        self._objects = objects
        self._version = 0
        addresses = {**clusters, "llm": self.port}
        (folder / "envoy.json").write_text(json.dumps(self._bootstrap(addresses)))
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=10, trust_env=False)
        self._write()
        command = [envoy_binary(), "--config-path", str(folder / "envoy.json"), "--disable-hot-restart"]
        self.process = subprocess.Popen([*command, "--concurrency", "1", "--log-level", "warning"])

    def follow(self) -> None:
        """Take the route as it is now, and wait until Envoy says so."""
        self._write()
        self.wait()

    def wait(self) -> None:
        until = time.monotonic() + 15
        while f": {self._version}" not in self._stats("rds.route.version_text").replace('"', ""):
            assert time.monotonic() < until, self._stats("rds.route")
            time.sleep(0.02)

    def _write(self) -> None:
        self._version += 1
        replace_file(self._file, json.dumps(routes(self._objects, str(self._version))))

    def _stats(self, pattern: str) -> str:
        try:
            return httpx.get(f"http://127.0.0.1:{self._admin}/stats?filter={pattern}", trust_env=False).text
        except httpx.HTTPError:
            return ""

    def _bootstrap(self, clusters: dict[str, int]) -> dict[str, Any]:
        source = {"path": str(self._file), "watched_directory": {"path": str(self._file.parent)}}
        rds = {
            "route_config_name": "route",
            "config_source": {"path_config_source": source, "resource_api_version": "V3"},
        }
        filters = [
            {"name": "rewrite", "typed_config": {"@type": _TYPE + "http.transform.v3.TransformConfig"}},
            {"name": "router", "typed_config": {"@type": _TYPE + "http.router.v3.Router"}},
        ]
        manager = {
            "@type": _TYPE + "network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "http",
            "rds": rds,
            "http_filters": filters,
        }
        chain = {"filters": [{"name": "http", "typed_config": manager}]}
        listener = {"name": "http", "address": _address(self.port), "filter_chains": [chain]}
        return {
            "node": {"id": "proxy", "cluster": "llm"},
            "admin": {"address": _address(self._admin)},
            "static_resources": {
                "listeners": [listener],
                "clusters": [_cluster(name, port) for name, port in clusters.items()],
            },
        }


def _cluster(name: str, port: int) -> dict[str, Any]:
    endpoint = {"endpoint": {"address": _address(port)}}
    return {
        "name": name,
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
    }


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


@contextmanager
def proxy(folder: Path, objects: Objects, clusters: dict[str, int]) -> Iterator[Proxy]:
    running = Proxy(folder, objects, clusters)
    try:
        running.wait()
        yield running
    finally:
        running.client.close()
        running.process.terminate()
        running.process.wait(10)
