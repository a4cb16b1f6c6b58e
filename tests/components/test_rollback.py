"""Going back: one call goes back once, also when the gateway is slow to confirm."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice.components import rollback
from sluice.components.workspace import Workspace
from sluice.infra.errors import ConflictError, IntegrityError, UnavailableError
from sluice.infra.settings import Settings
from sluice.provenance.canonical import digest_bytes
from sluice.serving.routes import RouteState, Target

BASE, A = (Target(digest_bytes(n), digest_bytes(n), n.decode(), ("127.0.0.1:1",)) for n in (b"base", b"a"))


class SlowRouter:
    """A gateway that decides, and does not confirm; or that cannot even write its decision."""

    def __init__(self, *, decides: bool) -> None:
        self.now, self.decides = RouteState(BASE, A, 25), decides

    def state(self) -> RouteState:
        return self.now

    def rollback(self, reason: str) -> RouteState:
        if self.decides:
            self.now = RouteState(BASE)
        raise UnavailableError("It did not confirm.")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    told: list[str] = []

    def tell(_: Workspace, *, gone: str, now: str, reason: str, actor: str) -> None:
        told.append(gone)

    monkeypatch.setattr(rollback, "tell_ledger", tell)
    monkeypatch.setattr(rollback, "follow_ledger", lambda _: [])
    return told


def test_an_unconfirmed_rollback_stands_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    monkeypatch.setattr(rollback, "router", lambda _: SlowRouter(decides=True))
    done = rollback.roll_back(Settings(home=tmp_path), "slow", promoted_too=True)
    assert (done["now"], done["was"], told) == ("base", "a", [A.release])
    assert "not confirmed" in done["notes"][0]


def test_a_rollback_that_was_not_decided_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    monkeypatch.setattr(rollback, "router", lambda _: SlowRouter(decides=False))
    with pytest.raises(UnavailableError):
        rollback.roll_back(Settings(home=tmp_path), "slow", promoted_too=True)
    assert told == []


def test_without_a_rollout_there_is_nothing_to_abort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowRouter(decides=True)
    slow.now = RouteState(BASE)
    monkeypatch.setattr(rollback, "router", lambda _: slow)
    with pytest.raises(ConflictError):
        rollback.roll_back(Settings(home=tmp_path), "none", promoted_too=False)


def test_what_was_promoted_meanwhile_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    class Promoted(SlowRouter):
        def rollback(self, reason: str) -> RouteState:
            self.now = RouteState(A)
            return self.now

        def confirm_traffic(self, state: RouteState, *, within_s: float) -> str:
            return "Seen."

    monkeypatch.setattr(rollback, "router", lambda _: Promoted(decides=True))
    with pytest.raises(ConflictError, match="promoted meanwhile"):
        rollback.roll_back(Settings(home=tmp_path), "late", promoted_too=False)
    assert told == []


def test_damaged_routes_are_mended_by_the_rollback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    class Damaged(SlowRouter):
        damaged = True

        def state(self) -> RouteState:
            if self.damaged:
                raise IntegrityError("The gateway's state is damaged.")
            return self.now

        def rollback(self, reason: str) -> RouteState:
            self.damaged, self.now = False, RouteState(BASE)
            return self.now

        def confirm_traffic(self, state: RouteState, *, within_s: float) -> str:
            return "Seen."

    monkeypatch.setattr(rollback, "router", lambda _: Damaged(decides=True))
    done = rollback.roll_back(Settings(home=tmp_path), "damaged", promoted_too=True)
    assert done["now"] == "base"
    assert "mended" in done["notes"][0]
