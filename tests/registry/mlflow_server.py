"""A real MLflow server on a free port, and a connection whose process ends in the middle of its work."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from sluice.infra.mlflow_database import default_cache, ensure_database
from sluice.registry.mlflow_registry import MlflowRegistry


@contextmanager
def mlflow_server(folder: Path, **variables: str) -> Iterator[str]:
    """The address of a server on SQLite that proxies artifacts into `folder`; `variables` are for its environment."""
    ensure_database(folder / "mlflow.db", default_cache())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/files"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment |= variables
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                if httpx.get(f"{address}/health", timeout=2).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "server.log").read_text()[-2000:])
            time.sleep(0.3)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


class Crash(BaseException):
    """Stands for the end of the process: nothing catches it."""


class CrashingRegistry(MlflowRegistry):
    """Ends the process when its `after`-th writing call was done; the server's state is that before the next one."""

    def __init__(self, uri: str, after: int) -> None:
        super().__init__(uri, timeout_s=30)
        self.left = after

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        response = super()._request(method, path, **options)
        if method != "GET" and not path.endswith("/search"):
            self.left -= 1
            if self.left == 0:
                raise Crash
        return response


def crash_at_every_call(registry: MlflowRegistry, prefix: str, work: Callable[[MlflowRegistry, str], Any]) -> list[str]:
    """Do `work` once for each of its writing calls, dying after that call and repeating it; the names of all."""
    names: list[str] = []
    while len(names) < 40:
        name = f"{prefix}-{len(names) + 1}"
        try:
            work(CrashingRegistry(registry.uri, len(names) + 1), name)
        except Crash:
            work(registry, name)
            names.append(name)
        else:
            break
    return names
