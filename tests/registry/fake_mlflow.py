"""Enough of an MLflow server for the tests of runs, in memory and over HTTP: its metrics are append-only as the real
one's are, and it can be taken away and brought back."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class FakeMlflow:
    """The server's state. `requests` are paths, in order; while `down` every request is answered with 503."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.down = False
        self.uri = ""

    def run(self) -> dict[str, Any]:
        """The only run."""
        (found,) = self.runs.values()
        return found

    def curve(self, name: str) -> list[tuple[int, Any]]:
        """(step, value) of every point of the only run, in the order of times."""
        points = sorted((at, step, value) for key, at, step, value in self.run()["points"] if key == name)
        return [(step, value) for _, step, value in points]

    def answer(self, method: str, path: str, query: dict[str, str], body: dict[str, Any]) -> dict[str, Any]:
        if path == "experiments/get-by-name":
            return {"experiment": {"experiment_id": "1"}}
        if path == "runs/create":
            run_id = f"{len(self.runs) + 1:032x}"
            info = {"run_id": run_id, "experiment_id": "1", "status": "RUNNING", "start_time": body["start_time"]}
            info["artifact_uri"] = f"mlflow-artifacts:/1/{run_id}/artifacts"
            tags = {one["key"]: one["value"] for one in body["tags"]}
            self.runs[run_id] = {"info": info, "tags": tags, "params": {}, "points": set(), "inputs": {}}
            return {"run": self._shown(self.runs[run_id])}
        if path == "runs/search":
            key = body["filter"].split("'")[1]
            return {"runs": [self._shown(run) for run in self.runs.values() if run["tags"].get("sluice.key") == key]}
        run = self.runs[query.get("run_id") or body["run_id"]]
        if path == "metrics/get-history":
            points = sorted(one for one in run["points"] if one[0] == query["metric_key"])
            return {"metrics": [{"step": s, "timestamp": t, "value": v} for _, t, s, v in points]}
        if path == "runs/log-batch":
            run["tags"] |= {one["key"]: one["value"] for one in body.get("tags", [])}
            run["params"] |= {one["key"]: one["value"] for one in body.get("params", [])}
            # The primary key of MLflow's table: the same point again is no second one.
            run["points"] |= {(m["key"], m["timestamp"], m["step"], m["value"]) for m in body.get("metrics", [])}
        elif path == "runs/log-inputs":
            run["inputs"] |= {one["dataset"]["name"]: one["dataset"] for one in body["datasets"]}
        elif path == "runs/update":
            run["info"] |= {key: body[key] for key in ("status", "end_time") if key in body}
        else:
            raise AssertionError(f"{method} {path}")
        return {}

    @staticmethod
    def _shown(run: dict[str, Any]) -> dict[str, Any]:
        last: dict[str, int] = {}
        for key, _, step, _ in run["points"]:
            last[key] = max(step, last.get(key, step))
        tags = [{"key": key, "value": value} for key, value in run["tags"].items()]
        return {
            "info": dict(run["info"]),
            "data": {"tags": tags, "metrics": [{"key": key, "step": step} for key, step in last.items()]},
        }


@contextmanager
def fake_mlflow() -> Iterator[FakeMlflow]:
    """A running server on a free port."""
    state = FakeMlflow()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            content = self.rfile.read(int(self.headers.get("content-length", 0)))
            parts = urlsplit(self.path)
            path = parts.path.removeprefix("/api/2.0/mlflow/")
            with lock:
                state.requests.append(path)
                if state.down:
                    self._send(503, {"error_code": "TEMPORARILY_UNAVAILABLE", "message": "down for the test"})
                    return
                if self.command == "PUT":
                    state.files[unquote(path).split("/artifacts/", 2)[-1]] = content
                    self._send(200, {})
                    return
                query = {name: values[0] for name, values in parse_qs(parts.query).items()}
                self._send(200, state.answer(self.command, path, query, json.loads(content or b"{}")))

        do_GET = do_POST = do_PUT = answer

        def _send(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.uri = f"http://127.0.0.1:{http.server_port}"
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield state
    finally:
        http.shutdown()
        http.server_close()
