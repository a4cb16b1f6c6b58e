"""A whole installation in a folder of its own, driven through the command line as a user drives it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

REPOSITORY = Path(__file__).parents[2]
SERVE_PYTHON = Path(os.environ.get("SLUICE_SERVE_PYTHON", REPOSITORY / ".venv-serve/bin/python"))
SLUICE = Path(sys.executable).with_name("sluice")


class Installation:
    """`sluice` with its own home. Only what it started is ended, by `down`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")},
            "SLUICE_HOME": str(home),
            "SLUICE_SERVE_PYTHON": str(SERVE_PYTHON),
            "SLUICE_BASE_MODEL": "tiny-random-llama",
            "SLUICE_RELEASE__ALLOW_OVERRIDE": "true",
        }

    def run(self, *arguments: str, timeout_s: float = 420) -> subprocess.CompletedProcess[str]:
        """One command; its exit code and what it printed."""
        return subprocess.run(
            [str(SLUICE), *arguments],
            env=self.environment,
            cwd=self.home.parent,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def json(self, *arguments: str, code: int = 0, timeout_s: float = 420) -> Any:
        """One command with `--json`; fails unless it ends with `code`."""
        done = self.run(*arguments, "--json", timeout_s=timeout_s)
        assert done.returncode == code, f"{arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return json.loads(done.stdout)

    def run_named(self, run_id: str) -> dict[str, Any]:
        """The record of one run, however many came after it."""
        runs = self.json("runs", "--limit", "10000")
        return next(run for run in runs if run["id"] == run_id)

    def endpoints(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.home / "endpoints.json").read_text())
        return found

    def ask(self, session: str, *, timeout_s: float = 60) -> httpx.Response:
        """One chat request through the gateway, as a user sends it."""
        return httpx.post(
            f"{self.endpoints()['serving']['gateway_url']}/v1/chat/completions",
            json={
                "model": "assistant",
                "messages": [{"role": "user", "content": f"What is a building permit? {session}"}],
                "max_tokens": 4,
                "temperature": 0,
            },
            headers={"x-session-id": session},
            timeout=timeout_s,
        )

    def wait_for(self, condition: Any, *, timeout_s: float = 60, what: str = "condition") -> Any:
        """Poll until `condition()` is true; its value."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = condition()
            if found:
                return found
            time.sleep(0.05)
        raise AssertionError(f"{what} did not come true within {timeout_s} s")

    @contextmanager
    def users(self) -> Iterator[list[int]]:
        """Users who go on asking through the gateway; the status codes they got (0: no answer)."""
        seen: list[int] = []
        stop = threading.Event()

        def ask(worker: int) -> None:
            number = 0
            while not stop.is_set():
                try:
                    seen.append(self.ask(f"u{worker}-{time.time_ns()}-{number}").status_code)
                except httpx.HTTPError:
                    seen.append(0)
                number += 1
                # People pause between questions; and what is tested shares the machine with them.
                stop.wait(0.2)

        threads = [threading.Thread(target=ask, args=(worker,), daemon=True) for worker in range(6)]
        for thread in threads:
            thread.start()
        try:
            yield seen
        finally:
            stop.set()
            for thread in threads:
                thread.join(timeout=90)
