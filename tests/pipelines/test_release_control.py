"""`sluice release ...`: what it shows, what it tells the rollout, and what it says when there is nothing to tell."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from sluice.components.rollout_facts import gather, keep_policy, store_of
from sluice.infra.access import login
from sluice.infra.errors import ConflictError, InputError, IntegrityError
from sluice.infra.settings import Settings, load_settings
from sluice.pipelines.cli import app
from sluice.pipelines.metrics_server import metrics_server
from sluice.serving.policy import default_policy
from sluice.serving.rollout_state import RolloutState
from sluice.serving.rollout_store import CoolDown
from sluice.serving.routes import Target
from tests.serving.rollouts import CANARY, failed, holding, promoted


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLUICE_HOME", str(tmp_path / "home"))
    return load_settings()


def sluice(*words: str) -> Result:
    return CliRunner().invoke(app, ["release", *words])


def answer(*words: str) -> Any:
    ended = sluice(*words, "--json")
    assert ended.exception is None, ended.exception
    return json.loads(ended.stdout)


def other(state: RolloutState, sign: str) -> RolloutState:
    return replace(
        state, target=Target(f"sha256:{sign * 64}", f"sha256:{sign * 64}", f"other-{sign}", ("127.0.0.1:1",))
    )


def test_status_needs_no_gateway_and_no_registry(settings: Settings) -> None:
    store_of(settings).save(holding())
    keep_policy(settings, CANARY.release, default_policy())
    told = answer("status")
    assert told["rollout"]["target"]["served_name"] == CANARY.served_name
    assert (told["under_way"], told["routes"]) == (True, None)
    assert "no address" in told["gateway"]
    assert told["time_left"]["ends"] == pytest.approx(default_policy().steps[1].maximum_time_s - 33)
    assert told["samples"] == [3, 8]
    text = sluice("status").stdout
    assert "holding" in text
    assert "Step 1 of 3" in text  # every event, not only the last


def test_the_rollout_under_way_is_meant_and_not_the_latest(settings: Settings) -> None:
    store_of(settings).save(holding())
    store_of(settings).save(other(promoted(), "a"))
    assert answer("status")["rollout"]["phase"] == "holding"
    assert answer("status", "other-a")["rollout"]["phase"] == "promoted"
    assert answer("status", "sha256:aaa")["rollout"]["phase"] == "promoted"
    assert answer("status", "ccc")["rollout"]["phase"] == "holding"


def test_a_release_that_is_none_or_several_is_named(settings: Settings) -> None:
    digest = f"sha256:{'c' * 63}d"
    store_of(settings).save(holding())
    store_of(settings).save(replace(promoted(), target=Target(digest, digest, "twin", ("127.0.0.1:1",))))
    for words, said in ((("zz",), "no rollout"), (("cc",), "2 rollouts")):
        ended = sluice("status", *words)
        assert isinstance(ended.exception, InputError)
        assert said in str(ended.exception)
        assert "twin" in ended.exception.hint


def test_an_order_carries_identity_and_reason(settings: Settings) -> None:
    store_of(settings).save(holding())
    for verb, reason in (("pause", "is it the mail?"), ("resume", ""), ("promote", "looked at 40 answers")):
        told = answer(verb, "--reason", reason)
        assert (told["order"], told["by"], told["controller"]) == (verb, login(), False)
    orders = store_of(settings).orders(CANARY.release)
    assert [(one.kind, one.actor, one.reason) for one in orders] == [
        ("pause", login(), "is it the mail?"),
        ("resume", login(), ""),
        ("promote", login(), "looked at 40 answers"),
    ]
    assert "No controller is at work" in sluice("pause").stdout


@pytest.mark.parametrize("verb", ["pause", "resume", "promote", "watch"])
def test_without_a_rollout_it_says_what_to_do(verb: str, settings: Settings) -> None:
    words = (verb, "--reason", "x") if verb != "watch" else (verb,)
    for state in (None, failed()):
        if state:
            store_of(settings).save(state)
        ended = sluice(*words)
        assert isinstance(ended.exception, ConflictError)
        assert "No rollout is under way" in ended.exception.message
        assert "sluice approve" in ended.exception.hint
    assert not store_of(settings).orders(CANARY.release)


@pytest.mark.parametrize("verb", ["promote", "abort"])
def test_what_ends_a_rollout_early_says_why(verb: str, settings: Settings) -> None:
    store_of(settings).save(holding())
    ended = sluice(verb)
    assert ended.exit_code != 0
    assert not store_of(settings).orders(CANARY.release)


def test_watching_without_a_terminal_tells_each_event_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    store_of(settings).save(holding())

    def end_it(seconds: float) -> None:
        store_of(settings).save(failed())

    monkeypatch.setattr("sluice.pipelines.cli.release_control.time.sleep", end_it)
    lines = sluice("watch").stdout.splitlines()
    assert len(lines) == len(failed().events)
    assert "✕ fail" in lines[-1]


def test_history_lists_how_each_ended_and_its_worst_metric(settings: Settings) -> None:
    store_of(settings).save(failed())
    store_of(settings).save(other(promoted(), "a"))
    rows = {row["outcome"]: row for row in answer("history")}
    assert rows["failed"]["worst"] == "thumbs down +62.0 pts (fail)"
    assert rows["failed"]["by"] == ["ann"]
    assert (rows["failed"]["highest"], rows["promoted"]["highest"]) == (30, 100)
    assert "Thumbs down: 6 of 9" in rows["failed"]["why"]
    assert [row["outcome"] for row in answer("history", "other-a")] == ["promoted"]


def test_history_writes_the_page_also_when_mlflow_is_away(settings: Settings, tmp_path: Path) -> None:
    store_of(settings).save(failed())
    page = tmp_path / "pages" / "rollout.html"
    assert answer("history", CANARY.served_name, "--html", str(page))["page"] == str(page)
    assert "Rolled back at 30%" in page.read_text()


def test_metrics_are_printed_written_whole_and_served(settings: Settings, tmp_path: Path) -> None:
    store_of(settings).save(holding())
    printed = sluice("metrics").stdout
    assert 'sluice_rollout_phase{application="assistant",release="assistant-cccccccccccc",phase="holding"} 1' in printed
    file = tmp_path / "collector" / "sluice.prom"
    assert sluice("metrics", "--file", str(file)).exit_code == 0
    assert file.read_text() == printed
    assert [path.name for path in file.parent.iterdir()] == ["sluice.prom"]

    def failing() -> str:
        raise ConflictError("no figures")

    for text, status in ((lambda: "a 1\n", 200), (failing, 503)):
        with metrics_server(0, text) as server:
            threading.Thread(target=server.handle_request, daemon=True).start()
            found = httpx.get(f"http://127.0.0.1:{server.server_port}/metrics", timeout=5)
        assert found.status_code == status
        if status == 200:
            assert found.text == "a 1\n"
            assert found.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_a_policy_is_shown_as_it_was_when_the_rollout_began(settings: Settings) -> None:
    store_of(settings).save(holding())
    assert gather(settings).policy is None
    policy = default_policy().model_copy(update={"bake_s": 1234.0})
    keep_policy(settings, CANARY.release, policy)
    assert gather(settings).policy == policy


def test_resume_ends_a_cool_down_in_somebodys_name(settings: Settings) -> None:
    store = store_of(settings)
    store.save(failed())
    store.set_cool_down(CoolDown(CANARY.release, "errors", time.time() + 600))
    assert "reason" in str(sluice("resume").exception)
    assert answer("resume", "--reason", "the probe was wrong")["cool_down"] == "ended"
    ended = store.cool_down()
    assert ended is not None
    assert (ended.ended_by, ended.ended_why) == (login(), "the probe was wrong")
    # Nothing is left to end, and no rollout is under way.
    assert isinstance(sluice("resume", "--reason", "again").exception, ConflictError)


def test_the_lease_and_the_cool_down_beside_the_rollouts_are_none(settings: Settings) -> None:
    from sluice.serving.controller_lease import FileLease

    folder = settings.home / "rollouts"
    store_of(settings).save(holding())
    store_of(settings).set_cool_down(CoolDown(CANARY.release, "slow", time.time() + 60))
    held = FileLease(folder, "release on host-1").acquire()
    facts = gather(settings)
    assert (facts.lease.holder, facts.lease.token, facts.lease.held) == ("release on host-1", held.token, True)
    assert 50 < facts.cooling_s() <= 60
    held.release()
    assert not gather(settings).lease.held


def test_damaged_files_are_named_and_never_a_defect(settings: Settings) -> None:
    folder = settings.home / "rollouts"
    folder.mkdir(parents=True)
    for content in ('{"token": "abc", "holder": [1]}', '{"token": null}', "[]", "{"):
        (folder / "controller.json").write_text(content)
        assert answer("status")["lease"]["token"] == 0
    for content in ('{"release": "x", "reason": "r", "until": "soon"}', "[1]", "{"):
        (folder / "cool-down.json").write_text(content)
        error = sluice("status").exception
        assert isinstance(error, IntegrityError)
        # Nobody is told to undo a promotion because of a note.
        assert "sluice rollback" not in (error.hint or "")
