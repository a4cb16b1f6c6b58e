"""The InferenceModelRewrite: names only, weights of at least 1, and confirmed by asking."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from sluice.infra.errors import InputError, UnavailableError
from sluice.infra.kubernetes_objects import KubernetesObjects
from sluice.serving.data_plane import DataPlane
from sluice.serving.model_rewrite import MODEL_REWRITE, ModelRewriteRouter
from sluice.serving.routes import RouteState
from tests.serving import cluster_gateway
from tests.serving.cluster_gateway import ClusterGateway
from tests.serving.test_http_route import target
from tests.support import kubernetes_server
from tests.support.kubernetes_server import KubernetesServer


@pytest.fixture
def api() -> Iterator[KubernetesServer]:
    with kubernetes_server.serve() as api:
        yield api


@pytest.fixture
def gateway(api: KubernetesServer) -> Iterator[ClusterGateway]:
    objects = KubernetesObjects(api.client(), "ml-serving")
    with cluster_gateway.running(objects, MODEL_REWRITE, "app") as gateway:
        gateway.models = {"app-aaaaaaaaaaaa", "app-cccccccccccc"}
        yield gateway


def router_of(api: KubernetesServer, gateway: ClusterGateway | None, confirm_s: float = 3.0) -> ModelRewriteRouter:
    plane = DataPlane(gateway.address) if gateway else None
    objects = KubernetesObjects(api.client(), "ml-serving")
    return ModelRewriteRouter(objects, "app", "llm", gateway=plane, metrics=plane, confirm_s=confirm_s)


def targets(api: KubernetesServer) -> list[Any]:
    rules = api.objects["inferencemodelrewrites", "ml-serving", "app"]["spec"]["rules"]
    assert rules[0]["matches"] == [{"model": {"type": "Exact", "value": "app"}}]
    return [(one["modelRewrite"], one["weight"]) for one in rules[0]["targets"]]


def test_0_percent_is_no_target(api: KubernetesServer, gateway: ClusterGateway) -> None:
    router = router_of(api, gateway)
    router.seed(target("a"))
    state = RouteState(target("a"), target("c"))
    for weight, expected in (
        (0, [("app-aaaaaaaaaaaa", 100)]),
        (5, [("app-aaaaaaaaaaaa", 95), ("app-cccccccccccc", 5)]),
        (100, [("app-cccccccccccc", 100)]),
    ):
        router.apply(replace(state, weight=weight))
        assert targets(api) == expected
        assert router.drift() == ()


def test_a_probe_asks_by_name_and_nobody_else_reaches_a_release(api: KubernetesServer, gateway: ClusterGateway) -> None:
    router = router_of(api, gateway)
    router.seed(target("a"))
    router.apply(RouteState(target("a"), target("c"), 0))

    def ask(model: str) -> int:
        (answer,) = DataPlane(gateway.address).ask("POST", "/v1/completions", body={"model": model})
        return answer.status

    assert ask(router.probe_model("canary")) == 200
    assert gateway.seen[-1][1] == "app-cccccccccccc"
    assert ask("app-cccccccccccc") == 404
    assert ask("probe-canary-guess") == 404
    with pytest.raises(InputError, match="by headers"):
        router.probe_headers("canary")


def test_without_an_address_to_ask_nothing_is_confirmed(api: KubernetesServer, gateway: ClusterGateway) -> None:
    router_of(api, gateway).seed(target("a"))
    blind = router_of(api, None, confirm_s=0.1)
    with pytest.raises(UnavailableError, match=r"cluster\.proxies_url"):
        blind.apply(RouteState(target("a"), target("c"), 5))
    assert blind.state() == RouteState(target("a"))
    assert any("anew" in sentence for sentence in blind.preflight())


def test_a_refusal_in_the_status_ends_it_at_once(api: KubernetesServer, gateway: ClusterGateway) -> None:
    router = router_of(api, gateway, confirm_s=20.0)
    router.seed(target("a"))
    stored = api.objects["inferencemodelrewrites", "ml-serving", "app"]
    condition = {"type": "Accepted", "status": "False", "reason": "NoPool", "message": "no pool llm"}
    condition |= {"lastTransitionTime": "2026-11-21T12:00:00Z"}
    stored["status"] = {"conditions": [condition | {"observedGeneration": 99}]}
    with pytest.raises(UnavailableError, match="NoPool: no pool llm"):
        router.apply(RouteState(target("a"), target("c"), 5))


def test_servers_of_one_release_alone_are_refused(api: KubernetesServer, gateway: ClusterGateway) -> None:
    with pytest.raises(InputError, match="servers of its own"):
        router_of(api, gateway).seed(replace(target("a"), dedicated=True))
