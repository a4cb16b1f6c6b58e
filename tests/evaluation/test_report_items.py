"""The table of items: all of them, as text only, run by the one script that the page's policy names."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import pytest

from sluice.evaluation.comparison import Comparison, compare
from sluice.evaluation.decision import Decision
from sluice.evaluation.evidence import Evidence
from sluice.evaluation.gate import decide
from sluice.evaluation.items_table import LONGEST, items_page, items_table
from tests.evaluation.made_up import COUNT, HOSTILE, answers, items, scores
from tests.evaluation.scores import NOW, SUBJECTS, policy

SCRIPT = re.compile(r"<script(?P<kind>[^>]*)>(?P<text>.*?)</script>", re.DOTALL)


@pytest.fixture(scope="module")
def made() -> tuple[Decision, Comparison, Evidence]:
    asked = items()
    old, new = answers(asked, 0.35, 1), answers(asked, 0.7, 2)
    before, after = scores(asked, old, 0.35, 1), scores(asked, new, 0.7, 2)
    comparison = compare(before, after, policy())
    evidence = Evidence("assistant", "demo", "adapter", "base <model>", after, before, asked, new, old)
    return decide(comparison, policy(), SUBJECTS, NOW), comparison, evidence


def test_the_page_holds_every_item_as_data(made: tuple[Decision, Comparison, Evidence]) -> None:
    page = items_page(*made)
    found = {one["kind"]: one["text"] for one in SCRIPT.finditer(page)}
    assert len(found) == 2
    data = json.loads(found[' type="application/json" id="data"'])
    assert len(data["rows"]) == COUNT
    assert any(HOSTILE in row["a"][1] for row in data["rows"])
    lost = next(row for row in data["rows"] if row["id"] == "q005")
    assert lost["o"] == ["timeout", "timeout"]
    assert "candidate token_f1: timeout" in lost["c"]
    assert lost["m"][0] == [None, None]
    # Probes, benchmarks and load have items of their own.
    assert {name.split(".")[0] for name, *_ in data["metrics"]} >= {"token_f1", "judged"}
    assert not [name for name, *_ in data["metrics"] if name.startswith(("safety", "speed", "benchmark"))]


def test_no_text_of_a_model_becomes_markup_and_no_other_script_runs(
    made: tuple[Decision, Comparison, Evidence],
) -> None:
    page = items_page(*made)
    assert "<script>alert" not in page
    assert "base &lt;model&gt;" in page
    script = next(one["text"] for one in SCRIPT.finditer(page) if not one["kind"])
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page
    assert "innerHTML" not in script
    assert not re.search(r"\son\w+=", page.replace(script, ""))


def test_mlflows_table_has_one_row_an_item_and_gains_that_point_up(
    made: tuple[Decision, Comparison, Evidence],
) -> None:
    table = json.loads(items_table(made[1], made[2]))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert len(rows) == COUNT
    first = rows[0]
    assert (first["item"], first["category"], first["language"]) == ("q000", "culture", "es")
    longer = next(row for row in rows if row["answer_words gain"] and row["answer_words gain"] < 0)
    assert longer["answer_words candidate"] > longer["answer_words champion"]
    assert all(len(row["question"]) <= LONGEST for row in rows)
