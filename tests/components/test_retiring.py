"""Who needs an adapter, and how one that nobody needs leaves the servers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sluice.components import retiring
from sluice.components.retiring import (
    bring_back,
    hand_over,
    holders,
    keep_for_release,
    keep_for_rollback,
    make_room,
    retire,
    retire_due,
    slots,
)
from sluice.components.served import adapter_shelf, ensure_loaded, loaded, servers, target
from sluice.infra.errors import ConflictError, UnavailableError
from sluice.provenance.artifacts import ArtifactStore
from sluice.serving.routes import RouteState
from sluice.serving.slots import Memory, server_memory
from tests.components.serving_site import Site, serving_site
from tests.support.directory_store import DirectoryStore

DAY = 86400.0


@pytest.fixture
def site(
    tmp_path: Path, object_store: DirectoryStore, artifacts: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    with serving_site(tmp_path / "home", object_store, artifacts, monkeypatch) as made:
        yield made


def load(site: Site, number: int) -> str:
    release = site.train(number)
    ensure_loaded(site.workspace, release, site.base, servers(site.workspace.settings))
    return release


def held(site: Site) -> set[str]:
    return set(site.servers[0].adapters)


def test_what_nothing_leads_to_is_retired_and_everything_else_stays(site: Site) -> None:
    stable, canary, before, stranger = (load(site, number) for number in (20, 30, 40, 50))
    site.serve(before)
    site.serve(stable)
    site.routes.now = RouteState(site.routes.now.stable, target(site.workspace.settings, canary), 10)
    keep_for_rollback(site.workspace, before, DAY)
    found = holders(site.workspace)
    assert found[site.name(stable)] == "stable, 90% of the users"
    assert found[site.name(canary)] == "canary, 10% of the users"
    assert found[site.name(before)].startswith("champion before, for a rollback until 20")
    said = retire_due(site.workspace)
    assert said == (f"{site.name(stranger)} was retired (nothing leads to it).",)
    assert held(site) == {site.name(one) for one in (stable, canary, before)}
    # Its last answers were waited for, and it is gone from the shelf as well.
    assert site.routes.waited == [stranger]
    assert not adapter_shelf(site.workspace.settings).path(site.name(stranger)).exists()
    assert retire_due(site.workspace) == ()
    (one,) = slots(site.workspace)
    assert (one.total, one.free) == (4, 1)


def test_the_champion_before_stays_for_the_window_and_leaves_after_it(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, stable = load(site, 20), load(site, 30)
    site.serve(before)
    site.serve(stable)
    # A promotion that was killed before it said how long: the window of the default policy, once.
    assert retire_due(site.workspace) == ()
    until = adapter_shelf(site.workspace.settings).kept()[site.name(before)][0]
    keep_for_rollback(site.workspace, before, 60.0)
    assert adapter_shelf(site.workspace.settings).kept()[site.name(before)][0] < until
    clock = time.time() + 61
    monkeypatch.setattr(time, "time", lambda: clock)
    assert retire_due(site.workspace) == (f"{site.name(before)} was retired (champion before, for a rollback).",)
    assert held(site) == {site.name(stable)}
    # Going back to it loads it first: users are not sent to a release that is not there.
    bring_back(site.workspace)
    assert held(site) == {site.name(stable), site.name(before)}
    site.workspace.__dict__.update(objects=None, artifacts=None, ledger=None)
    bring_back(site.workspace)


def test_a_rollback_to_what_cannot_be_loaded_is_refused_with_the_reason(site: Site) -> None:
    before = site.train(20)
    site.serve(before)
    site.serve(load(site, 30))
    site.servers[0].refuses.add(site.name(before))
    with pytest.raises(UnavailableError, match=r"was retired and cannot be loaded: .*no memory for it"):
        bring_back(site.workspace)


def test_a_release_with_users_or_in_evaluation_is_not_retired(site: Site) -> None:
    stable, asked = load(site, 20), load(site, 30)
    site.serve(stable)
    with pytest.raises(ConflictError, match="has 100% of the users"):
        retire(site.workspace, stable)
    with adapter_shelf(site.workspace.settings).in_use(site.name(asked)):
        assert holders(site.workspace)[site.name(asked)] == "asked by an evaluation"
        with pytest.raises(ConflictError, match="asked by an evaluation"):
            retire(site.workspace, asked)
        assert retire_due(site.workspace) == ()
    assert held(site) == {site.name(stable), site.name(asked)}
    assert retire(site.workspace, asked) == ()
    assert held(site) == {site.name(stable)}


def test_a_release_whose_last_answers_run_on_stays(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = load(site, 20)

    def busy(release: str, *, timeout_s: float) -> None:
        raise UnavailableError(f"1 request(s) still run on {release}.")

    monkeypatch.setattr(site.routes, "wait_idle", busy)
    assert "stays loaded for now: 1 request(s) still run" in retire_due(site.workspace)[0]
    assert held(site) == {site.name(stranger)}


def test_a_rollback_while_the_last_answers_are_waited_for_keeps_the_adapter(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, stable = load(site, 20), load(site, 30)
    site.serve(stable)
    back = RouteState(target(site.workspace.settings, before))
    monkeypatch.setattr(site.routes, "wait_idle", lambda *_, **__: setattr(site.routes, "now", back))
    with pytest.raises(ConflictError, match="got a route again"):
        retire(site.workspace, before)
    assert held(site) == {site.name(before), site.name(stable)}


def test_room_is_made_of_what_is_needed_least(site: Site) -> None:
    oldest, before, stable, stranger = (load(site, number) for number in (20, 30, 40, 50))
    for release in (oldest, before, stable):
        site.serve(release)
        keep_for_rollback(site.workspace, release, DAY)
    adapter, clients = site.train(60), servers(site.workspace.settings)
    site.servers[0].slots = 4
    assert [check.name for check in make_room(site.workspace, adapter, clients)] == ["slot", "memory"]
    assert held(site) == {site.name(one) for one in (oldest, before, stable)}
    ensure_loaded(site.workspace, adapter, site.base, clients)
    # It is there already: nothing has to go for it.
    make_room(site.workspace, adapter, clients)
    adapter_shelf(site.workspace.settings).keep(site.name(adapter), 9e9, "about to be rolled out")
    other = site.train(70)
    make_room(site.workspace, other, clients)
    assert held(site) == {site.name(one) for one in (before, stable, adapter)}
    site.servers[0].slots = 3
    with pytest.raises(ConflictError, match=r"There is no slot for release .* holds 3 of 3 adapters"):
        make_room(site.workspace, other, clients)
    assert held(site) == {site.name(one) for one in (before, stable, adapter)}
    assert site.name(stranger) not in held(site)


def test_a_machine_without_memory_is_not_filled(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemAvailable: 1000 kB\n")

    def measured(url: str, size: int) -> Memory:
        return server_memory(url, size, meminfo=tmp_path / "meminfo")

    monkeypatch.setattr(retiring, "server_memory", measured)
    with pytest.raises(UnavailableError, match="has 1 MB of memory free of 268 MB"):
        make_room(site.workspace, site.train(20), servers(site.workspace.settings))


def test_an_evaluation_takes_away_what_it_loaded_unless_somebody_needs_it(site: Site) -> None:
    adapter, (client,) = site.train(20), servers(site.workspace.settings)
    with (
        loaded(site.workspace, adapter, site.base, client),
        loaded(site.workspace, adapter, site.base, client) as name,
    ):
        assert held(site) == {name}
        assert retire_due(site.workspace) == ()
    assert held(site) == set()
    # An evaluation that was killed leaves it; the next one that uses it leaves it too, and the next tidying does not.
    ensure_loaded(site.workspace, adapter, site.base, (client,))
    with loaded(site.workspace, adapter, site.base, client):
        pass
    assert held(site) == {name}
    # Its release begins while it is evaluated: it stays.
    retire(site.workspace, adapter)
    with loaded(site.workspace, adapter, site.base, client):
        adapter_shelf(site.workspace.settings).keep(name, 9e9, "about to be rolled out")
    assert held(site) == {name}


def test_what_was_kept_for_its_rollout_is_so_until_it_is_promoted_or_rolled_back(site: Site) -> None:
    stable, canary = load(site, 20), load(site, 30)
    site.serve(stable)
    keep_for_release(site.workspace, canary)
    assert retire_due(site.workspace) == ()
    hand_over(site.workspace, to=canary, previous=stable, window_s=DAY)
    kept = adapter_shelf(site.workspace.settings).kept()
    assert list(kept) == [site.name(stable)]
    # Rolled back by hand, and its run was killed: nobody waits for it any more.
    keep_for_release(site.workspace, canary)
    site.routes.refused[canary] = "errors"
    assert retire_due(site.workspace) == (f"{site.name(canary)} was retired (about to be rolled out).",)
    assert held(site) == {site.name(stable)}
