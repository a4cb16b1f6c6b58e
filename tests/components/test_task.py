"""What every component shares: the record of how a task went, and a component that holds no logic."""

from __future__ import annotations

import ast
import json
import signal
from pathlib import Path

import pytest

import sluice.components
from sluice.components.task import Task, digest_of, parse_json, publish, read_tasks, task
from sluice.components.workspace import Workspace
from sluice.infra.errors import GateRefused, InputError
from sluice.infra.settings import Settings
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.attestation import Signer
from sluice.provenance.steps import StepOutput, StepRunner
from tests.support.directory_store import DirectoryStore


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "run"
    monkeypatch.setenv("SLUICE_RUN_DIR", str(folder))
    monkeypatch.setenv("SLUICE_TASK", "train")
    return folder


@pytest.fixture
def workspace(tmp_path: Path, object_store: DirectoryStore, artifacts: ArtifactStore) -> Workspace:
    made = Workspace(Settings(home=tmp_path / "home"))
    signer = Signer.load_or_create(tmp_path / "home" / "keys" / "signing.pem")
    made.__dict__.update(
        objects=object_store,
        artifacts=artifacts,
        signer=signer,
        steps=StepRunner(object_store, artifacts, signer, tmp_path / "work"),
    )
    return made


class Artifact:
    """What KFP hands a component: a path, a name and metadata."""

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.metadata = str(path), "dataset", dict[str, str]()


def test_a_finished_task_says_what_it_did(run_dir: Path, workspace: Workspace) -> None:
    with task("fallback", workspace) as running:
        running.say("all well")
    state = read_tasks(run_dir)["train"]
    assert (state.state, state.summary, state.error) == ("done", "all well", None)
    assert state.finished is not None


def test_a_failure_keeps_its_cause_way_out_and_code(run_dir: Path, workspace: Workspace) -> None:
    with pytest.raises(SystemExit) as ended, task("x", workspace):
        raise GateRefused("No approval.", hint="Ask for one.")
    state = read_tasks(run_dir)["train"]
    assert ended.value.code == state.exit_code == 5
    assert (state.state, state.error, state.hint) == ("failed", "No approval.", "Ask for one.")


def test_a_defect_is_named_and_raised(run_dir: Path, workspace: Workspace) -> None:
    with pytest.raises(ZeroDivisionError), task("x", workspace):
        _ = 1 / 0
    assert "ZeroDivisionError" in str(read_tasks(run_dir)["train"].error)


def test_sigterm_ends_a_task_with_a_word(run_dir: Path, workspace: Workspace) -> None:
    with pytest.raises(KeyboardInterrupt), task("x", workspace):
        signal.raise_signal(signal.SIGTERM)
    assert "cancelled" in str(read_tasks(run_dir)["train"].error)


def test_a_step_is_computed_once_and_told_as_a_hit(run_dir: Path, workspace: Workspace) -> None:
    calls = []

    def work(_: Path) -> StepOutput:
        calls.append(1)
        digest = workspace.artifacts.put_files({"a": b"1"}, "thing").digest
        return StepOutput({"thing": digest}, {"n": 1})

    def once(changed: int) -> bool | None:
        running = Task("train", workspace)
        running.step("s", rooms=("components.task",), parameters={"p": changed}, inputs={}, function=work)
        assert running.state.values["n"] == 1
        return running.state.hit

    assert [once(1), once(1), once(2)] == [False, True, False]
    assert len(calls) == 2


def test_kfp_artifacts_stand_for_digests(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path / "deep" / "dataset")
    publish(artifact, "sha256:" + "1" * 64, kind="dataset")
    assert digest_of(artifact) == "sha256:" + "1" * 64
    assert json.loads(Path(artifact.path).read_text())["kind"] == "dataset"
    with pytest.raises(InputError, match="no digest"):
        digest_of(Artifact(tmp_path / "other"))


def test_parameters_are_refused_in_words() -> None:
    assert parse_json("", "overrides") == {}
    with pytest.raises(InputError, match="overrides"):
        parse_json("[1]", "overrides")


def test_components_hold_no_logic() -> None:
    """A KFP component imports, opens its task and makes calls: no branch, no loop, nothing to test but the wiring."""
    folder = Path(sluice.components.__file__).parent
    found = 0
    for path in sorted(folder.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any(_name(d) == "component" for d in node.decorator_list):
                found += 1
                banned = [n for n in ast.walk(node) if isinstance(n, ast.If | ast.For | ast.While | ast.Try)]
                assert not banned, f"{path.name}: {node.name} branches or loops"
    assert found >= 17


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""
