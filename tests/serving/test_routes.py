from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sluice.infra.errors import InputError, IntegrityError, UnavailableError
from sluice.serving.envoy import GatewaySettings, bootstrap, gateway_service, prepare_gateway, probe_key
from sluice.serving.envoy_routes import cluster_name, release_of, routes
from sluice.serving.router import EnvoyRouter
from sluice.serving.routes import RouteState, Target
from tests.serving.samples import digest, target


def settings(folder: Path) -> GatewaySettings:
    return GatewaySettings("app", folder, 20001, 20002)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("release", "latest"),
        ("adapter", ""),
        ("served_name", "a b"),
        ("served_name", '"%REQ(x)%"'),
        ("upstreams", ("127.0.0.1",)),
        ("upstreams", ("127.0.0.1:99999",)),
        ("upstreams", ("http://x:1",)),
    ],
)
def test_a_target_holds_only_names(field: str, value: Any) -> None:
    values = {"release": digest("a"), "adapter": digest("a"), "served_name": "app-1", "upstreams": ("127.0.0.1:80",)}
    with pytest.raises(InputError, match=field):
        Target(**{**values, field: value})


def test_a_state_is_consistent() -> None:
    state = RouteState(target("a"), target("c"), 25)
    assert (state.share(digest("a")), state.share(digest("c")), state.share(digest("e"))) == (75, 25, 0)
    assert RouteState.from_json(json.loads(json.dumps(state.to_json()))) == state
    for bad in ((target("a"), None, 5), (target("a"), target("c"), 101), (target("a"), target("a"), 5)):
        with pytest.raises(InputError):
            RouteState(*bad)


def test_clusters_carry_the_whole_digest() -> None:
    assert release_of(cluster_name(digest("a"))) == digest("a")
    assert release_of("xds-grpc") is None
    assert release_of("-") is None


def test_at_weight_0_no_share_names_the_canary() -> None:
    content = routes("app", RouteState(target("a"), target("c"), 0), "1", "key")
    found = {route["name"]: route for route in content["resources"][0]["virtual_hosts"][0]["routes"]}
    split = found["split"]["route"]["weighted_clusters"]["clusters"]
    assert [(share["name"], share["weight"]) for share in split] == [(cluster_name(digest("a")), 100)]
    wanted = [header for header in found["forced-canary"]["match"]["headers"] if header["name"] == "x-sluice-probe-key"]
    assert wanted[0]["string_match"] == {"exact": "key"}


def test_preparing_again_keeps_key_and_routes(tmp_path: Path) -> None:
    gateway = settings(tmp_path)
    prepare_gateway(gateway)
    EnvoyRouter(gateway).seed(target("a"))
    key, content = probe_key(gateway), gateway.routes_file.read_text()
    prepare_gateway(gateway)
    assert (probe_key(gateway), gateway.routes_file.read_text()) == (key, content)
    # A second seed is not a change of mind.
    assert EnvoyRouter(gateway).seed(target("b")).stable == target("a")
    assert len(key) == 48


def test_the_gateway_listens_on_the_loopback_address_only(tmp_path: Path) -> None:
    content = bootstrap(settings(tmp_path))
    addresses = [content["admin"]["address"], *(found["address"] for found in content["static_resources"]["listeners"])]
    assert {found["socket_address"]["address"] for found in addresses} == {"127.0.0.1"}
    command = gateway_service(settings(tmp_path), "envoy").command
    assert command[command.index("--file-flush-interval-msec") + 1] == "200"
    assert "--disable-hot-restart" in command


def test_without_routes_and_with_damaged_ones_the_router_says_so(tmp_path: Path) -> None:
    router = EnvoyRouter(settings(tmp_path))
    with pytest.raises(UnavailableError, match="no routes yet"):
        router.state()
    router.settings.state_file.write_text('{"revision": 1}')
    with pytest.raises(IntegrityError, match="damaged"):
        router.state()
