"""kill -9 of what serves: `sluice up` mends what does not come back by itself, and nothing is lost.

The parts that hold state are killed one by one in `tests/integration/test_infra_parts.py`; together, and with
supervisord, in the rollback of `test_pipelines.py`.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from tests.support.installation import Installation

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]


def test_what_serves_comes_back_with_its_state(installation: Installation, loop: Any) -> None:
    before = installation.json("release", "status")["routes"]
    ledger = installation.json("ledger", "--limit", "0")
    serving = [part for part in installation.json("status") if part["name"] in ("vllm", "gateway")]
    assert len(serving) == 2
    for part in serving:
        os.kill(part["pid"], signal.SIGKILL)
        parts = installation.json("up")
        assert all(one["healthy"] for one in parts), part["name"]
        assert installation.ask(f"after {part['name']}").status_code == 200, part["name"]
    assert installation.json("release", "status")["routes"] == before
    assert installation.json("ledger", "--limit", "0") == ledger
