"""The HTTPRoute of one application and what each release needs beside it, as plain values.

Each release has a Service and a TrafficPolicy of its own, made once and never changed: the Service so that the
proxies count requests by release although two releases may share one server, the policy so that the request's body
names the release's immutable name on its way to that Service and nowhere else. A backendRef takes both, and the
headers by which an answer tells its release; changing weights changes no name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sluice.infra.errors import InputError
from sluice.infra.kubernetes_objects import Kind, Object
from sluice.provenance.canonical import hex_of
from sluice.serving.envoy_routes import (
    ADAPTER_HEADER,
    FORCE_HEADER,
    PROBE_KEY_HEADER,
    RELEASE_HEADER,
    SESSION_HEADER,
)
from sluice.serving.route_decision import RouteDecision
from sluice.serving.routes import RouteState, Target

HTTP_ROUTE = Kind("gateway.networking.k8s.io", "v1", "httproutes", "HTTPRoute")
SERVICE = Kind("", "v1", "services", "Service")
TRAFFIC_POLICY = Kind("gateway.kgateway.dev", "v1alpha1", "trafficpolicies", "TrafficPolicy")
DIRECT_RESPONSE = Kind("gateway.kgateway.dev", "v1alpha1", "directresponses", "DirectResponse")
REVISION_PATH = "/.well-known/sluice/revision"
SHADOW_HEADER = "x-sluice-shadow"
APPLICATION_LABEL = "sluice.dev/application"
_ANSWERING = ("/v1/chat/completions", "/v1/completions")
_INTERNAL = [FORCE_HEADER, PROBE_KEY_HEADER]
_BUCKETS = 4096
_UUID = "[0-9a-f-]+-[0-9a-f]{9}"
"""A session id that ends as a UUID does: its last 12 digits are hexadecimal and, in a random UUID, uniform."""


@dataclass(frozen=True)
class ClusterGateway:
    """The Gateway that an application's route hangs on. `service` (`name:port`) is the Service of its proxies, in the
    route's namespace: shadowed requests come back through it, to be given the canary's name."""

    name: str
    namespace: str = ""
    listener: str = ""
    hostname: str = ""
    service: str = ""


def route_spec(application: str, gateway: ClusterGateway, decision: RouteDecision, probe_key: str) -> Object:
    """The `spec` of the HTTPRoute. Rules are told apart by their number of header matches, then by their order."""
    parent: Object = {"group": HTTP_ROUTE.group, "kind": "Gateway", "name": gateway.name}
    if gateway.namespace:
        parent["namespace"] = gateway.namespace
    if gateway.listener:
        parent["sectionName"] = gateway.listener
    spec: Object = {"parentRefs": [parent]}
    if gateway.hostname:
        # Envoy asks for a mirrored request under the host's name with `-shadow` behind it.
        spec["hostnames"] = [gateway.hostname, f"{gateway.hostname}-shadow"]
    return {**spec, "rules": _rules(application, gateway, decision, probe_key)}


def release_name(application: str, release: str) -> str:
    """The name of a release's Service and TrafficPolicy."""
    return f"{application}-{hex_of(release)[:16]}"


def release_objects(application: str, target: Target, upstream: Object) -> tuple[tuple[Kind, Object], ...]:
    """What a release needs before a route leads to it. `upstream` is the Service of the servers that hold it."""
    _, port = service_and_port(target)
    found = [one for one in upstream["spec"].get("ports", ()) if one["port"] == port]
    if not found:
        raise InputError(
            f"upstreams of {target.served_name!r}: the Service {upstream['metadata']['name']!r} has no port {port}."
        )
    if not upstream["spec"].get("selector"):
        raise InputError(
            f"upstreams of {target.served_name!r}: the Service {upstream['metadata']['name']!r} selects no pods."
        )
    service_port = {"name": "http", "port": port, "targetPort": found[0].get("targetPort", port), "protocol": "TCP"}
    service = {"selector": upstream["spec"]["selector"], "ports": [service_port]}
    body = {"parseAs": "AsJson", "value": body_template(target.served_name)}
    policy = {"transformation": {"request": {"body": body}}}
    metadata = _metadata(application, release_name(application, target.release), {"sluice.dev/release": target.release})
    return ((SERVICE, _object(SERVICE, metadata, service)), (TRAFFIC_POLICY, _object(TRAFFIC_POLICY, metadata, policy)))


def application_objects(application: str) -> tuple[tuple[Kind, Object], ...]:
    """Answers that the gateway gives by itself."""
    models = {"object": "list", "data": [{"id": application, "object": "model", "owned_by": "sluice"}]}
    error = {"error": {"message": "there is no canary", "type": "gateway_error", "code": 409}}
    replies = {"models": (200, models), "no-canary": (409, error)}
    return tuple(
        (DIRECT_RESPONSE, _object(DIRECT_RESPONSE, _metadata(application, f"{application}-{name}", {}),
                                  {"status": status, "bodyFormat": {"json": body, "contentType": "application/json"}}))
        for name, (status, body) in replies.items()
    )  # fmt: skip


def service_and_port(target: Target) -> tuple[str, int]:
    """The Service that holds a release. Raises `InputError`: in a cluster the replicas are behind one Service."""
    if len(target.upstreams) != 1:
        raise InputError(
            f"upstreams of {target.served_name!r} names {len(target.upstreams)} addresses; a cluster's gateway takes "
            "one Service, with the replicas behind it.",
            hint="Name the Service as service:port or service.namespace:port.",
        )
    host, _, port = target.upstreams[0].rpartition(":")
    return host, int(port)


def body_template(served_name: str) -> str:
    """A body of Kgateway's template language that is the request's body with another `model`.

    Its engine is built without the filter that writes JSON, so a macro writes it. `model` comes first and the body's
    own is left out: what a client asks for never reaches the server.
    """
    text = '"{{ raw_string(%s) }}"'
    comma = "{% if not loop.last %},{% endif %}"
    return (
        "{% macro json_(v) %}"
        "{% if v is string %}" + text % "v" + "{% elif v is mapping %}{ "
        "{% for k in v %}" + text % "k" + ":{{ json_(v[k]) }}" + comma + "{% endfor %} }"
        "{% elif v is none %}null{% elif v is boolean %}{% if v %}true{% else %}false{% endif %}"
        "{% elif v is sequence %}[{% for x in v %}{{ json_(x) }}" + comma + "{% endfor %}]"
        "{% else %}{{ v }}{% endif %}{% endmacro %}"
        '{"model":"' + served_name + '"'
        '{% for k in context() %}{% if k != "model" %},' + text % "k" + ":{{ json_(context()[k]) }}"
        "{% endif %}{% endfor %}}"
    )


def below(threshold: int) -> str:
    """A regular expression for three hexadecimal digits whose value is below `threshold` (1 to 4096)."""
    digits = f"{threshold - 1:03x}"
    parts = []
    for place, digit in enumerate(digits):
        if digit != "0":
            parts.append(digits[:place] + _up_to(int(digit, 16) - 1) + _any(2 - place))
    return f"({'|'.join([*parts, digits])})"


def _up_to(largest: int) -> str:
    if largest < 10:
        return f"[0-{largest}]"
    return "[0-9a]" if largest == 10 else f"[0-9a-{largest:x}]"


def _any(count: int) -> str:
    return "[0-9a-f]" * count


def _rules(application: str, gateway: ClusterGateway, decision: RouteDecision, probe_key: str) -> list[Object]:
    state = decision.state
    stable, canary = state.stable, state.canary
    only_stable, mirror = [_backend(application, stable)], _mirror(gateway, state, probe_key)
    key = _header(PROBE_KEY_HEADER, probe_key)
    rules = [
        {
            "name": "revision",
            "matches": [{"path": {"type": "Exact", "value": REVISION_PATH}, "method": "GET", "headers": [key]}],
            "filters": [_redirect(f"{REVISION_PATH}/{decision.revision}")],
        },
        _answering("forced-stable", only_stable, [_header(FORCE_HEADER, "stable"), key]),
        {
            "name": "models",
            "matches": [{"path": {"type": "Exact", "value": "/v1/models"}, "method": "GET"}],
            "filters": [_reply(f"{application}-models")],
        },
    ]
    if canary is None:
        forced = {"name": "forced-canary", "matches": _posts([_header(FORCE_HEADER, "canary"), key])}
        return [*rules, forced | {"filters": [_reply(f"{application}-no-canary")]}, _answering("split", only_stable)]
    only_canary = [_backend(application, canary)]
    rules.append(_answering("forced-canary", only_canary, [_header(FORCE_HEADER, "canary"), key]))
    rules.append(_answering("shadow", only_canary, [_header(SHADOW_HEADER, probe_key)]))
    if state.weight:
        # Sessions below the threshold: raising the weight moves the threshold up, so nobody is moved back.
        buckets = max(1, round(_BUCKETS * state.weight / 100))
        sticky = [_header(SESSION_HEADER, _UUID + below(buckets), kind="RegularExpression")]
        rules.append(_answering("sessions-of-canary", only_canary, sticky))
        rest = [_header(SESSION_HEADER, _UUID + _any(3), kind="RegularExpression")]
        rules.append(_answering("sessions-of-stable", only_stable, rest, mirror))
    split = [_backend(application, stable, 100 - state.weight), _backend(application, canary, state.weight)]
    return [*rules, _answering("split", split, filters=mirror)]


def _answering(
    name: str, backends: list[Object], headers: list[Object] | None = None, filters: list[Object] | None = None
) -> Object:
    rule: Object = {"name": name, "matches": _posts(headers or []), "backendRefs": backends}
    if filters:
        rule["filters"] = filters
    # A long answer is not a failure: only silence is. The listener bounds that.
    return {**rule, "timeouts": {"request": "0s"}}


def _posts(headers: list[Object]) -> list[Object]:
    return [
        {"path": {"type": "Exact", "value": path}, "method": "POST", **({"headers": headers} if headers else {})}
        for path in _ANSWERING
    ]


def _backend(application: str, target: Target, weight: int = 1) -> Object:
    _, port = service_and_port(target)
    name = release_name(application, target.release)
    told = [{"name": RELEASE_HEADER, "value": target.release}, {"name": ADAPTER_HEADER, "value": target.adapter}]
    return {
        "group": "",
        "kind": "Service",
        "name": name,
        "port": port,
        "weight": weight,
        "filters": [
            {"type": "RequestHeaderModifier", "requestHeaderModifier": {"remove": _INTERNAL}},
            {"type": "ResponseHeaderModifier", "responseHeaderModifier": {"set": told}},
            _extension(TRAFFIC_POLICY, name),
        ],
    }


def _mirror(gateway: ClusterGateway, state: RouteState, probe_key: str) -> list[Object]:
    """Back through the gateway: a mirrored request carries stable's name, and only a rule gives it the canary's."""
    if not state.shadow:
        return []
    name, _, port = gateway.service.rpartition(":")
    ref = {"group": "", "kind": "Service", "name": name, "port": int(port)}
    return [
        {
            "type": "RequestHeaderModifier",
            "requestHeaderModifier": {"set": [{"name": SHADOW_HEADER, "value": probe_key}]},
        },
        {"type": "RequestMirror", "requestMirror": {"backendRef": ref, "percent": state.shadow}},
    ]


def _redirect(path: str) -> Object:
    to = {"path": {"type": "ReplaceFullPath", "replaceFullPath": path}, "statusCode": 302}
    return {"type": "RequestRedirect", "requestRedirect": to}


def _reply(name: str) -> Object:
    return _extension(DIRECT_RESPONSE, name)


def _extension(kind: Kind, name: str) -> Object:
    return {"type": "ExtensionRef", "extensionRef": {"group": kind.group, "kind": kind.name, "name": name}}


def _header(name: str, value: str, kind: str = "Exact") -> Object:
    return {"name": name, "type": kind, "value": value}


def _metadata(application: str, name: str, annotations: dict[str, str]) -> Object:
    labels = {"app.kubernetes.io/managed-by": "sluice", APPLICATION_LABEL: application}
    return {"name": name, "labels": labels, **({"annotations": annotations} if annotations else {})}


def _object(kind: Kind, metadata: Object, spec: Any) -> Object:
    return {"apiVersion": kind.api_version, "kind": kind.name, "metadata": metadata, "spec": spec}
