"""The real Envoy before small stand-in servers: limits, shadow, dead and hung servers, the log, repairs."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from sluice.infra.errors import IntegrityError, UnavailableError
from sluice.serving.access_log import AccessLog
from sluice.serving.envoy_routes import Timeouts
from sluice.serving.gateway_samples import GatewaySamples, ShadowSamples
from sluice.serving.log_rotation import rotated_logs
from sluice.serving.observations import Observed
from sluice.serving.router import EnvoyRouter
from sluice.serving.routes import RouteState, StaleToken, Target
from tests.serving.gateway import Gateway, running_gateway
from tests.serving.samples import target
from tests.serving.upstream import Upstream, upstream

pytestmark = pytest.mark.integration

TRACEPARENT = re.compile(r"^00-[0-9a-f]{32}-[0-9a-f]{16}-01$")


@pytest.fixture
def servers() -> Iterator[tuple[Upstream, Upstream]]:
    with upstream() as first, upstream() as second:
        yield first, second


@pytest.fixture
def gateway(tmp_path: Path, servers: tuple[Upstream, Upstream]) -> Iterator[Gateway]:
    stable, timeouts = target("a", servers[0].port), Timeouts(0.5, 1, 10)
    with running_gateway(
        tmp_path / "gateway", stable, requests_per_s=3, timeouts=timeouts, max_log_bytes=20_000
    ) as running:
        yield running


@pytest.fixture
def canary(servers: tuple[Upstream, Upstream]) -> Target:
    return target("c", servers[1].port)


def entries(gateway: Gateway, count: int) -> list[dict[str, object]]:
    """Every line of the log, when there are `count`."""
    for _ in range(100):
        lines = gateway.settings.access_log.read_text().splitlines()
        if len(lines) >= count:
            break
        time.sleep(0.05)
    return [json.loads(line) for line in lines]


def observed(source: GatewaySamples, canary: Target, stable: Target, count: int) -> Observed:
    """What is known when there are `count` error rates."""
    for _ in range(100):
        found = source.observe(canary.release, stable.release, 0, time.time())
        if sum(one.metric == "error_rate" for one in found.samples) >= count:
            break
        time.sleep(0.05)
    return found


@contextmanager
def load(gateway: Gateway, workers: int = 3) -> Iterator[list[int]]:
    """Streaming clients with keys and sessions of their own; the codes they got, -1 for a stream that broke."""
    codes: list[int] = []
    stop = threading.Event()

    def ask(worker: int) -> None:
        with httpx.Client(base_url=gateway.settings.url, timeout=10, trust_env=False) as client:
            number = 0
            while not stop.is_set():
                number += 1
                headers = {"x-session-id": f"{worker}-{number}", "authorization": f"Bearer {worker}-{number}"}
                body = {"model": "app", "messages": [], "stream": True}
                answer = client.post("/v1/chat/completions", json=body, headers=headers)
                codes.append(answer.status_code if answer.status_code != 200 or "[DONE]" in answer.text else -1)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    try:
        yield codes
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_each_answer_says_what_it_is_known_by(gateway: Gateway, servers: tuple[Upstream, Upstream]) -> None:
    given = f"00-{'a' * 32}-{'b' * 16}-00"
    kept = gateway.ask("s", headers={"traceparent": given, "x-request-id": "mine", "api-key": "1"})
    assert (kept.headers["traceparent"], kept.headers["x-request-id"]) == (given, "mine")
    made = [gateway.ask("s", headers={"traceparent": bad, "api-key": bad[:1] + "2"}) for bad in ("", "00-zz-1", "0-0")]
    found = [answer.headers["traceparent"] for answer in made]
    assert all(TRACEPARENT.match(one) for one in found)
    assert len(set(found)) == 3
    assert [seen["traceparent"] for _, seen in servers[0].seen] == [given, *found]
    assert [seen["x-request-id"] for _, seen in servers[0].seen[1:]] == [one.headers["x-request-id"] for one in made]
    unknown = gateway.client.get("/metrics", headers={"api-key": "3"})
    assert TRACEPARENT.match(unknown.headers["traceparent"])
    assert unknown.headers["x-request-id"]
    assert [line["traceparent"] for line in entries(gateway, 5)][:4] == [given, *found]


def test_one_key_that_asks_too_much_is_told_to_wait_and_no_other(gateway: Gateway) -> None:
    answers = [gateway.ask("s", headers={"authorization": "Bearer secret-1"}) for _ in range(12)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert refused[0].headers["retry-after"] == "1"
    assert refused[0].json()["error"]["type"] == "rate_limit_error"
    assert TRACEPARENT.match(refused[0].headers["traceparent"])
    for headers in ({"authorization": "Bearer secret-2"}, {"x-api-key": "secret-3"}, {}):
        assert gateway.ask("s", headers=headers).status_code == 200
    assert gateway.ask("s", headers=gateway.router.probe_headers("stable")).status_code == 200
    assert "secret" not in json.dumps(entries(gateway, 16))


def test_a_server_that_takes_and_never_answers_ends_as_504(
    gateway: Gateway, canary: Target, servers: tuple[Upstream, Upstream]
) -> None:
    stable = gateway.router.state().stable
    servers[1].modes[canary.served_name] = "hang"
    gateway.router.apply(RouteState(stable, canary, 100))
    begun = time.monotonic()
    answer = gateway.ask("s")
    assert (answer.status_code, answer.headers["x-sluice-release"]) == (504, canary.release)
    assert answer.json()["error"]["type"] == "gateway_error"
    assert 0.4 < time.monotonic() - begun < 3
    assert gateway.stream("s") != ""
    source = GatewaySamples(AccessLog(gateway.settings.access_log), gateway.router)
    found = observed(source, canary, stable, 2)
    assert {one.detail for one in found.samples} == {"HTTP 504 (UT)"}
    assert canary.release not in found.finished
    # A stream that speaks in time may take longer than that.
    servers[1].modes[canary.served_name] = "slow"
    assert "[DONE]" in gateway.stream("s")


def test_time_per_token_is_that_of_the_server(
    gateway: Gateway, canary: Target, servers: tuple[Upstream, Upstream]
) -> None:
    stable = gateway.router.state().stable
    servers[0].modes[stable.served_name] = "words"
    gateway.stream("s")
    found = observed(GatewaySamples(AccessLog(gateway.settings.access_log), gateway.router), canary, stable, 1)
    values = {one.metric: one.value for one in found.samples}
    assert 9.5 <= values["time_per_token"] < 60
    assert values["time_to_first_token"] >= 45
    assert values["total_time"] >= 150


def test_a_shadow_is_asked_what_stable_is_asked_and_nobody_sees_its_answer(
    gateway: Gateway, canary: Target, servers: tuple[Upstream, Upstream]
) -> None:
    stable = gateway.router.state().stable
    gateway.router.apply(RouteState(stable, canary, 0, 100))
    servers[1].modes[canary.served_name] = "fail"
    for number in range(4):
        answer = gateway.ask("s", headers={"api-key": str(number), "x-sluice-pass": "shadow"})
        assert (answer.status_code, answer.headers["x-sluice-release"]) == (200, stable.release)
    log = AccessLog(gateway.settings.access_log)
    found = observed(ShadowSamples(log, gateway.router), canary, stable, 8)
    assert set(found.finished) == {stable.release, canary.release}
    assert [model for model, _ in servers[1].seen] == [canary.served_name] * 4
    rates = {(one.release, one.value, one.detail) for one in found.samples if one.metric == "error_rate"}
    assert rates == {(stable.release, 0.0, ""), (canary.release, 1.0, "HTTP 500")}
    users = observed(GatewaySamples(log, gateway.router), canary, stable, 4)
    assert {one.release for one in users.samples} == {stable.release}
    # A probe is nobody's question.
    gateway.ask("s", headers=gateway.router.probe_headers("stable"))
    # Neither a dead nor a hung canary is felt.
    for mode in ("hang", "dead"):
        if mode == "dead":
            servers[1].die()
        servers[1].modes[canary.served_name] = mode
        begun = time.monotonic()
        assert gateway.ask("s", headers={"api-key": mode}).status_code == 200
        assert time.monotonic() - begun < 0.4
    assert len(servers[1].seen) == 5


def test_who_has_servers_of_its_own_loses_only_what_is_on_them(
    gateway: Gateway, canary: Target, servers: tuple[Upstream, Upstream]
) -> None:
    stable, own = gateway.router.state().stable, replace(canary, dedicated=True)
    gateway.router.apply(RouteState(stable, own, 100))
    before = gateway.ask("s").json()["choices"][0]["message"]["content"]
    assert before == f"answer of {own.served_name}"
    servers[1].die()
    for number in range(8):
        answer = gateway.ask("s", headers={"api-key": str(number)})
        # Whoever answers says who it is.
        assert (answer.status_code, answer.headers["x-sluice-release"]) == (200, stable.release)
        assert answer.json()["choices"][0]["message"]["content"] == f"answer of {stable.served_name}"
    assert "[DONE]" in gateway.stream("s")
    assert gateway.ask("s", headers=gateway.router.probe_headers("canary")).status_code == 503
    source = GatewaySamples(AccessLog(gateway.settings.access_log), gateway.router)
    found = observed(source, own, stable, 10)
    told = [one.detail for one in found.samples if one.metric == "error_rate"]
    assert told == ["", *["no server of it answered; stable did"] * 9]
    assert {one.release for one in found.samples} == {own.release}


def test_a_replica_that_dies_is_passed_over(gateway: Gateway, servers: tuple[Upstream, Upstream]) -> None:
    first, second = servers
    both = replace(target("b"), upstreams=(f"127.0.0.1:{first.port}", f"127.0.0.1:{second.port}"))
    gateway.router.apply(RouteState(both))
    codes = [gateway.ask("s", headers={"api-key": str(number)}).status_code for number in range(6)]
    assert (codes, {len(first.seen), len(second.seen)}) == ([200] * 6, {3})
    first.die()
    answers = [gateway.ask("s", headers={"api-key": str(number)}).status_code for number in range(10, 22)]
    assert set(answers) == {200}


def test_a_controller_that_was_replaced_changes_nothing(gateway: Gateway, canary: Target) -> None:
    stable = gateway.router.state().stable
    gateway.router.apply(RouteState(stable, canary, 10), token=7)
    with pytest.raises(StaleToken, match="token 7"):
        gateway.router.apply(RouteState(stable, canary, 50), token=6)
    gateway.router.rollback("by hand")
    with pytest.raises(StaleToken):
        gateway.router.apply(RouteState(stable), token=6)
    gateway.router.apply(RouteState(stable), token=7)


def test_drift_is_told_and_mended_and_a_damaged_state_rolls_back(gateway: Gateway, canary: Target) -> None:
    router, files = gateway.router, gateway.settings
    stable = router.state().stable
    router.apply(RouteState(stable, canary, 10))
    old = files.routes_file.read_text()
    router.apply(RouteState(stable, canary, 60, 20))
    assert router.drift() == ()
    staging = files.routes_file.with_name("by-hand")
    staging.write_text(old)
    staging.rename(files.routes_file)
    for _ in range(100):
        if drift := router.drift():
            break
        time.sleep(0.02)
    assert "routes are of revision 2; 3 was decided" in drift[0]
    assert f"{canary.release} gets 10% of the sessions; 60% is right" in " ".join(drift)
    assert "0% of stable's requests are mirrored; 20% is right" in drift[-1]
    router.reconcile()
    assert router.drift() == ()
    files.state_file.write_text("{")
    with pytest.raises(IntegrityError, match="damaged"):
        router.apply(RouteState(stable, canary, 90))
    assert router.rollback("damaged") == RouteState(stable)
    assert (router.state(), router.refusal(canary.release), router.drift()) == (RouteState(stable), "damaged", ())
    gateway.kill()
    assert "does not answer" in router.drift()[0]


def test_traffic_confirms_a_rollback_and_the_log_is_put_aside_without_losing_a_sample(
    gateway: Gateway, canary: Target
) -> None:
    router, stable = gateway.router, gateway.router.state().stable
    assert "No request came" in router.confirm_traffic(router.state(), within_s=0.1)
    source = GatewaySamples(AccessLog(gateway.settings.access_log), router)
    router.apply(RouteState(stable, canary, 50))
    seen: list[str] = []
    since = 0.0
    with load(gateway) as codes:
        # What is not so is not confirmed.
        with pytest.raises(UnavailableError, match="still begin"):
            router.confirm_traffic(RouteState(stable), within_s=0.5)
        for _ in range(5):
            until = time.time()
            found = source.observe(canary.release, stable.release, since, until)
            assert not found.missing
            seen += [one.request_id for one in found.samples if one.metric == "error_rate"]
            since = until
            time.sleep(0.2)
        router.rollback("test")
        begun = time.monotonic()
        sentence = router.confirm_traffic(router.state(), within_s=2)
        assert time.monotonic() - begun < 2.2
        assert re.search(rf"[1-9]\d* on {stable.served_name}, and none elsewhere", sentence)
    router.wait_idle(canary.release, timeout_s=5)
    time.sleep(0.5)
    found = source.observe(canary.release, stable.release, since, time.time())
    seen += [one.request_id for one in found.samples if one.metric == "error_rate"]
    assert not found.missing
    assert set(codes) == {200}
    assert len(rotated_logs(gateway.settings.access_log)) >= 1
    assert (len(seen), len(set(seen))) == (len(codes), len(codes))


def test_a_rollback_needs_no_answer_from_the_admin_address(gateway: Gateway, canary: Target) -> None:
    stable = gateway.router.state().stable
    gateway.router.apply(RouteState(stable, canary, 100))
    deaf = EnvoyRouter(replace(gateway.settings, admin_port=9), confirm_s=0.2)
    with pytest.raises(UnavailableError, match="did not confirm"):
        deaf.rollback("by hand")
    assert gateway.ask("s").headers["x-sluice-release"] == stable.release
    source = GatewaySamples(AccessLog(gateway.settings.access_log), deaf)
    assert (observed(source, canary, stable, 1).active, gateway.router.drift()) == ({}, ())
