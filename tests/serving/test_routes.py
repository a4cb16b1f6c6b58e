from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sluice.infra.errors import InputError, IntegrityError, UnavailableError
from sluice.serving.durable import replace_file, reserve
from sluice.serving.envoy import GatewaySettings, gateway_service, prepare_gateway, probe_key
from sluice.serving.envoy_clusters import cluster_name, clusters, guarded_cluster, release_of, shadow_cluster
from sluice.serving.envoy_listeners import bootstrap
from sluice.serving.envoy_routes import Timeouts, routes
from sluice.serving.log_rotation import rotated_logs
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
    assert release_of(guarded_cluster(digest("a"))) == release_of(shadow_cluster(digest("a"))) == digest("a")
    assert release_of("-") is None
    assert release_of("shadow") is None


def test_servers_of_its_own_and_replicas_are_checked_and_guarded() -> None:
    shared, own = target("a"), replace(target("c"), dedicated=True, upstreams=("127.0.0.1:1", "127.0.0.1:2"))
    found = {one["name"]: one for one in clusters((shared, own), "1")["resources"]}
    assert "health_checks" not in found[cluster_name(shared.release)]
    assert found[cluster_name(own.release)]["health_checks"][0]["http_health_check"]["path"] == "/health"
    assert len(found[cluster_name(own.release)]["load_assignment"]["endpoints"][0]["lb_endpoints"]) == 2
    tried = found[guarded_cluster(own.release)]["cluster_type"]["typed_config"]["clusters"]
    assert tried == [cluster_name(own.release), "failover"]
    # Users of a canary with servers of its own are guarded, its probes are not: they must hear of a dead server.
    content = routes("app", RouteState(shared, own, 30), "1", "key")
    found = {route["name"]: route for route in content["resources"][0]["virtual_hosts"][0]["routes"]}
    names = {name: [one["name"] for one in route["route"]["weighted_clusters"]["clusters"]]
             for name, route in found.items() if "route" in route}  # fmt: skip
    assert names["split"] == [cluster_name(shared.release), guarded_cluster(own.release)]
    assert names["forced-canary"] == [cluster_name(own.release)]
    assert names["failover"] == [cluster_name(shared.release)]


def test_only_users_are_mirrored_and_time_outs_are_in_every_route() -> None:
    state, slow = RouteState(target("a"), target("c"), 0, 40), Timeouts(1, 2, 3)
    content = routes("app", state, "1", "key", slow)["resources"][0]["virtual_hosts"][0]["routes"]
    found = {route["name"]: route["route"] for route in content if "route" in route}
    assert [name for name, route in found.items() if "request_mirror_policies" in route] == ["split"]
    fraction = found["split"]["request_mirror_policies"][0]["runtime_fraction"]["default_value"]
    assert fraction == {"numerator": 40, "denominator": "HUNDRED"}
    for route in found.values():
        assert (route["retry_policy"]["per_try_timeout"], route["idle_timeout"], route["timeout"]) == ("1s", "2s", "3s")


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
    gateway.access_log.write_text("x" * 11)
    prepare_gateway(replace(gateway, max_log_bytes=10))
    assert (probe_key(gateway), gateway.routes_file.read_text()) == (key, content)
    assert [found.read_text() for found in rotated_logs(gateway.access_log)] == ["x" * 11]
    # A second seed is not a change of mind.
    assert EnvoyRouter(gateway).seed(target("b")).stable == target("a")
    assert len(key) == 48


def test_the_gateway_listens_on_the_loopback_address_only(tmp_path: Path) -> None:
    content = bootstrap(settings(tmp_path))
    listeners = content["static_resources"]["listeners"]
    addresses = [content["admin"]["address"], *(found["address"] for found in listeners if "address" in found)]
    assert {found["socket_address"]["address"] for found in addresses} == {"127.0.0.1"}
    assert [found["name"] for found in listeners if "internal_listener" in found] == ["shadow", "failover"]
    command = gateway_service(settings(tmp_path), "envoy").command
    assert command[command.index("--file-flush-interval-msec") + 1] == "200"
    assert "--disable-hot-restart" in command


def test_a_changed_bootstrap_is_another_part_so_that_the_gateway_starts_anew(tmp_path: Path) -> None:
    made = settings(tmp_path)
    assert gateway_service(made, "envoy") == gateway_service(made, "envoy")
    assert gateway_service(replace(made, max_body_bytes=5), "envoy") != gateway_service(made, "envoy")


def test_without_routes_and_with_damaged_ones_the_router_says_so(tmp_path: Path) -> None:
    router = EnvoyRouter(settings(tmp_path))
    with pytest.raises(UnavailableError, match="no routes yet"):
        router.state()
    router.settings.state_file.write_text('{"revision": 1}')
    for call in (router.state, lambda: router.rollback("no copy either")):
        with pytest.raises(IntegrityError, match="damaged"):
            call()
    assert "damaged" in router.drift()[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 512 KiB that can be filled."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("only root may mount a disk")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill_up(disk: Path) -> None:
    with suppress(OSError), (disk / "fill").open("wb", buffering=0) as stream:
        while stream.write(b"x" * 4096) == 4096:
            pass


def test_what_is_kept_aside_is_written_on_a_full_disk(small_disk: Path) -> None:
    file = small_disk / "routes.json"
    replace_file(file, "old")
    reserve(file)
    fill_up(small_disk)
    with pytest.raises(UnavailableError, match="space"):
        replace_file(file, "a raise must not use it up")
    assert file.read_text() == "old"
    replace_file(file, "new" * 5000, mode=0o600, reserved=True)
    assert file.read_text() == "new" * 5000
    assert file.stat().st_mode & 0o077 == 0
    assert sorted(found.name for found in small_disk.iterdir()) == ["fill", "routes.json"]


def test_a_rollback_is_written_on_a_full_disk(small_disk: Path) -> None:
    router = EnvoyRouter(settings(small_disk), confirm_s=0.01)
    router.seed(target("a"))
    prepare_gateway(router.settings)
    content = json.loads(router.settings.state_file.read_text())
    content["state"] = RouteState(target("a"), target("c"), 25).to_json()
    replace_file(router.settings.state_file, json.dumps(content))
    fill_up(small_disk)
    # No Envoy runs here, so nobody confirms; the files are written all the same.
    with pytest.raises(UnavailableError, match="did not confirm"):
        router.rollback("by hand")
    assert router.state() == RouteState(target("a"))
    assert router.refusal(digest("c")) == "by hand"
    names = json.loads(router.settings.routes_file.read_text())["resources"][0]["virtual_hosts"][0]["routes"]
    assert "409" in json.dumps([one for one in names if one["name"] == "forced-canary"])
