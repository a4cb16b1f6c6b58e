"""gate explain, gate check and suite: what they print, and with what they end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sluice.components import workspace as workspaces
from sluice.components.workspace import Workspace
from sluice.evaluation.suite import SUITES
from sluice.infra.errors import InputError
from sluice.pipelines.cli import app
from sluice.pipelines.cli.output import console
from tests.components.decided import gated, workspace_in
from tests.evaluation.scores import policy, scores
from tests.provenance.release_actions import A
from tests.support.directory_store import DirectoryStore

RULES = policy({"rule": "superiority", "metric": "token_f1"})
LOW, HIGH, FEW = scores(token_f1=[0.2] * 120), scores(token_f1=[0.6] * 120), scores(token_f1=[0.6] * 20)


@pytest.fixture(autouse=True)
def width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 110)


@pytest.fixture
def workspace(tmp_path: Path, object_store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    made = workspace_in(tmp_path / "home", object_store)
    monkeypatch.setattr(workspaces, "open_workspace", lambda *_: made)
    return made


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("old", "new", "word", "code"),
    [(LOW, HIGH, "PASS", 0), (HIGH, LOW, "FAIL", 10), (FEW, FEW, "INCONCLUSIVE", 11)],
)
def test_a_decision_is_told_in_words_and_by_the_exit_code(
    workspace: Workspace, old: Any, new: Any, word: str, code: int
) -> None:
    gated(workspace, A, old, new, RULES)
    ended = run("gate", "explain", "--exit-code")
    assert ended.exit_code == code
    assert ended.stdout.startswith(f"{word}  candidate ")
    assert "Token F1" in ended.stdout
    assert max(len(line) for line in ended.stdout.splitlines()) <= 110
    assert run("gate", "explain", A[:20]).exit_code == 0
    document = json.loads(run("gate", "explain", "--json").stdout)
    assert document["verdict"] == document["decision"]["verdict"] == word.lower()
    assert document["rows"][0]["metric"] == "Token F1"
    assert {note["about"] for note in document["notes"]} >= {"checks", "missing", "valid", "approval"}


def test_a_policy_is_checked_against_the_suite_that_names_it(tmp_path: Path) -> None:
    ended = run("gate", "check", str(SUITES / "demo" / "gate.yaml"))
    assert ended.exit_code == 0
    assert "gate.yaml: valid with the suite demo" in ended.stdout
    alone = tmp_path / "gate.yaml"
    alone.write_text("checks:\n  - {metric: token_fl, rule: superiority}\n")
    assert "valid by itself" in run("gate", "check", str(alone)).stdout
    (tmp_path / "suite.yaml").write_text("name: mine\ntitle: Mine\nmetrics: [token_f1]\npolicy: gate.yaml\n")
    for command in (("gate", "check", str(alone)), ("suite", "check", str(tmp_path))):
        wrong = run(*command)
        assert isinstance(wrong.exception, InputError)
        assert "policy.checks.0.metric (gate.yaml line 2) = 'token_fl': no such metric; did you mean token_f1?" in str(
            wrong.exception
        )
    (tmp_path / "suite.yaml").write_text("name: mine\ntitle: Mine\nmetrics: [token_f1]\npolicy: other.yaml\n")
    assert "valid by itself" in run("gate", "check", str(alone)).stdout
    assert isinstance(run("gate", "check", str(tmp_path / "absent.yaml")).exception, InputError)


def test_suites_are_listed_shown_and_checked() -> None:
    assert {row["suite"] for row in json.loads(run("suite", "list", "--json").stdout)} >= {"demo", "tiny"}
    assert "demo" in run("suite", "list").stdout
    shown = run("suite", "show", "demo")
    assert "the frozen holdout" in shown.stdout
    assert "Rajpurkar" in shown.stdout
    assert json.loads(run("suite", "show", "tiny", "--json").stdout)["policy"]["checks"]
    assert "✔ tiny" in run("suite", "check", "tiny").stdout
    assert isinstance(run("suite", "show", "nothing").exception, InputError)
