"""The benchmark step: what its key holds, what it does without benchmarks, and that what was lost is asked again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sluice.components import served
from sluice.components.benchmark import benchmark_step
from sluice.components.served import router, target
from sluice.components.task import Task
from sluice.components.workspace import Workspace
from sluice.evaluation import benchmarks
from sluice.evaluation.benchmarks import SAMPLES_FILE, Sample
from sluice.evaluation.scores import read_scores
from sluice.infra.errors import InputError, SluiceError
from sluice.infra.settings import Settings
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import digest_bytes
from sluice.provenance.keys import Signer
from sluice.provenance.steps import StepRunner
from sluice.serving.vllm import VllmClient
from tests.support.directory_store import DirectoryStore

RELEASE = digest_bytes(b"the release")
SUITE = """\
name: own
title: Own
metrics: [answer_rate]
policy:
  minimum_n: 4
  error_budget: 0.1
  checks: [{metric: answer_rate, rule: non_inferiority, margin: 0.5}]
"""


@pytest.fixture
def workspace(tmp_path: Path, object_store: DirectoryStore, artifacts: ArtifactStore) -> Workspace:
    serving = {f"{name}_url": f"http://127.0.0.1:{port}" for port, name in enumerate(("vllm", "gateway"), 1)}
    made = Workspace(Settings(home=tmp_path / "home", serving={**serving, "gateway_admin_url": "http://127.0.0.1:3"}))
    signer = Signer.load_or_create(tmp_path / "keys" / "signing.pem")
    made.__dict__.update(
        objects=object_store,
        artifacts=artifacts,
        signer=signer,
        steps=StepRunner(object_store, artifacts, signer, tmp_path / "work"),
    )
    router(made.settings).seed(target(made.settings, RELEASE))
    return made


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """How often the tasks were run; each item in `lost` of a run has a cause. The server is not asked."""
    made: list[Any] = []
    lost = [{"i0", "i1"}, {"i0", "i1"}, set[str]()]

    def run_benchmarks(tasks: Any, endpoint: Any, **more: Any) -> list[Sample]:
        made.append((endpoint, more))
        gone = lost[len(made) - 1]
        return [
            Sample(f"{task.name}/{one}", task.name, "?", "a", "a", "timeout" if one in gone else 1.0)
            for task in tasks
            for one in ("i0", "i1", "i2", "i3")
        ]

    monkeypatch.setattr(benchmarks, "run_benchmarks", run_benchmarks)
    monkeypatch.setattr(VllmClient, "models", lambda _: [])
    return made


def suite(folder: Path, benchmarks: str = "", task: str = "") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "suite.yaml").write_text(SUITE + benchmarks)
    if task:
        (folder / "tasks").mkdir(exist_ok=True)
        (folder / "tasks" / "own.yaml").write_text(task)
        (folder / "tasks" / "own.jsonl").write_text('{"question": "?", "choices": ["a", "b"], "answer": 0}\n')
    return str(folder)


OWN = """\
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: own.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_a_suite_without_benchmarks_gives_no_columns(workspace: Workspace, tmp_path: Path, runs: list[Any]) -> None:
    running = Task("benchmark", workspace)
    digest = benchmark_step(running, release=RELEASE, base=RELEASE, suite=suite(tmp_path / "s"))
    assert read_scores(workspace.folder(digest)).columns == {}
    assert (runs, running.state.summary) == ([], "the suite has no benchmarks")


def test_what_was_lost_is_asked_again_and_then_found_again(
    workspace: Workspace, tmp_path: Path, runs: list[Any]
) -> None:
    base = workspace.artifacts.put_files({"tokenizer.json": b"{}"}, "base-model", {}).digest
    chosen = suite(tmp_path / "s", "benchmarks: {tasks: [own], limit: 9, timeout_s: 7}\n", OWN)

    def measure() -> tuple[str, str]:
        running = Task("benchmark", workspace)
        return benchmark_step(running, release=base, base=base, suite=chosen), running.state.summary

    first, said = measure()
    assert said == "own 2 of 4 right, 2 lost"
    assert read_scores(workspace.folder(first)).columns["benchmark.own"].causes == dict.fromkeys(
        ("own/i0", "own/i1"), "timeout"
    )
    endpoint, more = runs[0]
    assert (endpoint.patience.timeout_s, more["limit"], endpoint.concurrency) == (7, 9, 8)
    assert (more["base"] / "tokenizer.json").is_file()
    assert endpoint.model == served.release_name(workspace.settings, base)
    # The same is asked again while too much is lost, and never after.
    assert measure()[1] == "own 2 of 4 right, 2 lost"
    whole, said = measure()
    assert said == "own 4 of 4 right"
    assert len((workspace.folder(whole) / SAMPLES_FILE).read_text().splitlines()) == 4
    assert measure()[0] == whole
    assert len(runs) == 3


def test_the_key_holds_the_tasks_and_how_they_are_asked(workspace: Workspace, tmp_path: Path, runs: list[Any]) -> None:
    def key(name: str, section: str, task: str = OWN) -> str:
        running = Task("benchmark", workspace)
        try:
            benchmark_step(running, release=RELEASE, base=RELEASE, suite=suite(tmp_path / name, section, task))
        except SluiceError:
            pass
        return str(running.state.steps[0]["digest"])

    one = key("a", "benchmarks: {tasks: [own]}\n")
    # The policy around it may change: the answers of the champion are found again.
    (tmp_path / "b").mkdir()
    assert key("b", "benchmarks: {tasks: [own]}\nspeed: {requests: 8}\n") == one
    others = {
        key("c", "benchmarks: {tasks: [own], limit: 2}\n"),
        key("d", "benchmarks: {tasks: [own, general-short]}\n"),
        key("e", "benchmarks: {tasks: [own]}\n", OWN.replace("{{question}}", "Q: {{question}}")),
    }
    assert len(others | {one}) == 4


def test_a_suite_that_names_a_task_that_is_not_there_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no benchmark task 'gone'"):
        benchmark_step(
            Task("benchmark", workspace),
            release=RELEASE,
            base=RELEASE,
            suite=suite(tmp_path, "benchmarks: {tasks: [gone]}\n"),
        )
