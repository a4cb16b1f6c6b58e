"""Every command either only reads, or asks for a role before it does anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from sluice.infra import audit
from sluice.infra.access import VERBS
from sluice.infra.errors import AccessRefused, InputError
from sluice.infra.secrets import refuse_secrets
from sluice.infra.settings import load_settings
from sluice.pipelines.cli import app

READS = {
    "approvals": "asks when it takes over what somebody decided in MLflow (tests/pipelines/test_approvals.py)",
    "audit": "",
    "compile": "writes files for people to apply",
    "config show": "",
    "diff": "",
    "doctor": "",
    "gc": "plans; deletes only with --delete, which asks: tested below",
    "gate check": "",
    "gate explain": "",
    "history": "",
    "judge show": "",
    "keys list": "",
    "ledger": "",
    "lineage": "",
    "logs": "",
    "preflight": "measures; starts processes of its own and ends them",
    "recipe check": "",
    "recipe list": "",
    "recipe show": "",
    "release drift": "repairs only with --repair, which asks: tested below",
    "release history": "",
    "release metrics": "",
    "release status": "",
    "release watch": "",
    "runs": "",
    "sites list": "",
    "status": "",
    "suite check": "",
    "suite list": "",
    "suite show": "",
    "verify": "",
    "why": "",
}
ASKS = {
    "approvals serve": [],
    "approve": ["1"],
    "cancel": ["last"],
    "demo": ["--plan", "tiny"],
    "down": [],
    "export": ["1", "out.tar"],
    "import": ["in.tar"],
    "judge calibrate": [],
    "keys revoke": ["abc", "--reason", "lost"],
    "keys rotate": [],
    "reject": ["1"],
    "release abort": ["--reason", "slow"],
    "release pause": [],
    "release promote": ["--reason", "looked at it"],
    "release resume": [],
    "reproduce": ["1"],
    "rollback": [],
    "run": ["retrain"],
    "sites publish": [],
    "sites trust": ["other", "other.pub"],
    "sweep": ["tiny", "-s", "lora.rank=2,4"],
    "sync": ["--from", "a", "--to", "b"],
    "train": ["tiny", "--dataset", f"sha256:{'0' * 64}", "--base", f"sha256:{'1' * 64}"],
    "up": [],
}
"""With what it is called. A new command belongs in one of the two; in doubt, here, and calls `require` first."""


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    for name, command in group.commands.items():
        if getattr(command, "invoke_without_command", False):
            yield " ".join((*path, name))
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLUICE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_every_command_is_known_to_read_or_to_ask() -> None:
    found = set(commands(typer.main.get_command(app)))
    assert found == set(READS) | set(ASKS)
    assert set(ASKS) <= set(VERBS)


@pytest.mark.parametrize("command", sorted(ASKS))
def test_a_viewer_is_refused_before_anything_is_done(command: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_ACCESS__DEFAULT", '["viewer"]')
    ended = CliRunner().invoke(app, [*command.split(), *ASKS[command]])
    assert isinstance(ended.exception, AccessRefused), ended.exception
    assert VERBS[command].role in str(ended.exception)
    (line,) = audit.read(home)
    assert (line.verb, line.outcome, line.role) == (command, "refused", VERBS[command].role)
    # Nothing but the line was written.
    assert [path.name for path in home.iterdir()] == ["audit.jsonl"]


def test_an_approver_decides_in_their_own_name_only_and_forces_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_ACCESS__DEFAULT", '["approver"]')
    for arguments, verb in ((["--by", "ann"], "decide as another"), (["--force", "because"], "override")):
        ended = CliRunner().invoke(app, ["approve", "1", *arguments])
        assert isinstance(ended.exception, AccessRefused)
        assert [(line.verb, line.outcome) for line in audit.read(home)][-2:] == [
            ("approve", "allowed"),
            (verb, "refused"),
        ]


def test_audit_shows_what_was_asked_also_without_a_store(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CliRunner().invoke(app, ["rollback", "--reason", "slow answers"])
    shown = CliRunner().invoke(app, ["audit", "--json"])
    (line,) = json.loads(shown.stdout)
    assert (line["verb"], line["subject"], line["outcome"]) == ("rollback", "slow answers", "allowed")
    assert "slow answers" in CliRunner().invoke(app, ["audit"]).stdout


def test_a_secret_as_a_parameter_is_refused_and_not_repeated(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_OBJECT_STORE__SECRET_KEY", "very-secret-key")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "open-sesame-1")
    for text in (
        "overrides=very-secret-key",
        'overrides={"a": "xopen-sesame-1x"}',
        "recipe=-----BEGIN PRIVATE KEY-----MC4C",
        "very-secret-key=1",
    ):
        with pytest.raises(InputError, match="holds a secret") as caught:
            refuse_secrets(load_settings(), [text])
        assert "very-secret-key" not in str(caught.value)
        assert "sesame" not in str(caught.value)
        assert isinstance(CliRunner().invoke(app, ["run", "retrain", "-p", text]).exception, InputError)
    refuse_secrets(load_settings(), ["recipe=demo"])


def test_only_a_collection_that_deletes_asks(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_ACCESS__DEFAULT", '["operator"]')
    ended = CliRunner().invoke(app, ["gc", "--delete", "sha256:" + "0" * 64])
    assert isinstance(ended.exception, AccessRefused)
    assert [(line.verb, line.outcome) for line in audit.read(home)] == [("gc delete", "refused")]


def test_only_a_repair_of_drift_asks(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_ACCESS__DEFAULT", '["approver"]')
    ended = CliRunner().invoke(app, ["release", "drift", "--repair"])
    assert isinstance(ended.exception, AccessRefused)
    assert [(line.verb, line.outcome) for line in audit.read(home)] == [("release drift repair", "refused")]


def test_bytes_that_are_no_text_stop_no_audit_line(tmp_path: Path) -> None:
    audit.append(tmp_path, audit.AuditLine("somebody", "approve", "version \udcff", "refused"))
    (line,) = audit.read(tmp_path)
    assert line.subject == "version ?"
