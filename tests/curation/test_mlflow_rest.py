from __future__ import annotations

import json
import re
import socket

import pytest

from sluice.curation import mlflow_rest
from sluice.curation.mlflow_rest import MlflowTraceApi, milliseconds
from sluice.curation.mlflow_traces import MlflowTraceStore
from sluice.curation.trace_store import as_utc, open_trace_store
from sluice.infra.errors import InputError, UnavailableError
from sluice.infra.settings import Settings, TraceSettings
from sluice.provenance.canonical import Json
from tests.curation.collector import as_bytes, http_server


class FakeMlflow:
    """Searches as MLflow does: by time, then pages by offset into what matches at that moment."""

    def __init__(self, times: list[int]) -> None:
        self.times = {f"tr-{number:04}": moment for number, moment in enumerate(times)}
        self.after_page: list[tuple[str, int]] = []
        self.experiments: dict[str, str] = {}
        self.searches = 0
        self.status = 200

    def __call__(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        if self.status != 200:
            return self.status, b"{}"
        if "get-by-name" in path:
            name = path.split("=")[1]
            if name not in self.experiments:
                return 404, b"{}"
            return 200, as_bytes({"experiment": {"experiment_id": self.experiments[name]}})
        asked: Json = json.loads(body)
        if path.endswith("experiments/create"):
            self.experiments[asked["name"]] = "5"
            return 200, as_bytes({"experiment_id": "5"})
        assert path.endswith("traces/search")
        self.searches += 1
        floor = max(int(value) for value in re.findall(r">= (\d+)", asked["filter"]))
        matching = sorted((t, i) for i, t in self.times.items() if t >= floor)
        offset = int(asked.get("page_token") or 0)
        page = matching[offset : offset + asked["max_results"]]
        answer: Json = {"traces": [{"trace_id": i, "request_time": as_utc(t)} for t, i in page]}
        if len(page) == asked["max_results"]:
            answer["next_page_token"] = str(offset + len(page))
        if self.after_page:
            trace_id, moment = self.after_page.pop()
            self.times[trace_id] = moment
        return 200, as_bytes(answer)


def found(server: FakeMlflow) -> list[str]:
    with http_server(server) as address:
        return [info["trace_id"] for info in MlflowTraceApi(address, "traces").search("attributes.timestamp_ms >= 0")]


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_rest, "SEARCH_PAGE", 3)


@pytest.mark.parametrize(
    "times",
    [
        [],
        [5],
        [1, 2, 3],
        [1, 2, 3, 4, 5, 6, 7],
        [1, 1, 1, 1, 1, 1, 1, 1],
        [1, 2, 2, 2, 2, 2, 3, 3, 9],
        [4, 4, 4],
    ],
)
def test_every_trace_is_seen_once_whatever_the_times(times: list[int]) -> None:
    server = FakeMlflow(times)
    assert found(server) == sorted(server.times, key=lambda i: (server.times[i], i))


def test_traces_that_appear_behind_us_shift_nothing() -> None:
    server = FakeMlflow([10, 20, 30, 40, 50, 60, 70])
    server.after_page = [(f"tr-late-{n}", 5) for n in range(3)]
    assert [i for i in found(server) if "late" not in i] == [f"tr-{n:04}" for n in range(7)]


def test_the_experiment_is_made_once() -> None:
    server = FakeMlflow([])
    with http_server(server) as address:
        assert MlflowTraceApi(address, "traces").experiment_id == "5"
        assert MlflowTraceApi(address, "traces").experiment_id == "5"
    assert server.experiments == {"traces": "5"}


def test_a_server_that_fails_or_is_gone_is_named() -> None:
    server = FakeMlflow([])
    with http_server(server) as address:
        for status, words in ((500, "failed on"), (401, "refused .*401")):
            server.status = status
            with pytest.raises(UnavailableError, match=words):
                MlflowTraceApi(address, "traces").experiment_id  # noqa: B018
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        store = MlflowTraceStore(f"http://127.0.0.1:{taken.getsockname()[1]}", "traces")
        with pytest.raises(UnavailableError, match="does not answer"):
            store.exists(["1" * 32])
        with pytest.raises(InputError, match="release = 'x' is not a digest"):
            list(store.answers_of("x", 0))


def test_the_settings_choose_the_store() -> None:
    with pytest.raises(InputError, match="tracking_uri = None"):
        open_trace_store(Settings())
    with pytest.raises(InputError, match=r"traces\.backend"):
        open_trace_store(Settings(traces=TraceSettings(backend="langfuse")))


def test_times_survive_their_text() -> None:
    for moment in (0, 1, 999, 1_795_255_260_479, 1_795_255_260_000):
        assert milliseconds(as_utc(moment)) == moment
    assert milliseconds("2026-11-21T10:00:00Z") == milliseconds("2026-11-21T10:00:00.000000Z")
