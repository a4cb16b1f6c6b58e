"""The report: the verdict first, every text escaped, the same bytes twice."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sluice.evaluation.metrics import score

from sluice.evaluation.answers import Answer
from sluice.evaluation.comparison import Comparison, compare
from sluice.evaluation.gate import Decision, decide
from sluice.evaluation.markdown import plain
from sluice.evaluation.report import Example, ReportContext, TrainingPoint, pick_examples, write_report
from sluice.evaluation.suite import bundled_suite
from tests.evaluation.scores import NOW, SUBJECTS

HOSTILE = (
    "</td><script>alert(1)</script> | ![x](http://evil.example/a.png) [click](javascript:x) `c` **b** www.evil.example"
)
IDS = [f"q{n:03}" for n in range(110)]
REFERENCES = {item: f"brick number {item} needs a permit from the municipality" for item in IDS}
QUESTIONS = {item: f"What about {item}?" for item in IDS}


def answers(right: int, wrong: str) -> list[Answer]:
    return [
        Answer(item, REFERENCES[item] if n % 10 < right else f"{wrong} {n}", "stop", 9, 9, 0.1, 0.5)
        for n, item in enumerate(IDS)
    ]


CHAMPION, CANDIDATE = answers(2, "perhaps brick"), answers(7, HOSTILE)
CONTEXT = ReportContext(
    "assistant",
    "demo",
    "adapter 3f9a12cd0b77",
    "base <model>",
    {"examples": "200 train, 20 validation", "licence": "CC-BY-4.0"},
    [TrainingPoint(1, 1.8), TrainingPoint(10, 0.7, 0.8), TrainingPoint(25, 0.3, 0.4)],
    "Approve: set the tag `approval` to `approved`.",
)


@pytest.fixture(scope="module")
def decided() -> tuple[Decision, Comparison, list[Example]]:
    suite = bundled_suite("demo")
    champion, candidate = (score(given, REFERENCES, suite.metrics) for given in (CHAMPION, CANDIDATE))
    comparison = compare(champion, candidate, suite.policy)
    decision = decide(comparison, suite.policy, SUBJECTS, NOW)
    examples = pick_examples(
        decision, comparison, questions=QUESTIONS, references=REFERENCES, champion=CHAMPION, candidate=CANDIDATE
    )
    return decision, comparison, examples


@pytest.fixture(scope="module")
def written(decided: tuple[Decision, Comparison, list[Example]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, *decided, CONTEXT)
    return folder


class Page(HTMLParser):
    """Tags that open, tags left open, and addresses that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.stack: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.opened.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in ("meta", "br", "link", "img", "input"):
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def test_the_summary_begins_with_the_verdict_and_has_one_compact_table(written: Path) -> None:
    text = (written / "report.md").read_text()
    assert text.startswith("**Gate: PASS.** The candidate may replace the champion: on 110 held-out questions")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 5
    # Five columns: six bars that are not escaped.
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}
    change = r"\+0\.\d{3}"
    first = rf"\| Token F1\s+\| 0\.\d{{3}} \| 0\.\d{{3}} \| {change}\s\[{change},\s{change}\] \| .*\*\*pass\*\*"
    assert re.match(first, rows[2])
    assert "Approve: set the tag `approval`" in text
    assert "**Better than before**" in text
    assert len(text) < 5_000


def test_a_summary_that_would_grow_too_long_leaves_examples_out(
    decided: tuple[Decision, Comparison, list[Example]], tmp_path: Path
) -> None:
    decision, comparison, examples = decided
    wide = replace(CONTEXT, dataset={f"rule {n}": "x" * 500 for n in range(40)}, approve="a" * 2_900)
    write_report(tmp_path, decision, comparison, examples, wide)
    text = (tmp_path / "report.md").read_text()
    assert 3_500 < len(text) < 5_000
    assert "Better than before" not in text


def test_no_text_of_a_model_becomes_markup(written: Path) -> None:
    text = (written / "report.md").read_text()
    assert "script&gt;alert" in text
    assert "<script" not in text
    assert not re.search(r"(?<!\\)\]\(", text)
    assert "http://" not in text
    assert "www." not in text
    page = (written / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in page
    parsed = Page(page)
    assert parsed.stack == []
    assert "script" not in parsed.opened
    assert "img" not in parsed.opened
    # Drawings point inside themselves only.
    assert all(address.startswith("#") for address in parsed.addresses)
    assert parsed.opened.count("svg") == 5 + 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\n\n# b | c", r"a \# b \| c"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("x" * 300, "x" * 199 + "…"),
        ("- [ ] a_b*c", r"- \[ \] a\_b\*c"),
    ],
)
def test_plain_text_stays_plain(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_the_page_says_what_the_decision_says(
    written: Path, decided: tuple[Decision, Comparison, list[Example]]
) -> None:
    decision = decided[0]
    page = (written / "report.html").read_text()
    for text in (decision.summary, SUBJECTS.candidate, SUBJECTS.index or "", "base &lt;model&gt;", "200 train"):
        assert text in page
    numbers = json.loads((written / "report.json").read_text())
    assert numbers["decision"] == decision.to_json()
    assert [metric["metric"] for metric in numbers["metrics"]][:3] == ["token_f1", "answer_rate", "answer_words"]
    assert len(numbers["metrics"][0]["items"]) == 110
    for name in ("paired.png", "training.png"):
        assert (written / name).read_bytes().startswith(b"\x89PNG")


def test_examples_are_the_extremes(decided: tuple[Decision, Comparison, list[Example]]) -> None:
    examples = decided[2]
    better = [example for example in examples if example.gain > 0]
    assert len(better) == 5
    assert better[0].gain == max(example.gain for example in examples)
    assert better[0].candidate_answer == better[0].reference
    assert all(example.candidate_score - example.champion_score == example.gain for example in examples)


def test_the_same_inputs_give_the_same_bytes(
    written: Path, decided: tuple[Decision, Comparison, list[Example]], tmp_path: Path
) -> None:
    write_report(tmp_path, *decided, CONTEXT)
    names = sorted(path.name for path in written.iterdir())
    assert names == ["paired.png", "report.html", "report.json", "report.md", "training.png"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes(), name


def test_a_report_can_be_written_about_nothing(tmp_path: Path) -> None:
    suite = bundled_suite("demo")
    empty = score([], {}, suite.metrics)
    comparison = compare(empty, empty, suite.policy)
    decision = decide(comparison, suite.policy, SUBJECTS, NOW)
    write_report(tmp_path, decision, comparison, [], replace(CONTEXT, dataset={}, training=()))
    assert (tmp_path / "report.md").read_text().startswith("**Gate: INCONCLUSIVE.** The evidence does not decide")
    assert "0 items" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "paired.png").exists()
