"""`sluice keys`: list, rotate, revoke, as a person and as a program see them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sluice.components import workspace as workspaces
from sluice.components.workspace import Workspace
from sluice.infra.errors import ConflictError, InputError, SluiceError
from sluice.infra.settings import Settings
from sluice.pipelines.cli import app
from sluice.provenance.artifacts import ArtifactStore
from tests.support.directory_store import DirectoryStore


@pytest.fixture(autouse=True)
def _installation(tmp_path: Path, object_store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_HOME", str(tmp_path / "home"))

    def opened(settings: Settings | None = None) -> Workspace:
        made = Workspace(settings or Settings(home=tmp_path / "home"))
        made.__dict__.update(objects=object_store, artifacts=ArtifactStore(object_store, tmp_path / "cache"))
        return made

    monkeypatch.setattr(workspaces, "open_workspace", opened)


def sluice(*arguments: str) -> Any:
    done = CliRunner().invoke(app, ["keys", *arguments, "--json"], catch_exceptions=True)
    if isinstance(done.exception, SluiceError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_list_rotate_revoke() -> None:
    first = sluice("list")["keys"]
    assert [(one["name"], one["signs_here"], one["revoked"]) for one in first] == [("own", True, None)]
    rotated = sluice("rotate", "--by", "ann")
    assert rotated["previous"] == first[0]["key"]
    listed = {one["key"]: one for one in sluice("list")["keys"]}
    assert listed[rotated["key"]]["signs_here"]
    assert listed[rotated["key"]]["introduced_by"] == first[0]["key"]
    revoked = sluice("revoke", first[0]["key"][:12], "--reason", "laptop stolen", "--by", "ann")
    assert revoked["entry"] == 2
    last = {one["key"]: one for one in sluice("list")["keys"]}
    assert last[first[0]["key"]]["revoked"] == {"time": revoked["time"], "by": "ann", "reason": "laptop stolen"}


def test_tables_for_people() -> None:
    sluice("rotate", "--by", "ann")
    # However wide the terminal is.
    shown = " ".join(CliRunner().invoke(app, ["keys", "list"]).output.split())
    assert "signs here" in shown
    assert "every key above may sign everything" in shown


def test_what_cannot_be_is_told() -> None:
    own = sluice("list")["keys"][0]["key"]
    with pytest.raises(InputError, match="KEY = 'ffff' names no key"):
        sluice("revoke", "ffff", "--reason", "x")
    with pytest.raises(ConflictError, match="signs here now") as raised:
        sluice("revoke", own, "--reason", "x")
    assert "sluice keys rotate" in raised.value.hint
