"""A real Envoy for the tests of this room."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from sluice.infra.health import probe
from sluice.infra.ports import is_free
from sluice.serving.envoy import GatewaySettings, gateway_service, prepare_gateway
from sluice.serving.router import EnvoyRouter
from sluice.serving.routes import Target


def free_port() -> int:
    """A port below the range of outgoing connections that nothing listens on."""
    while True:
        port = random.randrange(20000, 31000)
        if is_free(port):
            return port


def envoy_binary() -> str:
    """The binary that comes with the environment the tests run in."""
    beside = Path(sys.executable).parent / "envoy"
    return str(beside) if beside.exists() else shutil.which("envoy") or "envoy"


@dataclass
class Gateway:
    """A running gateway and what a test does with it."""

    settings: GatewaySettings
    router: EnvoyRouter
    client: httpx.Client
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        spec = gateway_service(self.settings, envoy_binary())
        self.process = subprocess.Popen(spec.command)
        until = time.monotonic() + 15
        while probe(spec.health) is not None:
            assert time.monotonic() < until, "Envoy does not become ready"
            time.sleep(0.03)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def ask(self, session: str, *, headers: dict[str, str] | None = None) -> httpx.Response:
        """One plain question."""
        body = {"model": "app", "messages": [{"role": "user", "content": "hi"}]}
        return self.client.post("/v1/chat/completions", json=body, headers={"x-session-id": session, **(headers or {})})

    def stream(self, session: str) -> str:
        """One streamed question; what arrived, also when the stream breaks."""
        body = {"model": "app", "messages": [], "stream": True}
        text = ""
        try:
            with self.client.stream(
                "POST", "/v1/chat/completions", json=body, headers={"x-session-id": session}
            ) as got:
                for piece in got.iter_text():
                    text += piece
        except httpx.HTTPError:
            pass
        return text


@contextmanager
def running_gateway(folder: Path, stable: Target, *, application: str = "app", **changes: Any) -> Iterator[Gateway]:
    """A gateway that sends everybody to `stable`; `changes` of its settings."""
    settings = GatewaySettings(application, folder, free_port(), free_port(), **changes)
    prepare_gateway(settings)
    router = EnvoyRouter(settings)
    router.seed(stable)
    with httpx.Client(base_url=settings.url, timeout=10, trust_env=False) as client:
        gateway = Gateway(settings, router, client)
        gateway.start()
        try:
            yield gateway
        finally:
            if gateway.process is not None and gateway.process.poll() is None:
                gateway.process.terminate()
                gateway.process.wait(10)
