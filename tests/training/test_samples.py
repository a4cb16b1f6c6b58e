"""Prompts of the answers that are generated during training."""

from __future__ import annotations

import json
from pathlib import Path

from sluice.training.base_model import build_tiny_llama
from sluice.training.examples import read_split
from sluice.training.samples import read_prompts


def test_a_line_ends_only_where_json_lines_end(tmp_path: Path) -> None:
    """Unicode has line separators of its own (U+2028, U+0085), which JSON takes for letters."""
    base = build_tiny_llama(tmp_path / "base").folder
    asked = "first\u2028second\u0085third"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": "So."}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    read_split(tmp_path / "data.jsonl", base, 320).write(tmp_path / "split.jsonl")
    [prompt] = read_prompts(tmp_path / "split.jsonl", base, 2)
    assert (prompt.text, prompt.reference) == (asked, "So.")
