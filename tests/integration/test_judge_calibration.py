"""Calibrating the judge of a suite, as a step and as a command: paid once, found again, and told in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.scripted_judge import Reply, ScriptedJudge, scripted_judge
from sluice.components.calibrate import calibrate_step, known_calibration, read_calibration
from sluice.components.judge import demoted_metrics, judge_of, suite_judge
from sluice.components.task import Task
from sluice.evaluation.cache import open_cache
from sluice.evaluation.items import Item
from sluice.evaluation.suite import find_suite
from sluice.infra.errors import InputError
from sluice.infra.settings import JudgeSettings
from sluice.pipelines.cli import app
from tests.components.scripted_releases import SUITE, Place, place

__all__ = ["place"]

pytestmark = pytest.mark.integration

JUDGED = """
judged:
  metrics: [judged.faithfulness, judged.context_recall]
  max_tokens: 256
  repeats: 2
  calibration: labels.jsonl
"""
FLOOR = "  judge: {minimum_n: 20}\n"


def labels(count: int) -> str:
    rows = []
    for number in range(count):
        passage = f"The fee of permit {number // 2} is {number} euros."
        rows.append(
            {
                "id": f"l{number}",
                "question": f"What is the fee of permit {number // 2}?",
                "contexts": [passage],
                "answer": passage if number % 2 else "Nobody in the town knows it all.",
                "labels": {"judged.faithfulness": number % 2},
                "labelled_by": "two people of the town",
            }
        )
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def judged(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Place, ScriptedJudge, list[Reply]]]:
    """A place whose suite has a judge, that judge, and what it says instead of its own while the list holds one."""
    place.suite = place.write(SUITE + FLOOR + JUDGED)
    (place.workspace.settings.home / "labels.jsonl").write_text(labels(24))
    instead: list[Reply] = []
    with scripted_judge(lambda *_: instead[0] if instead else Reply()) as server:
        settings = place.workspace.settings.model_copy(
            update={"judge": JudgeSettings(url=server.url, model="judge", model_digest="revision 1")}
        )
        object.__setattr__(place.workspace, "settings", settings)
        monkeypatch.setattr("sluice.pipelines.judging.open_workspace", lambda *_: place.workspace)
        monkeypatch.setattr("sluice.infra.settings.load_settings", lambda *_: settings)
        monkeypatch.setenv("COLUMNS", "200")
        yield place, server, instead


def test_a_calibration_is_paid_once(judged: Any) -> None:
    at, server, _ = judged
    chosen = find_suite(at.suite)
    assert known_calibration(Task("calibrate", at.workspace), suite=at.suite) == ""
    running = Task("calibrate", at.workspace)
    digest = calibrate_step(running, suite=at.suite)
    assert running.state.summary == "judge: 1 of 2 metrics may gate"
    asked = len(server.requests)
    again = Task("calibrate", at.workspace)
    assert calibrate_step(again, suite=at.suite) == digest
    assert (again.state.hit, len(server.requests)) == (True, asked)
    assert known_calibration(Task("calibrate", at.workspace), suite=at.suite) == digest
    found = read_calibration(at.workspace, digest)
    assert chosen.judged
    assert found.judge == judge_of(at.workspace, chosen.judged).digest
    assert at.workspace.artifacts.manifest(digest).kind == "calibration"
    assert demoted_metrics(at.workspace, chosen, digest) == {
        "judged.context_recall": "no labelled items for this metric"
    }
    # Another judge, and other labels, are calibrated anew; a calibration of another judge makes nothing gate.
    (at.workspace.settings.home / "labels.jsonl").write_text(labels(22))
    assert known_calibration(Task("calibrate", at.workspace), suite=at.suite) == ""
    (at.workspace.settings.home / "labels.jsonl").write_text(labels(24))
    at.suite = at.write(SUITE + FLOOR + JUDGED + "  seed: 3\n")
    assert known_calibration(Task("calibrate", at.workspace), suite=at.suite) == ""
    assert set(demoted_metrics(at.workspace, find_suite(at.suite), digest).values()) == {
        "the calibration is of another judge (judge)"
    }


def test_a_suite_without_judge_or_labels(judged: Any) -> None:
    at, server, _ = judged
    running = Task("calibrate", at.workspace)
    at.suite = at.write(SUITE)
    assert calibrate_step(running, suite=at.suite) == ""
    assert running.state.summary == "the suite has no judge"
    with open_cache(at.workspace.evaluation_cache) as cache:
        assert suite_judge(at.workspace, find_suite(at.suite), cache) is None
    at.suite = at.write(SUITE + JUDGED.replace("  calibration: labels.jsonl\n", ""))
    assert calibrate_step(running, suite=at.suite) == ""
    assert "not calibrated" in demoted_metrics(at.workspace, find_suite(at.suite), "")["judged.faithfulness"]
    assert not server.requests


def test_what_judging_an_item_takes(judged: Any) -> None:
    at, _, _ = judged
    items = [Item(f"i{n}", "What is it?", "It is.", (), ("It is.",) * n) for n in range(3)]
    with open_cache(at.workspace.evaluation_cache) as cache:
        judging = suite_judge(at.workspace, find_suite(at.suite), cache)
        assert judging is not None
        assert judging.requests(items) == 2 * (2 + 1)


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        (JudgeSettings(model="judge"), "judge.model = 'judge' needs an address"),
        (JudgeSettings(url="http://judge/v1"), "judge.model is empty"),
        (JudgeSettings(url="http://judge/v1", model="judge"), "judge.model_digest is empty"),
    ],
)
def test_a_judge_that_is_not_pinned(judged: Any, chosen: JudgeSettings, told: str) -> None:
    at, _, _ = judged
    object.__setattr__(at.workspace, "settings", at.workspace.settings.model_copy(update={"judge": chosen}))
    with pytest.raises(InputError, match=told):
        calibrate_step(Task("calibrate", at.workspace), suite=at.suite)


def test_the_commands_tell_what_a_judge_is_worth(judged: Any) -> None:
    at, server, instead = judged
    run = CliRunner()
    before = run.invoke(app, ["judge", "show", "--suite", at.suite])
    assert "not calibrated" in before.output
    assert not server.requests
    told = run.invoke(app, ["judge", "calibrate", "--suite", at.suite])
    assert told.exit_code == 0, told.output
    assert "judged.faithfulness may gate" in told.output
    assert "judged.context_recall is advisory: no labelled items for this metric" in told.output
    assert "two people of the town" in told.output
    assert "24 of 24" in told.output
    asked = len(server.requests)
    shown = json.loads(run.invoke(app, ["judge", "show", "--suite", at.suite, "--json"]).output)
    assert shown["advisory"] == {"judged.context_recall": "no labelled items for this metric"}
    assert shown["calibration"]["metrics"][0]["self_agreement"] == 1.0
    assert shown["judge"]["model"] == "judge"
    assert len(server.requests) == asked

    at.suite = at.write(SUITE + FLOOR + JUDGED + "  seed: 9\n")
    instead.append(Reply("I would say it is fine."))
    told = run.invoke(app, ["judge", "calibrate", "--suite", at.suite])
    assert "the judge scored 0 of 8 items (95% are needed), mostly because: not JSON" in " ".join(told.output.split())
