from __future__ import annotations

from pathlib import Path

import pytest

from sluice.infra.progress import read_progress, step_reporter


def test_the_latest_state_crosses_the_process_boundary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLUICE_RUN_DIR", raising=False)
    step_reporter("train")(1, 2, "nobody listens")
    monkeypatch.setenv("SLUICE_RUN_DIR", str(tmp_path))
    report = step_reporter("train", interval_s=60)
    report(1, 10, "first")
    report(2, 10, "too soon to write")
    assert read_progress(tmp_path)["train"].message == "first"
    report(10, 10, "the end is never held back")
    (tmp_path / "progress" / "broken.json").write_text("{")
    states = read_progress(tmp_path)
    assert states.keys() == {"train"}
    assert (states["train"].completed, states["train"].message) == (10, "the end is never held back")
