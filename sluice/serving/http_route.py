"""The router of a cluster with Kgateway: one HTTPRoute of an application, its weights and its decision in one object.

Confirmed three ways, each with the revision: the gateway's controller accepts the route and resolves what it names
(`status.parents`, for this generation); and, where the proxies can be reached, each of them answers a path of the
route that says the revision it follows. docs/kubernetes-routing.md tells what a cluster needs.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import datetime

from sluice.infra.errors import InputError, UnavailableError
from sluice.infra.kubernetes_objects import Kind, KubernetesObjects, Object, ObjectChanged
from sluice.serving.cluster_router import ClusterRouter, Refused, differing
from sluice.serving.data_plane import DataPlane
from sluice.serving.envoy_routes import FORCE_HEADER, PROBE_KEY_HEADER
from sluice.serving.http_route_rules import (
    APPLICATION_LABEL,
    HTTP_ROUTE,
    REVISION_PATH,
    SERVICE,
    TRAFFIC_POLICY,
    ClusterGateway,
    application_objects,
    release_name,
    release_objects,
    route_spec,
    service_and_port,
)
from sluice.serving.route_decision import RouteDecision
from sluice.serving.routes import Role, RouteState, Target

_LEFT_S = 3600.0
"""Objects of a release that no route leads to stay so long: another router may be about to lead one there."""


class HttpRouteRouter(ClusterRouter):
    """`Router` over one HTTPRoute. `proxies` are the gateway's proxies (their traffic port), `metrics` the same with
    their port of Prometheus metrics; without them a change is confirmed from the route's status alone, and active
    requests are not known."""

    kind = HTTP_ROUTE

    def __init__(
        self,
        objects: KubernetesObjects,
        application: str,
        gateway: ClusterGateway,
        *,
        proxies: DataPlane | None = None,
        metrics: DataPlane | None = None,
        confirm_s: float = 10.0,
    ) -> None:
        super().__init__(objects, application, confirm_s=confirm_s)
        self._gateway = gateway
        self._proxies = proxies
        self._metrics = metrics

    def spec(self, decision: RouteDecision, probe_key: str) -> Object:
        return route_spec(self.application, self._gateway, decision, probe_key)

    def check(self, state: RouteState) -> None:
        for target in state.targets():
            self._service_of(target)
        if state.shadow and not self._gateway.service:
            raise InputError(
                f"shadow = {state.shadow}: mirrored requests come back through the gateway's own Service, and none is "
                "named.",
                hint="Set cluster.gateway_service to its name:port, or take `shadow` out of rollout.yaml.",
            )

    def prepare(self, targets: Iterable[Target]) -> None:
        for kind, wanted in self._wanted(targets):
            self._ensure(kind, wanted)

    def tidy(self, decision: RouteDecision) -> None:
        kept = {release_name(self.application, target.release) for target in decision.targets()}
        for kind in (SERVICE, TRAFFIC_POLICY):
            for found in self._objects.listed(kind, f"{APPLICATION_LABEL}={self.application}"):
                made = datetime.fromisoformat(found["metadata"]["creationTimestamp"].replace("Z", "+00:00"))
                if found["metadata"]["name"] not in kept and time.time() - made.timestamp() > _LEFT_S:
                    self._objects.delete(kind, found["metadata"]["name"])

    def differences(self, decision: RouteDecision, live: Object, probe_key: str) -> tuple[str, ...]:
        found = list(_weights_changed(self.application, decision, live))
        changed = differing(self.spec(decision, probe_key), live["spec"])
        if changed and not found:
            found.append(f"The HTTPRoute {self.application!r} was changed at spec.{', spec.'.join(changed[:5])}.")
        for kind, wanted in self._wanted(decision.targets()):
            name = wanted["metadata"]["name"]
            there = self._objects.get(kind, name)
            if there is None:
                found.append(f"The {kind.name} {name!r} is missing.")
            elif changed := differing(wanted["spec"], there["spec"]):
                found.append(f"The {kind.name} {name!r} was changed at spec.{', spec.'.join(changed[:5])}.")
        return tuple(found)

    def confirmed(self, live: Object, decision: RouteDecision, probe_key: str) -> str:
        parent = self._parent(live)
        if parent is None:
            return f"the Gateway {self._gateway.name!r} says nothing about the route"
        for wanted in ("Accepted", "ResolvedRefs"):
            condition = next((one for one in parent["conditions"] if one["type"] == wanted), None)
            if condition is None or condition.get("observedGeneration", 0) < live["metadata"]["generation"]:
                return f"the Gateway's controller has not looked at generation {live['metadata']['generation']} yet"
            if condition["status"] != "True":
                raise Refused(
                    f"The Gateway {self._gateway.name!r} refuses the route: {wanted} is {condition['status']} "
                    f"({condition['reason']}: {condition['message']})."
                )
        if self._proxies is None:
            return ""
        for answer in self._proxies.ask("GET", REVISION_PATH, {PROBE_KEY_HEADER: probe_key}):
            if not answer.headers.get("location", "").endswith(f"{REVISION_PATH}/{decision.revision}"):
                return f"the proxy {answer.address} does not follow revision {decision.revision} yet"
        return ""

    def active_requests(self, release: str) -> int:
        if self._metrics is None:
            raise UnavailableError(
                "Nobody tells how many requests run: the metrics of the gateway's proxies have no address.",
                hint="Set cluster.metrics_url to their port of Prometheus metrics.",
            )
        name = release_name(self.application, release)
        service = self._objects.get(SERVICE, name)
        if service is None:
            raise UnavailableError(f"The release {release} has no Service {name!r}: its requests are not counted.")
        # Kgateway names Envoy's clusters so.
        cluster = f"kube_{self._objects.namespace}_{name}_{service['spec']['ports'][0]['port']}"
        labels = {"envoy_cluster_name": cluster}
        return int(self._metrics.metric("envoy_cluster_upstream_rq_active", labels, "/metrics"))

    def probe_headers(self, role: Role) -> dict[str, str]:
        """Request headers by which a probe reaches this role, whatever the weights are."""
        return {FORCE_HEADER: role, PROBE_KEY_HEADER: self.probe_key()}

    def preflight(self) -> tuple[str, ...]:
        """What keeps this cluster from doing everything, a sentence each."""
        found = []
        if self._proxies is None:
            found.append(
                "cluster.proxies_url is empty: changes are confirmed from the route's status, not from traffic."
            )
        if self._metrics is None:
            found.append("cluster.metrics_url is empty: retiring a release cannot wait until it is idle.")
        if not self._gateway.service:
            found.append("cluster.gateway_service is empty: a release cannot be shadowed.")
        return tuple(found)

    def _parent(self, live: Object) -> Object | None:
        def ours(ref: Object) -> bool:
            there = ref.get("namespace") or self._objects.namespace
            return ref["name"] == self._gateway.name and there == (self._gateway.namespace or self._objects.namespace)

        parents = (live.get("status") or {}).get("parents") or ()
        return next((one for one in parents if ours(one["parentRef"])), None)

    def _service_of(self, target: Target) -> tuple[str, int]:
        host, port = service_and_port(target)
        name, _, rest = host.partition(".")
        if rest and rest.partition(".")[0] != self._objects.namespace:
            raise InputError(
                f"upstreams of {target.served_name!r}: the Service {host!r} is not in the route's namespace "
                f"{self._objects.namespace!r}.",
                hint="A Service selects pods of its own namespace only: set cluster.namespace to theirs.",
            )
        return name, port

    def _wanted(self, targets: Iterable[Target]) -> list[tuple[Kind, Object]]:
        wanted = list(application_objects(self.application))
        upstreams: dict[str, Object | None] = {}
        for target in targets:
            name, _ = self._service_of(target)
            upstream = upstreams[name] if name in upstreams else self._objects.get(SERVICE, name)
            upstreams[name] = upstream
            if upstream is None:
                raise UnavailableError(
                    f"The Service {name!r} of {target.served_name!r} is not in namespace {self._objects.namespace!r}.",
                    hint="Are its servers deployed?",
                )
            wanted += release_objects(self.application, target, upstream)
        return wanted

    def _ensure(self, kind: Kind, wanted: Object) -> None:
        while True:
            try:
                found = self._objects.get(kind, wanted["metadata"]["name"])
                if found is None:
                    self._objects.create(kind, wanted)
                elif differing(wanted["spec"], found["spec"]):
                    self._objects.replace(kind, {**found, "spec": {**found["spec"], **wanted["spec"]}})
                return
            except ObjectChanged:
                continue


def _weights_changed(application: str, decision: RouteDecision, live: Object) -> Iterable[str]:
    """The one change that matters most, in words."""
    split = next((rule for rule in live["spec"]["rules"] if rule.get("name") == "split"), None)
    shares = {ref["name"]: ref.get("weight", 1) for ref in (split or {}).get("backendRefs", ())}
    total = sum(shares.values()) or 1
    for target in decision.state.targets():
        wanted = decision.state.share(target.release)
        found = round(100 * shares.get(release_name(application, target.release), 0) / total)
        if found != wanted:
            yield f"{target.served_name} gets {found}% in the HTTPRoute {application!r} and should get {wanted}%."
