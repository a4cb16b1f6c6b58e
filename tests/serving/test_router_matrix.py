"""The same behaviours of every router: a real Envoy here, and the two of a cluster before a strict API server.

With KUBECONFIG set the two also run against that cluster, in a namespace that is made for it and deleted (it needs the
CRDs of the Gateway API, Kgateway and llm-d; the gateway stays ours).
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from sluice.infra.errors import ConflictError, GateRefused, InputError, UnavailableError
from sluice.infra.kubernetes_objects import Kind, KubernetesObjects
from sluice.serving.cluster_router import ClusterRouter
from sluice.serving.data_plane import DataPlane
from sluice.serving.durable import replace_file
from sluice.serving.http_route import HttpRouteRouter
from sluice.serving.http_route_rules import HTTP_ROUTE, SERVICE, ClusterGateway, release_name
from sluice.serving.model_rewrite import MODEL_REWRITE, ModelRewriteRouter
from sluice.serving.router import EnvoyRouter
from sluice.serving.routes import RouteState, StaleToken, Target
from tests.serving import cluster_gateway
from tests.serving.gateway import running_gateway
from tests.serving.upstream import upstream
from tests.support import kubernetes_server
from tests.support.kubernetes_server import KubernetesServer


def digest(letter: str) -> str:
    return "sha256:" + letter * 64


@dataclass
class World:
    """A router, what stands behind it, and how a test gets at both."""

    kind: str
    address: str
    make: Callable[[float], Any]
    ask: Callable[[str], str]
    freeze: Callable[[], None]
    thaw: Callable[[], None]
    tamper: Callable[[int], None]
    upstream: str
    api: KubernetesServer | None = None
    objects: KubernetesObjects | None = None
    gateway: cluster_gateway.ClusterGateway | None = None
    sticky: bool = True
    router: Any = field(init=False)

    def __post_init__(self) -> None:
        self.router = self.make(5.0)

    def target(self, letter: str) -> Target:
        if self.gateway is not None:
            self.gateway.models.add(f"app-{letter * 12}")
        return Target(digest(letter), digest(letter), f"app-{letter * 12}", (self.upstream,))

    @property
    def stable(self) -> Target:
        return self.target("a")

    @property
    def canary(self) -> Target:
        return self.target("c")

    def split(self, weight: int, canary: str = "c") -> RouteState:
        return RouteState(self.stable, self.target(canary), weight)

    def share(self, release: str, requests: int = 200) -> float:
        """Percent of requests, each of a session of its own, that the release answers."""
        answers = [self.ask(str(uuid.uuid4())) for _ in range(requests)]
        return 100 * answers.count(release) / requests


@contextmanager
def envoy_world(folder: Path) -> Iterator[World]:
    with upstream() as server:
        stable = Target(digest("a"), digest("a"), "app-" + "a" * 12, (f"127.0.0.1:{server.port}",))
        with running_gateway(folder, stable) as gateway:

            def ask(session: str) -> str:
                answer = gateway.ask(session)
                return answer.headers["x-sluice-release"]

            def freeze() -> None:
                assert gateway.process is not None
                gateway.process.send_signal(signal.SIGSTOP)

            def thaw() -> None:
                assert gateway.process is not None
                gateway.process.send_signal(signal.SIGCONT)

            def tamper(weight: int) -> None:
                content = json.loads(gateway.settings.routes_file.read_text())
                for route in content["resources"][0]["virtual_hosts"][0]["routes"]:
                    shares = route.get("route", {}).get("weighted_clusters", {}).get("clusters", [])
                    if len(shares) == 2:
                        shares[0]["weight"], shares[1]["weight"] = 100 - weight, weight
                replace_file(gateway.settings.routes_file, json.dumps(content), mode=0o600)

            yield World(
                kind="envoy",
                address=f"127.0.0.1:{server.port}",
                make=lambda seconds: EnvoyRouter(gateway.settings, confirm_s=seconds),
                ask=ask,
                freeze=freeze,
                thaw=thaw,
                tamper=tamper,
                upstream=f"127.0.0.1:{server.port}",
            )


@contextmanager
def cluster_world(kind: str, real: bool) -> Iterator[World]:
    with ExitStack() as stack:
        api = None
        if real:
            objects = stack.enter_context(throwaway_namespace())
        else:
            api = stack.enter_context(kubernetes_server.serve())
            objects = KubernetesObjects(api.client(), "ml-serving")
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "vllm"},
            "spec": {"selector": {"app": "vllm"}, "ports": [{"name": "http", "port": 8000, "targetPort": 8000}]},
        }
        objects.create(SERVICE, service)
        watched: Kind = HTTP_ROUTE if kind == "http-route" else MODEL_REWRITE
        gateway = stack.enter_context(cluster_gateway.running(objects, watched, "app"))
        client = stack.enter_context(httpx.Client(base_url=gateway.address, trust_env=False))
        proxies = DataPlane(gateway.address, timeout_s=1.0)
        hung = ClusterGateway(name="llm", listener="https", hostname="llm.example.com", service="llm:8080")

        def make(seconds: float) -> ClusterRouter:
            if kind == "http-route":
                options: dict[str, Any] = {"proxies": proxies, "metrics": proxies, "confirm_s": seconds}
                return HttpRouteRouter(objects, "app", hung, **options)
            return ModelRewriteRouter(objects, "app", "pool", gateway=proxies, metrics=proxies, confirm_s=seconds)

        def ask(session: str) -> str:
            body = {"model": "app", "messages": []}
            answer = client.post("/v1/chat/completions", json=body, headers={"x-session-id": session})
            assert answer.status_code == 200, answer.text
            named = digest(answer.json()["model"][-1])
            assert answer.headers.get("x-sluice-release", named) == named
            return named

        def tamper(weight: int) -> None:
            found = objects.get(watched, "app")
            assert found is not None
            if kind == "http-route":
                split = next(rule for rule in found["spec"]["rules"] if rule["name"] == "split")
                split["backendRefs"][0]["weight"], split["backendRefs"][1]["weight"] = 100 - weight, weight
            else:
                targets = found["spec"]["rules"][0]["targets"]
                targets[0]["weight"], targets[1]["weight"] = 100 - weight, weight
            objects.replace(watched, found)

        def mode(name: str) -> Callable[[], None]:
            return lambda: setattr(gateway, "mode", name)

        world = World(
            kind=kind,
            address=gateway.address,
            make=make,
            ask=ask,
            freeze=mode("silent"),
            thaw=mode("follow"),
            tamper=tamper,
            upstream="vllm:8000",
            api=api,
            objects=objects,
            gateway=gateway,
            sticky=kind == "http-route",
        )
        world.router.seed(world.stable)
        yield world


@contextmanager
def throwaway_namespace() -> Iterator[KubernetesObjects]:
    from kubernetes import client, config

    config.load_kube_config()
    core = client.CoreV1Api()
    name = f"sluice-test-{uuid.uuid4().hex[:8]}"
    core.create_namespace({"metadata": {"name": name}})
    try:
        yield KubernetesObjects(client.ApiClient(), name)
    finally:
        core.delete_namespace(name)


WORLDS = ["envoy", "http-route", "model-rewrite"]
if os.environ.get("KUBECONFIG"):
    WORLDS += ["http-route of the cluster", "model-rewrite of the cluster"]


@pytest.fixture(scope="module")
def envoy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with envoy_world(tmp_path_factory.mktemp("gateway")) as world:
        yield world


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """A gateway that sends everybody to release `a`, and has refused nobody."""
    kind, _, place = request.param.partition(" of the ")
    if kind != "envoy":
        with cluster_world(kind, real=bool(place)) as made:
            yield made
        return
    made = request.getfixturevalue("envoy")
    made.thaw()
    made.router.settings.state_file.unlink()
    made.router.seed(made.stable)
    made.router.reconcile()
    yield made
    made.thaw()


def only_cluster(world: World) -> KubernetesServer:
    if world.api is None:
        pytest.skip("faults of the API server")
    return world.api


def test_weights_are_applied_and_read_back(world: World) -> None:
    assert world.router.state() == RouteState(world.stable)
    assert world.share(digest("a"), 20) == 100
    for weight in (0, 30, 100):
        assert world.router.apply(world.split(weight)) == world.split(weight)
        assert world.make(1.0).state() == world.split(weight)
        assert abs(world.share(digest("c"), 80) - weight) <= 20
    assert world.router.apply(RouteState(world.canary)) == RouteState(world.canary)
    assert world.share(digest("c"), 20) == 100
    assert world.router.previous() == (world.stable,)


def test_raising_the_weight_moves_nobody_back(world: World) -> None:
    if not world.sticky:
        pytest.skip("an endpoint picker chooses for each request anew (docs/kubernetes-routing.md)")
    sessions = [str(uuid.uuid4()) for _ in range(25)]
    before: set[str] = set()
    for weight in (10, 40, 75):
        world.router.apply(world.split(weight))
        answers = {session: {world.ask(session) for _ in range(2)} for session in sessions}
        assert all(len(found) == 1 for found in answers.values())
        now = {session for session, found in answers.items() if found == {digest("c")}}
        assert before <= now
        before = now


def test_a_change_expected_of_other_routes_changes_nothing(world: World) -> None:
    world.router.apply(world.split(10))
    with pytest.raises(ConflictError, match="10% on app-cccc"):
        world.router.apply(world.split(50), expected=world.split(5))
    assert world.router.state() == world.split(10)
    assert world.router.apply(world.split(20), expected=world.split(10)).weight == 20


def test_of_eight_writers_one_wins_each_revision(world: World) -> None:
    rounds, writers = 3, 8
    world.router.apply(world.split(0))
    for turn in range(rounds):
        before = world.router.state()
        barrier = threading.Barrier(writers)

        def write(number: int, turn: int = turn, before: RouteState = before, barrier: Any = barrier) -> int | None:
            router = world.make(5.0)
            barrier.wait()
            try:
                return int(router.apply(world.split(1 + turn * writers + number), expected=before).weight)
            except ConflictError:
                return None

        with ThreadPoolExecutor(writers) as pool:
            won = [weight for weight in pool.map(write, range(writers)) if weight is not None]
        assert len(won) == 1
        assert world.router.state().weight == won[0]


def test_what_was_refused_never_rises(world: World) -> None:
    world.router.apply(world.split(10))
    world.router.rollback("it answered in verse")
    other = world.make(5.0)
    assert "in verse" in other.refusal(digest("c"))
    with pytest.raises(GateRefused, match="in verse"):
        other.apply(world.split(1))
    with pytest.raises(GateRefused):
        other.apply(RouteState(world.canary))
    assert other.apply(world.split(0)).weight == 0
    assert other.refusal(digest("e")) is None


def test_a_stale_controller_changes_nothing(world: World) -> None:
    world.router.apply(world.split(5), token=7)
    with pytest.raises(StaleToken, match="7"):
        world.make(5.0).apply(world.split(50), token=6)
    assert world.router.state() == world.split(5)
    # A person's change carries no token, and does not reset it.
    world.router.apply(world.split(3))
    world.router.rollback("bad")
    with pytest.raises(StaleToken):
        world.router.apply(RouteState(world.stable), token=6)
    world.router.apply(world.split(4, "e"), token=8)


def test_a_rollback_takes_everybody_to_stable(world: World) -> None:
    assert world.router.rollback("nothing to do") == RouteState(world.stable)
    world.router.apply(world.split(60))
    began = time.monotonic()
    assert world.router.rollback("bad") == RouteState(world.stable)
    assert time.monotonic() - began < 2
    assert world.share(digest("a"), 40) == 100
    world.router.apply(world.split(60, "e"))
    world.router.rollback("a person looks first", absorb=False)
    assert world.router.apply(world.split(1, "e")).weight == 1


def test_a_rollback_wins_against_a_writer_that_never_stops(world: World) -> None:
    world.router.apply(world.split(5))
    end = threading.Event()
    refused: list[Exception] = []

    def storm() -> None:
        router, weight = world.make(5.0), 5
        while not end.is_set():
            weight = weight % 90 + 1
            try:
                router.apply(world.split(weight))
            except GateRefused as error:
                refused.append(error)
            except (ConflictError, UnavailableError):
                pass

    threads = [threading.Thread(target=storm) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    began = time.monotonic()
    world.router.rollback("bad")
    took = time.monotonic() - began
    time.sleep(0.1)
    end.set()
    for thread in threads:
        thread.join(20)
    assert took < 5
    assert refused
    assert world.router.state().share(digest("c")) == 0
    assert world.share(digest("a"), 20) == 100


def test_a_promotion_can_be_undone(world: World) -> None:
    with pytest.raises(ConflictError, match="no earlier"):
        world.router.restore_previous("too early")
    world.router.apply(RouteState(world.canary))
    assert world.router.restore_previous("complaints") == RouteState(world.stable)
    assert world.share(digest("a"), 20) == 100
    assert "complaints" in world.router.refusal(digest("c"))
    with pytest.raises(ConflictError):
        world.router.restore_previous("again")


def test_a_change_that_is_not_confirmed_is_taken_back(world: World) -> None:
    world.router.apply(world.split(5))
    world.freeze()
    with pytest.raises(UnavailableError, match=r"confirm|does not answer"):
        world.make(0.3).apply(world.split(90), token=9)
    world.thaw()
    assert world.router.state() == world.split(5)
    world.router.reconcile()
    assert world.share(digest("c"), 60) < 30


def test_a_rollback_that_is_not_confirmed_stands(world: World) -> None:
    world.router.apply(world.split(50))
    world.freeze()
    with pytest.raises(UnavailableError):
        world.make(0.3).rollback("bad")
    assert world.router.state() == RouteState(world.stable)
    world.thaw()
    cluster_gateway.eventually(lambda: world.share(digest("a"), 20) == 100)


def test_drift_is_told_and_mended(world: World) -> None:
    world.router.apply(world.split(5))
    assert world.router.drift() == ()
    world.tamper(80)
    cluster_gateway.eventually(world.router.drift)
    (sentence, *_) = world.router.drift()
    assert sentence.rstrip().endswith(".")
    assert world.router.reconcile() == world.split(5)
    assert world.router.drift() == ()
    assert world.share(digest("c"), 100) < 30


def test_shadow_is_kept_or_refused_in_words(world: World) -> None:
    wanted = replace(world.split(0), shadow=50)
    if world.kind == "model-rewrite":
        with pytest.raises(InputError, match=r"shadow = 50.*rollout\.yaml"):
            world.router.apply(wanted)
        return
    world.router.apply(wanted)
    assert world.router.state() == wanted
    assert world.share(digest("a"), 30) == 100


def test_requests_under_way_are_counted(world: World) -> None:
    world.router.apply(world.split(50))
    if world.gateway is not None:
        with pytest.raises(UnavailableError, match="have no"):
            world.router.active_requests(digest("c"))
        name = release_name("app", digest("c"))
        space = world.objects.namespace if world.objects else ""
        lines = {
            "http-route": f'envoy_cluster_upstream_rq_active{{envoy_cluster_name="kube_{space}_{name}_8000"}}',
            "model-rewrite": 'llm_d_router_epp_running_requests{model_name="app",target_model_name="app-cccccccccccc"}',
        }
        world.gateway.running = [lines[world.kind] + " 2"]
        assert world.router.active_requests(digest("c")) == 2
        with pytest.raises(UnavailableError, match="2 request"):
            world.router.wait_idle(digest("c"), timeout_s=0.1)
        world.router.rollback("bad")
        world.gateway.running = [lines[world.kind] + " 0"]
    assert world.router.active_requests(digest("c")) == 0
    world.router.wait_idle(digest("c"), timeout_s=1)


def test_an_api_that_is_away_is_told_in_words(world: World) -> None:
    api = only_cluster(world)
    world.router.apply(world.split(5))
    api.away = 1000
    assert "503: etcd is away" in world.router.drift()[0]
    for ask in (world.router.state, lambda: world.router.apply(world.split(9))):
        with pytest.raises(UnavailableError, match="503: etcd is away"):
            ask()
    api.away = 2
    # A rollback sits out a hiccup.
    assert world.router.rollback("bad") == RouteState(world.stable)


def test_a_storm_of_conflicts_is_waited_out(world: World) -> None:
    api = only_cluster(world)
    api.conflicts = 20
    assert world.router.apply(world.split(5)).weight == 5
    api.conflicts = 20
    assert world.router.rollback("bad").weight == 0


def test_an_answer_that_was_lost_is_found_out(world: World) -> None:
    api = only_cluster(world)
    world.router.apply(world.split(5))
    world.router.apply(RouteState(world.canary))
    world.router.apply(RouteState(world.target("e")))
    api.lost = 1
    # It was written, and is not done twice.
    assert world.router.restore_previous("bad") == RouteState(world.canary)
    api.lost = 1
    with pytest.raises(UnavailableError):
        world.router.apply(RouteState(world.canary, world.target("d"), 70))
    assert world.router.state() == RouteState(world.canary)


def test_the_server_refuses_what_the_schema_does_not_know(world: World) -> None:
    only_cluster(world)
    objects = world.objects
    assert objects is not None
    kind = world.router.kind
    found = objects.get(kind, "app")
    assert found is not None
    found["spec"]["rules"][0]["wieght"] = 5
    with pytest.raises(InputError, match="wieght"):
        objects.replace(kind, found)
