"""What the HTTPRoute driver writes, tried on a real Envoy: its matches, its sessions, its mirror, its revision."""

from __future__ import annotations

import random
import uuid
from pathlib import Path

import pytest

from sluice.infra.kubernetes_objects import KubernetesObjects
from sluice.serving.http_route_rules import HTTP_ROUTE, REVISION_PATH, SERVICE, release_name
from sluice.serving.routes import RouteState
from tests.serving import cluster_gateway
from tests.serving.route_to_envoy import proxy
from tests.serving.test_http_route import router_of, target
from tests.serving.upstream import upstream
from tests.support import kubernetes_server

HOST = "llm.example.com"


@pytest.mark.integration
def test_a_proxy_does_what_the_route_says(tmp_path: Path) -> None:
    stable, canary = target("a"), target("c")
    with kubernetes_server.serve() as api, upstream() as server:
        objects = KubernetesObjects(api.client(), "ml-serving")
        spec = {"selector": {"app": "vllm"}, "ports": [{"port": 8000}]}
        objects.create(SERVICE, {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "vllm"}, "spec": spec})
        with cluster_gateway.running(objects, HTTP_ROUTE, "app"):
            router = router_of(api)
            router.seed(stable)
            router.apply(RouteState(stable, canary, 0, shadow=100))
            services = {release_name("app", one.release): server.port for one in (stable, canary)}
            with proxy(tmp_path, api.objects, services) as envoy:

                def ask(headers: dict[str, str], host: str = HOST) -> tuple[int, str]:
                    body = {"model": "app", "messages": []}
                    answer = envoy.client.post("/v1/chat/completions", json=body, headers={"host": host, **headers})
                    return answer.status_code, answer.headers.get("x-sluice-release", "")

                # Everybody is on stable, and the canary is asked too, under its own name, once.
                assert ask({}) == (200, stable.release)
                cluster_gateway.eventually(lambda: len(server.seen) == 2)
                assert sorted(model for model, _ in server.seen) == ["app-aaaaaaaaaaaa", "app-cccccccccccc"]
                assert ask(router.probe_headers("canary")) == (200, canary.release)
                assert "x-sluice-probe-key" not in server.seen[-1][1]
                assert ask({"x-sluice-force": "canary"}) == (200, stable.release)
                assert ask({}, "other.example.com")[0] == 404

                # The proxy tells its revision, and nobody else can ask for it.
                key = {"host": HOST, "x-sluice-probe-key": router.probe_key()}
                assert envoy.client.get(REVISION_PATH, headers=key).headers["location"].endswith("/revision/2")
                assert envoy.client.get(REVISION_PATH, headers={"host": HOST}).status_code == 404
                assert envoy.client.get("/v1/models", headers={"host": HOST}).json()["data"][0]["id"] == "app"

                source = random.Random(7)
                sessions = [str(uuid.UUID(int=source.getrandbits(128), version=4)) for _ in range(50)]
                before: set[str] = set()
                for weight in (5, 40, 80):
                    router.apply(RouteState(stable, canary, weight))
                    envoy.follow()
                    moved = {one for one in sessions if ask({"x-session-id": one})[1] == canary.release}
                    assert before <= moved
                    assert abs(100 * len(moved) / len(sessions) - weight) < 16
                    before = moved

                # Sessions of another kind are split by weight.
                found = [ask({"x-session-id": f"customer-{number}"})[1] for number in range(60)]
                assert 50 < 100 * found.count(canary.release) / len(found) < 95
                router.rollback("bad")
                envoy.follow()
                assert {ask({"x-session-id": session})[1] for session in sessions[:10]} == {stable.release}
                assert ask(router.probe_headers("canary"))[0] == 409
