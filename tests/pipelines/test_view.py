"""A running task's own words fit the terminal: facts break between each other, a warning stands on its own line."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from sluice.components.task import TaskState
from sluice.infra.progress import StepProgress
from sluice.pipelines.runs import Run
from sluice.pipelines.view import run_table

FACTS = ["loss 1.234 (validation 1.300)", "1 h 3 min left", "12,195 tok/s/device", "MFU 41%", "lr 2.9e-04", "$3.17"]


@pytest.mark.parametrize("width", [80, 120])
def test_facts_break_between_each_other(tmp_path: Path, width: int) -> None:
    now = time.time()
    for folder, content in (
        ("tasks", asdict(TaskState("train", "running", now - 60))),
        ("progress", asdict(StepProgress("train", 41, 500, " · ".join(FACTS) + "\n⚠ Step 41 was skipped.", now, now))),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.json").write_text(json.dumps(content))
    run = Run("retrain-1", "retrain", {}, state="running", started=now - 100, folder=tmp_path)
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(run_table(run, "retrain"))
    lines = [line.strip() for line in captured.get().splitlines()]
    assert all(any(fact in line for line in lines) for fact in FACTS), lines
    assert "⚠ Step 41 was skipped." in lines
    assert any("41/500" in line for line in lines)
