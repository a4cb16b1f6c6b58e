"""kill -9 of each part and of supervisord: `sluice up` mends what does not come back by itself, and nothing is lost."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from tests.chaos.kills import processes_of
from tests.support.installation import Installation

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]


def test_parts_come_back_with_their_state(installation: Installation, loop: Any) -> None:
    before = installation.json("release", "status")["routes"]
    ledger = installation.json("ledger", "--limit", "0")
    for part in installation.json("status"):
        os.kill(part["pid"], signal.SIGKILL)
        parts = installation.json("up")
        assert all(one["healthy"] for one in parts), part["name"]
        assert installation.ask(f"after {part['name']}").status_code == 200, part["name"]
    assert installation.json("release", "status")["routes"] == before
    assert installation.json("ledger", "--limit", "0") == ledger


def test_supervisor_is_mended_by_up(installation: Installation, loop: Any) -> None:
    supervisor = int((installation.home / "supervisord.pid").read_text())
    os.kill(supervisor, signal.SIGKILL)
    assert all(part["healthy"] for part in installation.json("up"))
    assert installation.ask("after supervisord").status_code == 200
    assert _marked(installation) == {part["name"] for part in installation.json("status")} | {"supervisord"}


def _marked(installation: Installation) -> set[str]:
    return {(p.info["environ"] or {}).get("SLUICE_PART", "") for p in processes_of(installation)} - {""}
