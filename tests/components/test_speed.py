"""The speed step: both releases timed by the real code against a scripted server."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice.components.speed import speed_step
from sluice.evaluation.scores import read_scores
from sluice.provenance.artifacts import ArtifactStore
from tests.components.measuring import BASE, CANDIDATE, CHAMPION, Place, serve
from tests.evaluation.chat_server import Reply, chat_server
from tests.support.directory_store import DirectoryStore

SPEED = "speed: {requests: 8, concurrency: 2, price_per_hour: 1.0}\n"


def test_both_releases_are_timed_once(
    tmp_path: Path, object_store: DirectoryStore, artifacts: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch)
    with chat_server(by_model=lambda *_: Reply("two words")) as server:
        place = Place(tmp_path / "home", server.url, object_store, artifacts)
        given = {"candidate": CANDIDATE, "champion": CHAMPION, "base": BASE, "prompts": place.prompts}
        suite = place.suite(SPEED)
        found = speed_step(running := place.task("speed"), suite=suite, **given)
        asked = len(server.asked)
        assert speed_step(place.task("speed"), suite=suite, **given) == found
        assert len(server.asked) == asked == 20
        assert len(server.asked_of(CANDIDATE)) == len(server.asked_of(CHAMPION)) == 10
        nothing = speed_step(idle := place.task("speed"), suite=place.suite(), **given)
        assert len(server.asked) == asked
    folder = artifacts.fetch(found)
    for side in ("candidate", "champion"):
        columns = read_scores(folder / side).columns
        assert set(columns) == {"speed.ttft_s", "speed.latency_s", "speed.tokens_per_s", "speed.cost_per_1000"}
        assert all(len(one.values) == 8 and None not in one.values.values() for one in columns.values())
        assert read_scores(artifacts.fetch(nothing) / side).columns == {}
    assert running.state.summary.startswith("candidate 8 answers, ")
    assert idle.state.summary == "the suite asks for no times"


def test_requests_that_were_lost_are_made_by_the_next_run(
    tmp_path: Path, object_store: DirectoryStore, artifacts: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch)
    down = [True]
    with chat_server(by_model=lambda *_: Reply("two words", status=500 if down[0] else 200)) as server:
        place = Place(tmp_path / "home", server.url, object_store, artifacts)
        given = {"candidate": CANDIDATE, "champion": CHAMPION, "base": BASE, "prompts": place.prompts}
        given["suite"] = place.suite(SPEED)
        lost = speed_step(place.task("speed"), **given)
        assert set(read_scores(artifacts.fetch(lost) / "champion").columns["speed.latency_s"].causes.values()) == {
            "http 500"
        }
        down[0] = False
        mended = speed_step(place.task("speed"), **given)
        asked = len(server.asked)
        assert not read_scores(artifacts.fetch(mended) / "champion").columns["speed.latency_s"].causes
        assert speed_step(place.task("speed"), **given) == mended
        assert len(server.asked) == asked
