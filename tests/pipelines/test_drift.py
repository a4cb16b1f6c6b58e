"""What is live against what should be: every difference is named, and what is away is a difference too."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from sluice.components.rollout_facts import store_of
from sluice.infra.errors import UnavailableError
from sluice.infra.settings import Settings, load_settings
from sluice.pipelines import drift
from sluice.pipelines.cli import app
from sluice.pipelines.drift import find_drift, repair_drift
from sluice.serving.routes import RouteState
from tests.serving.rollouts import CANARY, STABLE, holding


class Live:
    """The gateway, servers, ledger and aliases of a test; all agree at first."""

    def __init__(self) -> None:
        self.routes = RouteState(STABLE)
        self.lag: tuple[str, ...] = ()
        self.odd: tuple[str, ...] = ()
        self.names = {STABLE.served_name}
        self.champion: str | None = STABLE.release
        self.aliases: dict[str, str | None] = {"champion": STABLE.release}
        self.done: list[str] = []
        self.reconciles = True

    def state(self) -> RouteState:
        return self.routes

    def drift(self) -> tuple[str, ...]:
        return self.lag

    def reconcile(self) -> RouteState:
        self.done.append("reconcile")
        if self.reconciles:
            self.lag = ()
        return self.routes


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Live:
    made = Live()

    class Server:
        def __init__(self, url: str, timeout_s: float) -> None:
            pass

        def __enter__(self) -> Server:
            return self

        def __exit__(self, *exception: object) -> None:
            pass

        def models(self) -> list[Any]:
            return [SimpleNamespace(name=name) for name in made.names]

    def versions(registry: object, application: str) -> list[Any]:
        return [
            SimpleNamespace(
                digest=release, aliases=[alias for alias, digest in made.aliases.items() if digest == release]
            )
            for release in (STABLE.release, CANARY.release)
        ]

    def serve(workspace: object, base: str) -> None:
        made.done.append("serve")
        made.odd = ()
        made.names = {one.served_name for one in made.routes.targets()}

    def follow(workspace: object) -> list[str]:
        made.aliases = {"champion": made.champion}
        return ["Alias champion lagged behind the ledger."]

    monkeypatch.setenv("SLUICE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SLUICE_MLFLOW__TRACKING_URI", "http://mlflow.test")
    monkeypatch.setattr(drift, "router", lambda _: made)
    monkeypatch.setattr(drift, "VllmClient", Server)
    monkeypatch.setattr(drift, "Workspace", lambda _: SimpleNamespace(ledger=None))
    monkeypatch.setattr(drift, "read_state", lambda _: SimpleNamespace(champion=lambda: made.champion))
    monkeypatch.setattr(drift, "candidate", lambda _: None)
    monkeypatch.setattr(drift, "challenger", lambda _: None)
    monkeypatch.setattr(drift, "odd_adapters", lambda _: made.odd)
    monkeypatch.setattr(drift, "base_digest", lambda _: STABLE.release)
    monkeypatch.setattr(drift, "serve_champion", serve)
    monkeypatch.setattr(drift, "follow_ledger", follow)
    monkeypatch.setattr("sluice.registry.versions.list_versions", versions)
    return made


def test_what_agrees_is_no_difference(live: Live) -> None:
    assert find_drift(load_settings()) == ()
    ended = CliRunner().invoke(app, ["release", "drift"])
    assert (ended.exit_code, ended.stdout) == (0, "Everything is as it should be.\n")


def test_every_part_that_differs_is_named_and_repaired(live: Live) -> None:
    live.lag = ("The gateway's routes are of revision 3; 4 was decided.",)
    live.names = set()
    live.odd = ("A server holds what nothing leads to.",)
    live.aliases = {"champion": CANARY.release}
    ended = CliRunner().invoke(app, ["release", "drift", "--json"])
    assert ended.exit_code == 6
    found = json.loads(ended.stdout)["differs"]
    assert [one["part"] for one in found] == ["gateway", "server", "server", "aliases"]
    assert f"does not hold {STABLE.served_name}" in found[1]["sentence"]
    repaired = CliRunner().invoke(app, ["release", "drift", "--repair", "--json"])
    assert repaired.exit_code == 0
    assert len(json.loads(repaired.stdout)["repaired"]) == 4
    assert live.done == ["reconcile", "serve"]  # users first


def test_what_could_not_be_repaired_stays_a_difference(live: Live) -> None:
    live.lag, live.reconciles = ("It does not follow.",), False
    assert repair_drift(load_settings()) == ("Alias champion lagged behind the ledger.",)
    assert CliRunner().invoke(app, ["release", "drift", "--repair"]).exit_code == 6


def test_another_champion_is_a_difference_but_not_while_a_rollout_moves(live: Live) -> None:
    live.champion, live.aliases = CANARY.release, {"champion": CANARY.release}
    settings: Settings = load_settings()
    (found,) = find_drift(settings)
    assert (found.part, STABLE.served_name in found.sentence) == ("champion", True)
    store_of(settings).save(holding())
    assert find_drift(settings) == ()


def test_what_does_not_answer_is_a_difference(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> Any:
        raise UnavailableError("It is away.")

    monkeypatch.setattr(drift, "read_state", away)
    live.names = set()
    assert [one.part for one in find_drift(load_settings())] == ["server", "champion"]
    monkeypatch.setattr(live, "drift", away)
    assert [one.part for one in find_drift(load_settings())] == ["gateway", "server", "champion"]
