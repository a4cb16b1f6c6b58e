"""One controller of a cluster at a time: tokens grow, a waiter measures silence, and written times decide nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from sluice.infra.errors import UnavailableError
from sluice.infra.kubernetes_objects import KubernetesObjects
from sluice.serving.cluster_lease import LEASE, ClusterHeld, ClusterLease
from tests.support.kubernetes_server import KubernetesServer, serve


@pytest.fixture
def api() -> Iterator[KubernetesServer]:
    with serve() as api:
        yield api


def lease(api: KubernetesServer, holder: str, *, ahead_s: float = 0.0, duration_s: float = 0.9) -> ClusterLease:
    objects = KubernetesObjects(api.client(), "ml-serving", timeout_s=1.0)
    return ClusterLease(objects, "app", holder, duration_s=duration_s, wall=lambda: time.time() + ahead_s)


def spec(api: KubernetesServer) -> dict[str, object]:
    found: dict[str, object] = api.objects["leases", "ml-serving", "app-rollout"]["spec"]
    return found


def test_a_second_controller_waits_and_gets_a_larger_token(api: KubernetesServer) -> None:
    first = lease(api, "the first").acquire()
    said: list[str] = []
    got: list[ClusterHeld] = []
    waiter = threading.Thread(
        target=lambda: got.append(lease(api, "second").acquire(lambda _d, _t, what: said.append(what)))
    )
    waiter.start()
    # Longer than the duration: it is renewed.
    time.sleep(1.6)
    assert not got
    assert not first.lost()
    first.release()
    first.release()
    waiter.join(5)
    (second,) = got
    assert (first.token, second.token) == (1, 2)
    assert said == ["waiting for the first"]
    assert str(spec(api)["holderIdentity"]).startswith("second")
    second.release()
    assert "holderIdentity" not in spec(api)
    assert lease(api, "third").acquire().token == 3


def test_two_who_take_a_free_lease_at_once_get_different_tokens(api: KubernetesServer) -> None:
    for held in [lease(api, "before").acquire()]:
        held.release()
    got: list[int] = []

    def take(name: str) -> None:
        held = lease(api, name).acquire()
        got.append(held.token)
        assert not held.lost()
        held.release()

    threads = [threading.Thread(target=take, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(got) == [2, 3, 4, 5]


@pytest.mark.parametrize("ahead_s", [-3600.0, 0.0, 3600.0])
def test_a_silent_holder_is_followed_by_the_waiters_clock(api: KubernetesServer, ahead_s: float) -> None:
    held = lease(api, "silent").acquire()
    held._end.set()
    held._beat.join()
    began = time.monotonic()
    next_one = lease(api, "other", ahead_s=ahead_s).acquire()
    assert 1.0 <= time.monotonic() - began < 3
    assert next_one.token == 2
    assert held.lost()


def test_a_holder_that_cannot_renew_counts_itself_out_first(api: KubernetesServer) -> None:
    held = lease(api, "cut off").acquire()
    api.away = 10_000
    time.sleep(0.4)
    assert not held.lost()
    time.sleep(0.5)
    assert held.lost()
    held.release()
    with pytest.raises(UnavailableError, match="503"):
        lease(api, "new").acquire()


def test_a_holder_learns_that_it_was_followed_and_writes_no_more(api: KubernetesServer) -> None:
    held = lease(api, "slow").acquire()
    taken = api.objects["leases", "ml-serving", "app-rollout"]
    taken["spec"] |= {"holderIdentity": "thief 1", "leaseTransitions": 2}
    taken["metadata"]["resourceVersion"] = "999"
    time.sleep(0.5)
    assert held.lost()
    held.release()
    assert spec(api)["holderIdentity"] == "thief 1"


def test_a_label_on_the_lease_and_a_renewal_sent_twice_lose_nothing(api: KubernetesServer) -> None:
    held = lease(api, "holder").acquire()
    api.conflicts = 1
    time.sleep(0.5)
    assert api.conflicts == 0
    assert not held.lost()
    held.release()


def test_the_times_are_what_kubernetes_takes(api: KubernetesServer) -> None:
    lease(api, "holder").acquire().release()
    text = str(spec(api)["renewTime"])
    assert len(text) == len("2026-11-21T12:00:00.000000Z")
    assert LEASE.api_version == "coordination.k8s.io/v1"
