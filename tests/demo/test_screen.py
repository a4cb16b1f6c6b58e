"""What the demonstration prints at its end."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from sluice.demo.screen import _gate


def check(**changes: Any) -> dict[str, Any]:
    given = {
        "metric": "token_f1",
        "champion": 0.281,
        "candidate": 0.458,
        "difference": 0.177,
        "interval": [0.037, 0.314],
    }
    return {**given, "need": "better", "verdict": "pass", "advisory": False, **changes}


def test_a_check_without_an_interval_is_told_as_such() -> None:
    console = Console(file=io.StringIO(), width=160)
    lacking = check(metric="judged.faithfulness", interval=[None, None], verdict="inconclusive", advisory=True)
    unknown = check(metric="speed.ttft_s", champion=None, candidate=None, difference=None, interval=[None, None])
    candidate = {
        "checks": [check(), lacking, unknown],
        "verdict": "pass",
        "summary": "It may.",
        "asked": "66 of 110 items",
    }
    _gate(console, "gate", candidate)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    row = {line.split()[0]: " ".join(line.split()) for line in lines if line.strip()}
    assert row["token_f1"] == "token_f1 0.281 0.458 +0.177 [+0.037, +0.314] better pass"
    assert row["judged.faithfulness"] == "judged.faithfulness 0.281 0.458 none better inconclusive (advisory)"
    assert row["speed.ttft_s"] == "speed.ttft_s none better pass"
    assert lines[-2:] == ["PASS It may.", "66 of 110 items"]
