"""Which releases have a server of their own, when one is brought up, and when it goes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sluice.components import release_servers, retiring
from sluice.components.champion import name_base
from sluice.components.release_servers import bring_up_server, retire_server, server_parts
from sluice.components.served import adapter_shelf, release_name, server_book, target
from sluice.components.workspace import Workspace
from sluice.infra.errors import ConflictError, UnavailableError
from sluice.infra.ports import PortBook
from sluice.infra.services import ServiceSpec
from sluice.infra.settings import ServingSettings, Settings
from sluice.pipelines import collect
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import digest_bytes
from sluice.serving.routes import RouteState, Target
from sluice.serving.servers import GIB, part_name
from tests.provenance.release_actions import make_champion
from tests.support.directory_store import DirectoryStore

A, B = digest_bytes(b"a"), digest_bytes(b"b")


@dataclass
class Parts:
    """Stands for supervision: every part that is asked for runs at once, or none comes up."""

    home: Path = Path()
    specs: dict[str, ServiceSpec] = field(default_factory=dict)
    sick: bool = False

    @property
    def roster(self) -> Any:
        return SimpleNamespace(read=lambda: list(self.specs.values()))

    @contextmanager
    def exclusive(self, report: Any) -> Iterator[None]:
        yield

    def status(self) -> list[Any]:
        return [SimpleNamespace(name=name, pid=1) for name in self.specs]

    def up(self, specs: Sequence[ServiceSpec], report: Any, *, others: str) -> None:
        assert others == "keep"
        self.specs |= {spec.name: spec for spec in specs}
        if self.sick:
            raise UnavailableError("It did not start.")

    def remove(self, names: Collection[str], report: Any) -> None:
        for name in names:
            self.specs.pop(name, None)


@dataclass
class Routes:
    now: RouteState | None = None
    before: tuple[Target, ...] = ()
    busy: bool = False
    rolls_back: bool = False
    """Somebody rolls back at the moment in which a server is being retired."""

    def state(self) -> RouteState:
        if self.now is None:
            raise UnavailableError("no routes yet")
        return self.now

    def previous(self) -> tuple[Target, ...]:
        return self.before

    def refusal(self, release: str) -> str | None:
        return None

    def wait_idle(self, release: str, *, timeout_s: float) -> None:
        if self.busy:
            raise UnavailableError("1 request(s) still run")

    def relocate(self, place: Callable[[str], Target]) -> RouteState:
        if self.rolls_back and self.before:
            self.now, self.rolls_back = RouteState(self.before[-1]), False
        self.now = RouteState(place(self.state().stable.release))
        self.before = tuple(place(one.release) for one in self.before)
        return self.now


@dataclass
class Place:
    workspace: Workspace
    base: str
    parts: Parts
    routes: Routes

    @property
    def settings(self) -> Settings:
        return self.workspace.settings

    @property
    def book(self) -> dict[str, str]:
        return server_book(self.settings).read()

    def target(self, release: str) -> Target:
        return target(self.settings, release)

    def switch(self, **serving: Any) -> None:
        changed = self.settings.serving.model_copy(update=serving)
        object.__setattr__(self.workspace, "settings", self.settings.model_copy(update={"serving": changed}))


@pytest.fixture
def place(
    tmp_path: Path, object_store: DirectoryStore, artifacts: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> Place:
    (tmp_path / "python").touch()
    serving = ServingSettings(mode="merged", vllm_url="http://127.0.0.1:1")
    workspace = Workspace(Settings(home=tmp_path / "home", serve_python=tmp_path / "python", serving=serving))
    workspace.__dict__.update(objects=object_store, artifacts=artifacts)
    base = artifacts.put_files({"config.json": b"{}", "model.safetensors": b"base"}, "base-model").digest
    name_base(workspace, base)
    make_champion(workspace.ledger, base)
    parts, routes = Parts(), Routes()

    def merged(_: Workspace, adapter: str, *__: Any) -> Any:
        model = artifacts.put_files({"config.json": b"{}", "model.safetensors": adapter.encode()}, "model").digest
        return SimpleNamespace(output=SimpleNamespace(artifacts={"model": model}))

    monkeypatch.setattr(release_servers, "Supervisor", lambda _: parts)
    monkeypatch.setattr(release_servers, "local_router", lambda _: routes)
    monkeypatch.setattr(retiring, "router", lambda _: routes)
    monkeypatch.setattr(release_servers, "merge_release", merged)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100 * GIB))
    return Place(workspace, base, parts, routes)


def test_each_release_has_its_own_server_and_the_base_model_too(place: Place) -> None:
    assert not place.target(A).dedicated
    stable, canary = (bring_up_server(place.workspace, release) for release in (place.base, A))
    assert stable.dedicated
    assert canary == place.target(A)
    assert len({*stable.upstreams, *canary.upstreams}) == 2
    assert place.book[place.base] == place.base
    specs = place.parts.specs
    assert set(specs) == {part_name(place.base), part_name(A)}
    assert str(place.workspace.folder(place.book[A])) in specs[part_name(A)].command
    assert canary.upstreams[0] in str(specs[part_name(A)].url)
    # What is stored is kept, as long as a restart may read it.
    assert collect._servers(place.workspace).live.keys() == {place.base, place.book[A]}


def test_what_does_not_fit_is_not_started(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    bring_up_server(place.workspace, place.base)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2 * GIB))
    with pytest.raises(UnavailableError, match=r"needs 3\.0 GiB of memory, and 2\.0 GiB are available"):
        bring_up_server(place.workspace, A)
    assert set(place.book) == {place.base}
    assert set(place.parts.specs) == {part_name(place.base)}
    # One that runs already needs nothing more.
    bring_up_server(place.workspace, place.base)


def test_what_does_not_come_up_is_taken_away_again(place: Place) -> None:
    bring_up_server(place.workspace, place.base)
    place.parts.sick = True
    with pytest.raises(UnavailableError, match="did not start"):
        bring_up_server(place.workspace, A)
    assert (set(place.book), set(place.parts.specs)) == ({place.base}, {part_name(place.base)})
    assert set(PortBook(place.settings.home, {}).read()) == {part_name(place.base)}
    # One that had users before is not forgotten because it is slow to come back.
    with pytest.raises(UnavailableError):
        bring_up_server(place.workspace, place.base)
    assert set(place.book) == {place.base}


def test_up_brings_back_what_users_and_a_rollback_reach(place: Place) -> None:
    def brought_up() -> set[str]:
        held = retiring.holders(place.workspace) if place.routes.now else ()
        return {spec.name for spec in server_parts(place.workspace, held)}

    assert brought_up() == {part_name(place.base)}
    earlier, later = digest_bytes(b"champion before"), digest_bytes(b"in the rollback window no more")
    for release in (A, B, earlier, later):
        bring_up_server(place.workspace, release)
    place.routes.now = RouteState(place.target(A), place.target(B), 10)
    retiring.keep_for_rollback(place.workspace, earlier, 60.0)
    retiring.keep_for_rollback(place.workspace, later, -60.0)
    assert brought_up() == {part_name(release) for release in (place.base, A, B, earlier)}
    # A damaged book: what has users comes back all the same.
    server_book(place.settings).file.write_text("{")
    assert brought_up() == {part_name(release) for release in (place.base, A, B)}
    place.switch(mode="adapters")
    server_book(place.settings).forget(B)
    assert brought_up() == {part_name(release) for release in (place.base, A)}


def test_a_server_with_users_or_running_answers_is_not_stopped(place: Place) -> None:
    place.routes.now = RouteState(bring_up_server(place.workspace, A))
    with pytest.raises(ConflictError, match="still has a route"):
        retire_server(place.workspace, A)
    bring_up_server(place.workspace, B)
    place.routes.busy = True
    with pytest.raises(UnavailableError, match="still run"):
        retire_server(place.workspace, B)
    assert set(place.parts.specs) == {part_name(A), part_name(B)}
    place.routes.busy = False
    retire_server(place.workspace, B)
    retire_server(place.workspace, B)
    assert (set(place.book), set(place.parts.specs)) == ({A}, {part_name(A)})


def test_the_champion_before_stays_for_its_window_and_what_nobody_needs_goes(place: Place) -> None:
    workspace, base = place.workspace, place.base
    for release in (base, A, B):
        bring_up_server(workspace, release)
    make_champion(workspace.ledger, A)
    place.routes.now, place.routes.before = RouteState(place.target(A)), (place.target(base),)
    shelf = adapter_shelf(place.settings)
    with shelf.in_use(release_name(place.settings, B)):
        # B is being brought up by somebody else; of the base model nobody said yet how long it is kept.
        assert retiring.retire_due(workspace) == ()
    place.routes.busy = True
    assert "runs on for now" in retiring.retire_due(workspace)[0]
    place.routes.busy = False
    assert retiring.retire_due(workspace) == (f"The server of {release_name(place.settings, B)} was stopped.",)
    assert set(place.parts.specs) == {part_name(base), part_name(A)}
    shelf.keep(release_name(place.settings, base), 1.0, "champion before, long ago")
    retiring.retire_due(workspace)
    assert (set(place.parts.specs), set(place.book)) == ({part_name(A)}, {A})
    # A rollback leads to the shared server now.
    assert not place.routes.before[0].dedicated


def test_a_rollback_that_comes_between_keeps_its_server(place: Place) -> None:
    for release in (place.base, A):
        bring_up_server(place.workspace, release)
    place.routes.now, place.routes.before = RouteState(place.target(A)), (place.target(place.base),)
    place.routes.rolls_back = True
    with pytest.raises(ConflictError, match="got a route again"):
        retire_server(place.workspace, place.base)
    assert place.routes.now == RouteState(place.target(place.base))
    assert place.routes.now.stable.dedicated
    assert set(place.parts.specs) == {part_name(place.base), part_name(A)}


def test_a_failed_release_is_retired_with_its_server(place: Place) -> None:
    for release in (place.base, A):
        bring_up_server(place.workspace, release)
    place.routes.now = RouteState(place.target(place.base))
    retiring.retire(place.workspace, A)
    assert set(place.parts.specs) == {part_name(place.base)}


def test_a_server_that_was_being_stopped_when_somebody_was_killed_is_stopped(place: Place) -> None:
    for release in (place.base, A):
        bring_up_server(place.workspace, release)
    server_book(place.settings).forget(A)
    place.routes.now = RouteState(place.target(place.base))
    retiring.retire_due(place.workspace)
    assert set(place.parts.specs) == {part_name(place.base)}
    assert set(PortBook(place.settings.home, {}).read()) == {part_name(place.base)}


def test_a_damaged_book_stops_no_server_that_users_or_a_rollback_are_led_to(place: Place) -> None:
    for release in (place.base, A, B):
        bring_up_server(place.workspace, release)
    place.routes.now, place.routes.before = RouteState(place.target(A)), (place.target(place.base),)
    (place.settings.home / "servers.json").write_text("{")
    release_servers.stop_strangers(place.workspace)
    assert set(place.parts.specs) == {part_name(place.base), part_name(A)}
