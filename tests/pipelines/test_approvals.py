"""What people decide in MLflow is taken over where that is allowed, by somebody who may, and called what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sluice.components.workspace import Workspace
from sluice.infra import audit
from sluice.infra.settings import AccessSettings, Settings
from sluice.pipelines import approvals
from sluice.provenance.canonical import digest_bytes
from sluice.registry.approvals import UiApproval
from sluice.registry.versions import Version


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """An MLflow with one version that `Anna` approved; what was recorded of it: approver and comment."""
    version = Version("assistant", 2, digest_bytes(b"a"), (), {}, "http://mlflow")
    found: list[tuple[str, str]] = []

    def record(_: Any, version: Version, state: Any, approver: str, comment: str, start: Any) -> approvals.Decided:
        found.append((approver, comment))
        return approvals.Decided(version, state, approver, False)

    monkeypatch.setattr(approvals, "registry_of", lambda _: None)
    monkeypatch.setattr(approvals, "pending_approvals", lambda *_: [version])
    monkeypatch.setattr(approvals, "read_ui_approval", lambda *_: UiApproval("approved", "Anna", "fine", False))
    monkeypatch.setattr(approvals, "record", record)
    return found


def workspace(home: Path, profile: Any = "local", **access: Any) -> Workspace:
    return Workspace(Settings(home=home, profile=profile, access=AccessSettings(**access)))


def test_a_name_given_in_mlflow_is_called_not_authenticated(tmp_path: Path, recorded: list[tuple[str, str]]) -> None:
    taken, problems = approvals.take_over(workspace(tmp_path))
    assert (len(taken), problems) == (1, [])
    assert recorded == [("Anna", f"fine ({approvals.NOT_AUTHENTICATED})")]
    (line,) = audit.read(tmp_path)
    assert (line.verb, line.subject, line.outcome) == ("take over from MLflow", "version 2 approved", "allowed")


def test_where_mlflow_is_not_asked_nothing_is_taken_over(tmp_path: Path, recorded: list[tuple[str, str]]) -> None:
    # On a cluster it is off unless somebody turns it on.
    for closed in (workspace(tmp_path, approve_in_mlflow=False), workspace(tmp_path, profile="cluster")):
        taken, problems = approvals.take_over(closed)
        assert taken == []
        assert "counts for nothing here" in problems[0]
    assert recorded == []


def test_who_is_no_approver_takes_nothing_over(tmp_path: Path, recorded: list[tuple[str, str]]) -> None:
    taken, problems = approvals.take_over(workspace(tmp_path, default=["operator"]))
    assert taken == []
    assert "needs the role approver" in problems[0]
    assert recorded == []
