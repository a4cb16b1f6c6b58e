from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from sluice.infra.errors import ConflictError, InputError, UnavailableError
from sluice.registry.mlflow_registry import MlflowRegistry, RegistryExists, RegistryMissing, quoted

Answers = dict[str, tuple[int, object]]


@pytest.fixture
def server() -> Iterator[tuple[str, Answers, list[str]]]:
    """A server that gives prepared answers by path and notes what it was asked."""
    answers: Answers = {}
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            path = self.path.split("?")[0].removeprefix("/api/2.0/mlflow/")
            asked.append(f"{self.command} {path}")
            status, body = answers.get(path, (404, "no page"))
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = do_DELETE = answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}", answers, asked
    http.shutdown()
    http.server_close()


def test_a_missing_address_names_the_setting_and_the_way_out() -> None:
    with pytest.raises(UnavailableError, match=r"mlflow\.tracking_uri.*sluice up"):
        MlflowRegistry(None)
    with pytest.raises(InputError, match=r"sqlite:///x\.db"):
        MlflowRegistry("sqlite:///x.db")


def test_a_dead_server_ends_in_a_sentence_at_once() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(UnavailableError, match=f"127.0.0.1:{port} does not answer.*sluice up"):
        MlflowRegistry(f"http://127.0.0.1:{port}").get("registered-models/get", name="a")
    assert time.monotonic() - started < 3


def test_a_hanging_server_ends_in_a_sentence_within_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "0.3")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(UnavailableError, match=r"no answer to POST /api/2\.0/mlflow/runs/create in time"):
            MlflowRegistry(f"http://127.0.0.1:{silent.getsockname()[1]}").post("runs/create", experiment_id="1")
        assert time.monotonic() - started < 2


def test_a_wrong_timeout_names_variable_and_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "soon")
    with pytest.raises(InputError, match="MLFLOW_HTTP_REQUEST_TIMEOUT = 'soon'"):
        MlflowRegistry("http://127.0.0.1:1")


def test_mlflows_answers_become_our_errors(server: tuple[str, Answers, list[str]]) -> None:
    uri, answers, _ = server
    registry = MlflowRegistry(uri)
    cases: list[tuple[int, object, type[Exception], str]] = [
        (404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no model a"}, RegistryMissing, "no model a"),
        (400, {"error_code": "RESOURCE_ALREADY_EXISTS", "message": "taken"}, RegistryExists, "taken"),
        (400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "bad key"}, InputError, "bad key"),
        (401, "You are not authenticated", UnavailableError, "MLFLOW_TRACKING_USERNAME"),
        (404, "no page", UnavailableError, "404"),
        (503, "busy", UnavailableError, "503 busy"),
        (200, "<html>another service</html>", UnavailableError, "does not answer like an MLflow server"),
    ]
    for status, body, error, words in cases:
        answers["x/y"] = (status, body)
        with pytest.raises(error, match=words):
            registry.get("x/y")
    assert issubclass(RegistryExists, ConflictError)


def test_an_experiment_is_made_once_and_restored_when_deleted(server: tuple[str, Answers, list[str]]) -> None:
    uri, answers, asked = server
    registry = MlflowRegistry(uri)
    answers["experiments/get-by-name"] = (404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": ""})
    answers["experiments/create"] = (200, {"experiment_id": "5"})
    assert [registry.experiment("gates"), registry.experiment("gates")] == ["5", "5"]
    assert asked == ["GET experiments/get-by-name", "POST experiments/create"]
    answers["experiments/get-by-name"] = (200, {"experiment": {"experiment_id": "5", "lifecycle_stage": "deleted"}})
    answers["experiments/restore"] = (200, {})
    assert MlflowRegistry(uri).experiment("gates") == "5"
    assert asked[-1] == "POST experiments/restore"


def test_a_quote_cannot_reach_the_search() -> None:
    assert quoted("a") == "'a'"
    with pytest.raises(InputError, match="quote"):
        quoted("a' or name != 'a")
