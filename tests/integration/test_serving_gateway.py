"""The real Envoy before small stand-in servers: routes, weights, stickiness, isolation, the access log."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from sluice.infra.errors import ConflictError, GateRefused, UnavailableError
from sluice.infra.health import probe
from sluice.serving.access_log import AccessLog, AccessSample
from sluice.serving.envoy import GatewaySettings, gateway_service, prepare_gateway
from sluice.serving.router import EnvoyRouter
from sluice.serving.routes import RouteState, Target
from tests.serving.gateway import Gateway, envoy_binary, free_port, running_gateway
from tests.serving.samples import target
from tests.serving.upstream import Upstream, upstream

pytestmark = pytest.mark.integration


@pytest.fixture
def servers() -> Iterator[tuple[Upstream, Upstream]]:
    with upstream() as first, upstream() as second:
        yield first, second


@pytest.fixture
def gateway(tmp_path: Path, servers: tuple[Upstream, Upstream]) -> Iterator[Gateway]:
    with running_gateway(tmp_path / "gateway", target("a", servers[0].port)) as running:
        yield running


@pytest.fixture
def canary(servers: tuple[Upstream, Upstream]) -> Target:
    return target("c", servers[1].port)


def released(gateway: Gateway, sessions: int) -> dict[str, str]:
    return {f"s{number}": gateway.ask(f"s{number}").headers["x-sluice-release"] for number in range(sessions)}


def logged(gateway: Gateway, count: int) -> list[AccessSample]:
    log = AccessLog(gateway.settings.access_log)
    for _ in range(100):
        found = log.read(0, time.time() + 1)
        if len(found) >= count:
            break
        time.sleep(0.05)
    return found


def test_only_three_paths_are_exposed_and_the_model_is_renamed(
    gateway: Gateway, servers: tuple[Upstream, Upstream]
) -> None:
    answer = gateway.ask(
        "s1", headers={"x-sluice-release": "forged", "x-sluice-model": "forged", "x-request-id": "r-1"}
    )
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "answer of app-aaaaaaaaaaaa"
    stable = gateway.router.state().stable
    assert answer.headers["x-sluice-release"] == stable.release
    assert answer.headers["x-sluice-adapter"] == stable.adapter
    assert answer.headers["x-request-id"] == "r-1"
    model, seen = servers[0].seen[-1]
    assert model == stable.served_name
    assert "x-sluice-release" not in seen
    assert "x-sluice-model" not in seen

    client = gateway.client
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["app"]
    for path in ("/metrics", "/health", "/v1/models/x", "/v1/../metrics"):
        assert client.get(path).status_code == 404, path
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/chat/completions/../../load_lora_adapter"):
        assert client.post(path, json={"model": "app"}).status_code == 404, path
    # Served names are internal: a client cannot ask for one.
    refused = client.post("/v1/chat/completions", json={"model": stable.served_name, "messages": []})
    assert refused.status_code == 404
    assert "app" in refused.json()["error"]["message"]
    assert client.post("/v1/chat/completions", content=b"{}").status_code == 400
    large = {"model": "app", "messages": [{"role": "user", "content": "x" * (1 << 20)}]}
    assert client.post("/v1/chat/completions", json=large).status_code == 413
    assert len(servers[0].seen) == 1


def test_sessions_stick_and_a_larger_weight_only_adds_sessions(gateway: Gateway, canary: Target) -> None:
    stable = gateway.router.state().stable
    before: set[str] = set()
    for weight in (0, 5, 25, 50, 100):
        confirmed = gateway.router.apply(RouteState(stable, canary, weight))
        assert confirmed.weight == weight
        chosen = released(gateway, 50)
        if weight == 25:
            assert chosen == released(gateway, 50)
        on_canary = {session for session, release in chosen.items() if release == canary.release}
        assert before <= on_canary
        assert abs(len(on_canary) - 0.5 * weight) <= 14
        before = on_canary
    gateway.router.rollback("test")
    assert set(released(gateway, 40).values()) == {stable.release}


def test_a_probe_needs_the_key_to_choose_its_release(gateway: Gateway, canary: Target) -> None:
    stable = gateway.router.state().stable
    assert gateway.ask("s", headers=gateway.router.probe_headers("canary")).status_code == 409
    gateway.router.apply(RouteState(stable, canary, 0))
    assert gateway.ask("s", headers={"x-sluice-force": "canary"}).headers["x-sluice-release"] == stable.release
    wrong = {"x-sluice-force": "canary", "x-sluice-probe-key": "0" * 48}
    assert gateway.ask("s", headers=wrong).headers["x-sluice-release"] == stable.release
    forced = gateway.ask("s", headers=gateway.router.probe_headers("canary"))
    assert forced.headers["x-sluice-release"] == canary.release
    assert [sample.forced for sample in logged(gateway, 3)] == [False, False, True]
    assert gateway.settings.probe_key_file.stat().st_mode & 0o077 == 0
    assert gateway.settings.routes_file.stat().st_mode & 0o077 == 0


def test_a_dead_canary_hurts_only_its_own_share(gateway: Gateway, canary: Target) -> None:
    stable = gateway.router.state().stable
    dead = replace(canary, upstreams=("127.0.0.1:9",))
    gateway.router.apply(RouteState(stable, dead, 50))
    answers = [gateway.ask(f"s{number}") for number in range(30)]
    codes = {answer.status_code for answer in answers}
    assert codes == {200, 503}
    assert all(a.headers["x-sluice-release"] == stable.release for a in answers if a.status_code == 200)
    assert answers[[a.status_code for a in answers].index(503)].json()["error"]["type"] == "gateway_error"
    samples = logged(gateway, 30)
    assert {sample.release for sample in samples if sample.status == 503} == {dead.release}
    gateway.router.rollback("its server is dead")
    assert {gateway.ask(f"s{number}").status_code for number in range(30)} == {200}


def test_the_log_tells_what_a_user_noticed(gateway: Gateway, servers: tuple[Upstream, Upstream]) -> None:
    name = gateway.router.state().stable.served_name
    modes = servers[0].modes
    for mode in ("fine", "slow", "cut", "long"):
        modes[name] = mode
        gateway.stream(mode)
    for mode in ("empty", "fail", "fine"):
        modes[name] = mode
        gateway.ask(f"plain-{mode}")
    by_session = {sample.session: sample for sample in logged(gateway, 7)}
    fine, slow, cut, long = (by_session[mode] for mode in ("fine", "slow", "cut", "long"))
    assert fine.streamed
    assert fine.text
    assert not fine.broken
    assert not fine.truncated
    assert fine.tokens == 1
    assert fine.last_ms == fine.ttft_ms
    assert fine.ttft_ms is not None
    assert slow.ttft_ms is not None
    # The first piece carries no text: the time is that of the first word.
    assert fine.ttft_ms >= 40
    assert slow.ttft_ms >= 500
    assert cut.broken
    assert long.truncated
    assert not by_session["plain-empty"].text
    assert by_session["plain-fail"].status == 500
    assert by_session["plain-fine"].text
    assert not by_session["plain-fine"].broken


def test_switching_under_load_loses_no_request(gateway: Gateway, canary: Target) -> None:
    import threading

    stable = gateway.router.state().stable
    codes: list[int] = []
    stop = threading.Event()

    def load(worker: int) -> None:
        with httpx.Client(base_url=gateway.settings.url, timeout=10, trust_env=False) as client:
            number = 0
            while not stop.is_set():
                number += 1
                body = {"model": "app", "messages": [], "stream": True}
                answer = client.post("/v1/chat/completions", json=body, headers={"x-session-id": f"{worker}-{number}"})
                codes.append(answer.status_code if "[DONE]" in answer.text else -1)

    workers = [threading.Thread(target=load, args=(number,)) for number in range(6)]
    for worker in workers:
        worker.start()
    for weight in (5, 50, 100, 0, 50, 25):
        gateway.router.apply(RouteState(stable, canary, weight))
        time.sleep(0.2)
    # A promotion: the canary becomes stable, and its predecessor disappears.
    gateway.router.apply(RouteState(canary))
    time.sleep(0.3)
    gateway.router.wait_idle(stable.release, timeout_s=5)
    stop.set()
    for worker in workers:
        worker.join()
    assert len(codes) > 50
    assert set(codes) == {200}


def test_an_unconfirmed_raise_is_taken_back_and_a_rollback_stands(gateway: Gateway, canary: Target) -> None:
    stable = gateway.router.state().stable
    gateway.router.apply(RouteState(stable, canary, 25))
    gateway.kill()
    router = EnvoyRouter(gateway.settings, confirm_s=0.3)
    with pytest.raises(UnavailableError, match="did not confirm"):
        router.apply(RouteState(stable, canary, 50))
    assert router.state().weight == 25
    with pytest.raises(UnavailableError, match="did not confirm"):
        router.rollback("by hand")
    # The decision stands: a gateway that comes back comes back to stable, and the release may not rise again.
    gateway.start()
    assert set(released(gateway, 20).values()) == {stable.release}
    with pytest.raises(GateRefused, match="by hand"):
        gateway.router.apply(RouteState(stable, canary, 5))


def test_a_second_hand_is_noticed(gateway: Gateway, canary: Target) -> None:
    before = gateway.router.state()
    gateway.router.apply(RouteState(before.stable, canary, 5))
    with pytest.raises(ConflictError, match="changed meanwhile"):
        gateway.router.apply(RouteState(before.stable, canary, 25), expected=before)
    assert gateway.router.state().weight == 5


def test_a_promotion_can_be_undone_with_the_gateway_alone(gateway: Gateway, canary: Target) -> None:
    stable = gateway.router.state().stable
    gateway.router.apply(RouteState(canary))
    assert gateway.router.previous() == (stable,)
    gateway.router.restore_previous("users complain")
    assert set(released(gateway, 10).values()) == {stable.release}
    with pytest.raises(GateRefused, match="users complain"):
        gateway.router.apply(RouteState(canary))


def test_before_the_first_release_the_answer_says_so(tmp_path: Path) -> None:
    settings = GatewaySettings("app", tmp_path / "g", free_port(), free_port())
    prepare_gateway(settings)
    envoy = gateway_service(settings, envoy_binary())
    process = subprocess.Popen(envoy.command)
    try:
        until = time.monotonic() + 10
        while probe(envoy.health) is not None and time.monotonic() < until:
            time.sleep(0.05)
        answer = httpx.post(f"{settings.url}/v1/chat/completions", json={"model": "app"}, trust_env=False)
        assert answer.status_code == 503
        assert "no release" in json.loads(answer.text)["error"]["message"]
    finally:
        process.terminate()
        process.wait(10)


def test_a_server_that_moved_is_followed_also_by_a_rollback(gateway: Gateway, canary: Target) -> None:
    router = gateway.router
    first = router.state().stable
    router.apply(RouteState(first, canary, 50))
    router.apply(RouteState(canary))
    moved = {one.release: replace(one, upstreams=canary.upstreams) for one in (first, canary)}
    # Everything is where the canary's server is now; only shares and names stay.
    assert router.relocate(moved.__getitem__).stable == canary
    assert [one.upstreams for one in router.previous()] == [canary.upstreams]
    assert router.relocate(moved.__getitem__) == router.state()
    router.restore_previous("back")
    assert gateway.ask("s").headers["x-sluice-release"] == first.release
