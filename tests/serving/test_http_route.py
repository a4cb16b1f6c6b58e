"""The HTTPRoute: what it says, what a proxy makes of it, and what a cluster has to have."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.infra.errors import ConflictError, InputError, IntegrityError, UnavailableError
from sluice.infra.kubernetes_objects import KubernetesObjects
from sluice.serving.cluster_router import DECISION, ClusterRouter
from sluice.serving.data_plane import DataPlane
from sluice.serving.http_route import HttpRouteRouter
from sluice.serving.http_route_rules import (
    HTTP_ROUTE,
    SERVICE,
    TRAFFIC_POLICY,
    ClusterGateway,
    below,
    body_template,
    release_name,
)
from sluice.serving.route_decision import RouteDecision
from sluice.serving.routes import RouteState, Target
from tests.serving import cluster_gateway
from tests.serving.cluster_gateway import rewritten
from tests.support import kubernetes_server
from tests.support.kubernetes_server import KubernetesServer

GATEWAY = ClusterGateway("llm", "", "https", "llm.example.com", "llm:8080")


def target(letter: str, upstream: str = "vllm:8000") -> Target:
    digest = "sha256:" + letter * 64
    return Target(digest, digest, f"app-{letter * 12}", (upstream,))


@pytest.fixture
def api() -> Iterator[KubernetesServer]:
    with kubernetes_server.serve() as api:
        service = {"selector": {"app": "vllm"}, "ports": [{"name": "http", "port": 8000, "targetPort": "openai"}]}
        objects_of(api).create(
            SERVICE, {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "vllm"}, "spec": service}
        )
        yield api


def objects_of(api: KubernetesServer) -> KubernetesObjects:
    return KubernetesObjects(api.client(), "ml-serving")


def following(api: KubernetesServer) -> Any:
    return cluster_gateway.running(objects_of(api), HTTP_ROUTE, "app")


def router_of(api: KubernetesServer, gateway: ClusterGateway = GATEWAY, **options: Any) -> HttpRouteRouter:
    return HttpRouteRouter(objects_of(api), "app", gateway, **{"confirm_s": 2.0, **options})


def rules(api: KubernetesServer) -> dict[str, Any]:
    spec = api.objects["httproutes", "ml-serving", "app"]["spec"]
    return {rule["name"]: rule for rule in spec["rules"]}


BODIES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(), BODIES, max_size=5), BODIES)
def test_only_the_model_of_a_body_changes(body: dict[str, Any], model: Any) -> None:
    asked = {**body, "model": model}
    policy = {"parseAs": "AsJson", "value": body_template("app-0123456789ab")}
    assert rewritten(policy, asked) == {**body, "model": "app-0123456789ab"}


@given(st.integers(1, 4096), st.integers(0, 4095))
def test_a_session_is_below_the_threshold_or_not(threshold: int, bucket: int) -> None:
    assert bool(re.fullmatch(below(threshold), f"{bucket:03x}")) == (bucket < threshold)


def test_each_release_has_its_own_service_and_rewrite(api: KubernetesServer) -> None:
    with following(api):
        router = router_of(api)
        router.seed(target("a"))
        router.apply(RouteState(target("a"), target("c"), 5))
    name = release_name("app", target("c").release)
    service = api.objects["services", "ml-serving", name]["spec"]
    assert service["selector"] == {"app": "vllm"}
    assert service["ports"] == [{"name": "http", "port": 8000, "targetPort": "openai", "protocol": "TCP"}]
    split = rules(api)["split"]
    assert [(ref["name"], ref["weight"]) for ref in split["backendRefs"]] == [
        (release_name("app", target("a").release), 95),
        (name, 5),
    ]
    policy = api.objects["trafficpolicies", "ml-serving", name]["spec"]
    assert '"model":"app-cccccccccccc"' in policy["transformation"]["request"]["body"]["value"]
    extension = split["backendRefs"][1]["filters"][-1]["extensionRef"]
    assert extension == {"group": "gateway.kgateway.dev", "kind": "TrafficPolicy", "name": name}
    # The proxies' own limit of 15 s would cut long answers.
    assert split["timeouts"] == {"request": "0s"}


def test_probes_choose_and_users_cannot(api: KubernetesServer) -> None:
    with following(api) as gateway:
        router = router_of(api, proxies=DataPlane(gateway.address))
        router.seed(target("a"))
        forced = router.probe_headers("canary")
        plane = DataPlane(gateway.address)

        def ask(headers: dict[str, str]) -> tuple[int, str]:
            (answer,) = plane.ask("POST", "/v1/completions", headers, {"model": "app-cccccccccccc"})
            return answer.status, answer.headers.get("x-sluice-release", "")

        assert ask(forced)[0] == 409
        router.apply(RouteState(target("a"), target("c"), 0))
        assert ask(forced) == (200, target("c").release)
        assert ask(router.probe_headers("stable")) == (200, target("a").release)
        # Neither the header without its key nor the name inside the server leads to the canary.
        assert ask({"x-sluice-force": "canary"}) == (200, target("a").release)
        assert gateway.seen[-1] == ("split", "app-aaaaaaaaaaaa")
        (models,) = plane.ask("GET", "/v1/models")
        assert [one["id"] for one in json.loads(models.body)["data"]] == ["app"]
        assert plane.ask("GET", "/v1/load_lora_adapter")[0].status == 404


def test_a_mirrored_request_is_given_the_canarys_name_on_its_second_way(api: KubernetesServer) -> None:
    with following(api) as gateway:
        router = router_of(api, proxies=DataPlane(gateway.address))
        router.seed(target("a"))
        router.apply(RouteState(target("a"), target("c"), shadow=100))
        mirror = rules(api)["split"]["filters"][1]["requestMirror"]
        assert mirror == {"backendRef": {"group": "", "kind": "Service", "name": "llm", "port": 8080}, "percent": 100}
        assert api.objects["httproutes", "ml-serving", "app"]["spec"]["hostnames"][1] == "llm.example.com-shadow"
        DataPlane(gateway.address).ask("POST", "/v1/completions", body={"model": "app"})
        assert gateway.seen == [("shadow", "app-cccccccccccc"), ("split", "app-aaaaaaaaaaaa")]
    with pytest.raises(InputError, match=r"shadow = 5.*cluster\.gateway_service"):
        router_of(api, replace(GATEWAY, service="")).apply(RouteState(target("a"), target("c"), shadow=5))


def test_a_session_that_is_no_uuid_goes_by_weight(api: KubernetesServer) -> None:
    with following(api) as gateway:
        router = router_of(api, proxies=DataPlane(gateway.address))
        router.seed(target("a"))
        router.apply(RouteState(target("a"), target("c"), 30))
        plane = DataPlane(gateway.address)
        for session in (str(uuid.uuid4()), "customer-1234567890123", "s-1", "fff"):
            plane.ask("POST", "/v1/completions", {"x-session-id": session}, {"model": "app"})
        assert gateway.seen[0][0].startswith("sessions-of-")
        assert {rule for rule, _ in gateway.seen[1:]} == {"split"}


def test_a_route_that_the_gateway_refuses_is_taken_back_at_once(api: KubernetesServer) -> None:
    with following(api) as gateway:
        router = router_of(api, confirm_s=20.0)
        router.seed(target("a"))
        gateway.mode = "refuse"
        with pytest.raises(UnavailableError, match=r"Accepted is False \(UnsupportedValue: a filter is not supported"):
            router.apply(RouteState(target("a"), target("c"), 5))
        assert router.state() == RouteState(target("a"))
        cluster_gateway.eventually(lambda: "refuses the route" in router.drift()[0])


def test_a_proxy_that_stays_behind_is_not_confirmed(api: KubernetesServer) -> None:
    with following(api) as gateway:
        router = router_of(api, proxies=DataPlane(gateway.address), confirm_s=0.5)
        router.seed(target("a"))
        gateway.behind = True
        with pytest.raises(UnavailableError, match=r"the proxy 127.0.0.1 does not follow revision 2 yet"):
            router.apply(RouteState(target("a"), target("c"), 5))
        assert router.state() == RouteState(target("a"))


def test_what_belongs_to_a_release_is_watched_and_mended(api: KubernetesServer) -> None:
    with following(api):
        router = router_of(api)
        router.seed(target("a"))
        name = release_name("app", target("a").release)
        del api.objects["trafficpolicies", "ml-serving", name]
        api.objects["services", "ml-serving", name]["spec"]["selector"] = {"app": "other"}
        assert router.drift() == (
            f"The Service {name!r} was changed at spec.selector.app.",
            f"The TrafficPolicy {name!r} is missing.",
        )
        router.reconcile()
        assert router.drift() == ()
        split = rules(api)["split"]
        split["backendRefs"][0]["filters"].pop()
        assert "spec.rules" in router.drift()[0]


def test_objects_of_releases_long_gone_are_removed(api: KubernetesServer) -> None:
    with following(api):
        router = router_of(api)
        router.seed(target("a"))
        router.apply(RouteState(target("a"), target("c"), 5))
        router.rollback("bad")
        gone = release_name("app", target("c").release)
        router.apply(RouteState(target("a"), target("e"), 5))
        # Just now another router may have made it, to lead a route there.
        assert ("services", "ml-serving", gone) in api.objects
        for one in api.objects.values():
            one["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
        router.apply(RouteState(target("a"), target("e"), 6))
    left = {name for kind, _, name in api.objects if kind in (SERVICE.plural, TRAFFIC_POLICY.plural)}
    assert left == {"vllm", release_name("app", target("a").release), release_name("app", target("e").release)}


@pytest.mark.parametrize(
    ("upstreams", "error"),
    [
        (("vllm:8000", "vllm-2:8000"), "2 addresses"),
        (("vllm.elsewhere:8000",), "namespace 'ml-serving'"),
        (("vllm:9000",), "no port 9000"),
        (("missing:8000",), "'missing'.*is not in namespace"),
    ],
)
def test_a_target_is_one_service_of_the_namespace(api: KubernetesServer, upstreams: Any, error: str) -> None:
    with pytest.raises((InputError, UnavailableError), match=error):
        router_of(api).seed(replace(target("a"), upstreams=upstreams))


def test_a_route_of_somebody_else_is_left_alone(api: KubernetesServer) -> None:
    with following(api):
        router = router_of(api)
        router.seed(target("a"))
        stored = api.objects["httproutes", "ml-serving", "app"]
        stored["metadata"]["annotations"][DECISION] = "{}"
        with pytest.raises(IntegrityError, match="damaged"):
            router.state()
        stored["metadata"]["annotations"] = {}
        with pytest.raises(ConflictError, match="not made by Sluice"):
            router.rollback("bad")
    with pytest.raises(UnavailableError, match=r"no HTTPRoute 'other'.*sluice up"):
        HttpRouteRouter(objects_of(api), "other", GATEWAY).state()


def test_a_thousand_refusals_fit_and_none_is_forgotten() -> None:
    decision = RouteDecision(1, RouteState(target("a")))
    for number in range(1200):
        canary = replace(target("a"), release=f"sha256:{number:064x}", adapter=f"sha256:{number:064x}")
        moved = RouteDecision(1, RouteState(target("a"), canary), refused=decision.refused)
        decision = moved.rolled_back("because " * 100)
    text = decision.to_json()
    assert len(text) < 200_000
    read = RouteDecision.from_json(text)
    assert len(read.refused) == 1200
    assert read.refused[f"sha256:{0:064x}"] == ""
    assert read.refused[f"sha256:{1199:064x}"].startswith("because")


def test_what_is_missing_is_told_before_a_rollout(api: KubernetesServer) -> None:
    found = router_of(api, replace(GATEWAY, service="")).preflight()
    assert [sentence.split(" is empty")[0] for sentence in found] == [
        "cluster.proxies_url",
        "cluster.metrics_url",
        "cluster.gateway_service",
    ]
    assert issubclass(HttpRouteRouter, ClusterRouter)
