"""A release comes up on every server and is shown to be what was trained, or it ends before any user."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sluice.components import bring_up as module
from sluice.components import retiring
from sluice.components.bring_up import bring_up, kept_probes
from sluice.components.served import adapter_shelf, server_book
from sluice.components.workspace import Workspace
from sluice.infra.errors import ConflictError, GateRefused, IntegrityError, UnavailableError
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import digest_bytes
from sluice.provenance.releases import read_state
from sluice.serving.probes import ProbeReport
from sluice.serving.routes import RouteState, Target
from sluice.training import parity_reference
from tests.components.serving_site import POLICY, Site, serving_site
from tests.provenance.release_actions import BASE
from tests.serving.vllm_server import PLAIN, Said, VllmServer, vllm_server
from tests.support.directory_store import DirectoryStore


@pytest.fixture
def site(
    tmp_path: Path, object_store: DirectoryStore, artifacts: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    with serving_site(tmp_path / "home", object_store, artifacts, monkeypatch, replicas=2) as made:
        yield made


def brought_up(site: Site, adapter: str) -> ProbeReport:
    champion = site.routes.state().stable.release
    return bring_up(site.task, adapter=adapter, champion=champion, base=site.base, policy=POLICY)


def held(site: Site) -> list[list[str]]:
    return [sorted(server.adapters) for server in site.servers]


def ended(site: Site, adapter: str) -> bool:
    """Unloaded everywhere, gone from the shelf, and marked so that it cannot come back by accident."""
    shelf = adapter_shelf(site.workspace.settings)
    assert held(site) == [[], []]
    assert not shelf.path(site.name(adapter)).exists()
    assert shelf.kept() == {}
    return read_state(site.workspace.ledger).failed(adapter)


def test_a_release_is_brought_up_on_every_server_and_reported(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = site.train(40)
    report = brought_up(site, adapter)
    name = site.name(adapter)
    assert held(site) == [[name], [name]]
    counts = {one: [check.name for check in report.checks].count(one) for one in {c.name for c in report.checks}}
    each = ("slot", "memory", "listed", "answers", "finite", "parity", "base unchanged", "warm-up")
    assert counts == {**dict.fromkeys(each, 2), "effect": 1, "replicas agree": 1}
    assert kept_probes(site.workspace, adapter) == report
    assert site.task.state.values["probes"]["passed"] is True
    # Between its probes and its first users nobody takes it away.
    assert "about to be rolled out" in adapter_shelf(site.workspace.settings).kept()[name][1]
    # A run that comes again finds the reference, and everything in its place.
    monkeypatch.setattr(parity_reference, "make_reference", None)
    assert brought_up(site, adapter).passed


def test_a_reference_belongs_to_its_adapter(site: Site) -> None:
    first, second = site.train(40), site.train(50)
    brought_up(site, first)
    assert brought_up(site, second).passed


def other_adapter(_: str, folder: Path | None) -> Said:
    return ((60, -0.1), (61, -0.2)) if folder else PLAIN


def only_the_base(_: str, __: Path | None) -> Said:
    return PLAIN


@pytest.mark.parametrize(
    ("servers", "wrong", "sentence"),
    [
        ((1,), other_adapter, "It does not answer as the training library does"),
        ((0, 1), only_the_base, "The adapter does not change the answers"),
    ],
)
def test_a_wrong_adapter_under_the_right_name_ends_before_any_user(
    site: Site, servers: Sequence[int], wrong: Any, sentence: str
) -> None:
    adapter = site.train(40)
    for number in servers:
        site.servers[number].says = wrong
    with pytest.raises(GateRefused, match="failed its probes before any user") as raised:
        brought_up(site, adapter)
    assert sentence in str(raised.value)
    assert ended(site, adapter)
    report = kept_probes(site.workspace, adapter)
    assert report is not None
    assert not report.passed
    assert not site.task.state.values["probes"]["passed"]


def test_another_chat_template_in_the_server_is_found(site: Site) -> None:
    adapter = site.train(40)
    for server in site.servers:
        server.prompt = (1, 2, 3, 4)
    with pytest.raises(GateRefused, match="another chat template, or another tokenizer"):
        brought_up(site, adapter)
    assert ended(site, adapter)


def test_a_canary_at_weight_0_that_fails_when_it_comes_again_leaves_the_routes(site: Site) -> None:
    adapter = site.train(40)
    brought_up(site, adapter)
    stable = site.routes.state().stable
    site.routes.now = RouteState(stable, stable.__class__(adapter, adapter, site.name(adapter), stable.upstreams), 0)
    for server in site.servers:
        server.says = only_the_base
    with pytest.raises(GateRefused):
        brought_up(site, adapter)
    assert site.routes.state() == RouteState(stable)
    assert ended(site, adapter)


def test_a_replica_that_does_not_load_it_ends_the_run_and_not_the_release(site: Site) -> None:
    adapter = site.train(40)
    site.servers[1].refuses.add(site.name(adapter))
    with pytest.raises(UnavailableError, match="refused the adapter"):
        brought_up(site, adapter)
    assert not ended(site, adapter)
    site.servers[1].refuses.clear()
    assert brought_up(site, adapter).passed


def test_an_adapter_of_another_base_or_shape_is_refused(site: Site) -> None:
    other = site.train(40, base=digest_bytes(b"another base"))
    with pytest.raises(IntegrityError, match=r"was trained for the base model sha256:.*servers here hold sha256:"):
        brought_up(site, other)
    wide = site.train(41, rank=3)
    with pytest.raises(IntegrityError, match=r"has shape \(3, 4\); its rank and the base model give \(2, 4\)"):
        brought_up(site, wide)
    assert not ended(site, other)
    with pytest.raises(GateRefused, match="base model alone is served always"):
        brought_up(site, site.base)
    assert not read_state(site.workspace.ledger).failed(site.base)


def test_without_a_decision_nothing_is_loaded(site: Site) -> None:
    adapter = site.train(40, decided=False)
    with pytest.raises(GateRefused, match="decision about it does not exist"):
        brought_up(site, adapter)
    assert held(site) == [[], []]


def test_another_folder_under_the_name_is_no_release(site: Site, tmp_path: Path) -> None:
    adapter = site.train(40)
    site.servers[0].adapters[site.name(adapter)] = tmp_path
    with pytest.raises(ConflictError, match=r"holds .* already, not from"):
        brought_up(site, adapter)
    assert not read_state(site.workspace.ledger).failed(adapter)


def test_a_champion_that_a_server_lost_is_mended_and_not_blamed_on_the_release(site: Site) -> None:
    champion, adapter = site.train(30), site.train(40)
    site.serve(champion)
    assert brought_up(site, adapter).passed
    assert held(site) == [sorted((site.name(champion), site.name(adapter)))] * 2


def test_a_full_server_is_a_refusal_that_names_the_holders(site: Site) -> None:
    champions = [site.train(number) for number in (20, 30)]
    for champion in champions:
        brought_up(site, champion)
        site.serve(champion)
    for server in site.servers:
        server.slots = 2
    adapter = site.train(40)
    # The champion before is dropped by nobody: it was brought up a moment ago.
    with pytest.raises(ConflictError, match=r"holds 2 of 2 adapters: .*stable, 100% of the users") as raised:
        brought_up(site, adapter)
    assert "SLUICE_SERVING__MAX_LORAS" in str(raised.value)
    assert held(site) == [sorted(map(site.name, champions))] * 2
    assert not read_state(site.workspace.ledger).failed(adapter)


def test_a_merged_model_is_probed_at_its_own_server_and_stopped_when_it_fails(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = site.train(40)
    name, settings = site.name(adapter), site.workspace.settings
    site.workspace.__dict__["settings"] = settings.model_copy(
        update={"serving": settings.serving.model_copy(update={"mode": "merged"})}
    )
    stopped: list[str] = []

    def started(workspace: Workspace, release: str, _: object) -> Target:
        server_book(settings).remember(release, BASE)
        return Target(release, release, name, (own.url.removeprefix("http://"),), dedicated=True)

    monkeypatch.setattr(module, "bring_up_server", started)
    monkeypatch.setattr(retiring, "retire_server", lambda _, release, **__: stopped.append(release))
    with vllm_server(VllmServer(name, lambda *_: ((40, -4.0), (41, -0.2)))) as own:
        report = brought_up(site, adapter)
        assert {check.server for check in report.checks if check.name == "parity"} == {own.url}
        assert held(site) == [[], []]
        own.says = lambda *_: ((60, -0.1), (61, -0.2))
        with pytest.raises(GateRefused, match="no near tie"):
            brought_up(site, adapter)
    assert stopped == [adapter]
    assert ended(site, adapter)
