"""The report: the verdict first, everything a reviewer asks for, every text escaped, the same bytes twice."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sluice.evaluation.comparison import Comparison, compare
from sluice.evaluation.decision import Decision
from sluice.evaluation.evidence import Evidence
from sluice.evaluation.examples import pick_examples
from sluice.evaluation.forest import forest_drawing, forest_row
from sluice.evaluation.gate import decide
from sluice.evaluation.markdown import LONGEST, summary_markdown
from sluice.evaluation.page import script_source
from sluice.evaluation.report import write_report
from sluice.evaluation.scores import Scores
from sluice.evaluation.stopping import Stopping
from sluice.infra.markdown import plain
from tests.evaluation.made_up import COUNT, TOTAL, evaluation
from tests.evaluation.scores import NOW, SUBJECTS, policy

Made = tuple[Decision, Comparison, Evidence]


@pytest.fixture(scope="module")
def made() -> Made:
    return evaluation()


@pytest.fixture(scope="module")
def written(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, *made)
    return folder


@pytest.fixture(scope="module")
def summary(made: Made) -> str:
    return summary_markdown(*made)


class Page(HTMLParser):
    """Tags that open, tags left open, addresses that a browser would fetch, and anchors by name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.stack: list[str] = []
        self.addresses: list[str] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.opened.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        self.names |= {value or "" for name, value in attrs if name == "id"}
        assert not [name for name, _ in attrs if name.startswith("on")], "an event handler is script"
        if tag not in ("meta", "br", "link", "img", "input"):
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("input",):
            assert self.stack.pop() == tag


def test_the_summary_begins_with_the_verdict_and_has_one_compact_table(made: Made, summary: str) -> None:
    assert summary.startswith("**Gate: PASS.** The candidate may replace the champion: on 240 held-out questions")
    # One sentence stays one sentence, however many slices are checked.
    assert "not worse in Answer rate, Faithfulness, Benchmark arithmetic and 8 more checks" in summary
    rows = [line for line in summary.splitlines() if line.startswith("|")]
    assert rows[0] == "| Metric | candidate | champion | difference [95% interval] | verdict |"
    # Five columns: six bars that are not escaped.
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}
    change = r"[+−]?0\.\d{3}"
    assert re.match(rf"\| Token F1 \| 0\.\d{{3}} \| 0\.\d{{3}} \| {change} \[{change}, {change}\] \| pass \|", rows[2])
    # Whole metrics before slices, and what was left out is said.
    assert [row.split("|")[1].strip() for row in rows[2:]].index("Time to first token") < 8
    assert re.search(r"^\d more checks are in the report\.$", summary, re.MULTILINE)
    assert len(summary) <= LONGEST


def test_the_summary_says_in_a_line_each_what_a_reviewer_asks_for(summary: str) -> None:
    for text in (
        "- **Worst slices:** ",
        "- **Safety: 2 findings about the candidate** (2 personal data); 1 about the champion.",
        "- **Judge** qwen2.5-7b-instruct",
        "1 of its 5 metrics may gate, the others are shown only.",
        "Kappa with people at its weakest (Factual correctness): 0.41 [0.27, 0.55], 120 labelled items.",
        f"- **Sequential:** {COUNT} of {TOTAL} items asked, 320 answers and 800 of the judge saved",
        "- **Speed and cost:** time to first token",
        "- **Changed since the champion:** base: the same; recipe: lora.rank 8 → 16; data:",
        "valid until 2026-11-28 10:00 UTC.",
    ):
        assert text in summary


def test_the_worst_slices_are_those_that_lose_most_not_those_with_most_items(made: Made) -> None:
    decision, comparison, evidence = made
    losses = {"category=culture": -0.30, "language=en": -0.10, "language=es": -0.02}
    slices = tuple(
        replace(
            one, difference=losses[one.slice], low=losses[one.slice] - 40 / one.n, high=losses[one.slice] + 40 / one.n
        )
        for one in comparison.slices
        if one.metric.name == "token_f1" and one.slice in losses
    )
    text = summary_markdown(decision, replace(comparison, slices=slices), evidence)
    (line,) = (line for line in text.splitlines() if "Worst slices" in line)
    assert re.findall(r"in (\S+) ", line) == list(losses)


def test_a_summary_that_would_grow_too_long_loses_whole_lines_from_its_end(made: Made) -> None:
    decision, comparison, evidence = made
    wide = replace(evidence, changes=["x" * 500] * 20, dataset={f"rule {n}": "x" * 500 for n in range(40)})
    text = summary_markdown(decision, comparison, wide)
    assert len(text) <= LONGEST
    assert "- **Speed and cost:**" in text
    assert "Changed since" not in text


def test_what_stands_in_the_way_comes_first(made: Made) -> None:
    _, _, evidence = made
    rules = policy({"rule": "superiority", "metric": "token_f1"}, {"rule": "superiority", "metric": "answer_rate"})
    comparison = compare(evidence.champion_scores, evidence.candidate_scores, rules)
    text = summary_markdown(decide(comparison, rules, SUBJECTS, NOW), comparison, evidence)
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert rows[2:] == ["Answer rate", "Token F1"]


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


def test_no_text_of_a_model_becomes_markup(made: Made, written: Path, summary: str) -> None:
    assert "base &lt;model&gt;" in summary
    assert not re.search(r"(?<!\\)\]\(", summary)
    page = (written / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "base &lt;model&gt;" in page
    parsed = Page(page)
    assert parsed.stack == []
    assert not {"img", "iframe", "form"} & set(parsed.opened)
    # One script, ours, and the only one that the page's policy lets run.
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert parsed.opened.count("script") == 1
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src {script_source(script)}\">" in page
    assert "scrollIntoView" in script
    # Links and drawings point inside the page, and at something that is there.
    assert all(address.startswith("#") for address in parsed.addresses)
    assert {address[1:] for address in parsed.addresses} <= parsed.names


def test_the_page_has_every_section_and_says_what_the_decision_says(made: Made, written: Path) -> None:
    decision, comparison, _ = made
    page = (written / "report.html").read_text()
    for name in (
        "differences", "slices", "examples", "scores", "sequential", "judge", "missing", "speed", "safety", "data",
        "basis",
    ):  # fmt: skip
        assert f'<h2 id="{name}">' in page, name
    shown = (
        decision.summary,
        SUBJECTS.candidate,
        "j████@████.es",
        "1 of 5",
        "passages given to both",
        "minimum_n: 100",
    )
    for text in shown:
        assert text in page
    # One picture for each metric and checked slice that has an interval, but not for zero tolerance.
    pictures = sum(1 for one in comparison.metrics if one.gain is not None) - 1
    assert page.count('class="interval"') == pictures + 5
    assert "▼" in page
    assert "5 not JSON" in page or "4 not JSON" in page


def test_the_heat_map_marks_only_what_its_interval_supports(made: Made, written: Path) -> None:
    _, comparison, _ = made
    page = (written / "report.html").read_text()
    better = sum(1 for one in comparison.slices if one.gain is not None and one.gain.low > 0)
    assert page.count('<td class="up2"') == better > 0


def test_examples_are_the_extremes(made: Made) -> None:
    examples = pick_examples(*made)
    better = [example for example in examples if example.gain > 0]
    assert (len(better), len(examples)) == (10, 20)
    found = made[1].metric("token_f1")
    assert found is not None
    assert better[0].gain == max(found.gains)
    assert min(example.gain for example in examples) == min(found.gains)
    assert better[0].candidate_answer == better[0].reference
    assert better[0].contexts
    old, new = better[0].scores["token_f1"]
    assert old is not None
    assert new is not None
    assert new - old == pytest.approx(better[0].gain)


def test_numbers_are_kept_as_json(made: Made, written: Path) -> None:
    decision, comparison, _ = made
    numbers = json.loads((written / "report.json").read_text())
    assert numbers["decision"] == json.loads(json.dumps(decision.to_json()))
    assert len(numbers["metrics"]) == len(comparison.metrics)
    assert numbers["metrics"][0]["worst_case"][0] < numbers["metrics"][0]["difference"]
    assert len(numbers["slices"]) == len(comparison.slices)
    assert numbers["stopping"]["asked"] == COUNT
    assert numbers["calibration"]["metrics"][0]["kappa"] == 0.74


def test_the_files_have_the_names_that_mlflow_shows(written: Path) -> None:
    figures = ["forest.png", "judge.png", "paired.png", "sequential.png", "spread.png", "training.png"]
    texts = ["items.html", "items.json", "report.html", "report.json", "report.md"]
    assert sorted(path.name for path in written.iterdir()) == sorted([*figures, *texts])
    assert (written / "forest.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_inputs_give_the_same_bytes(made: Made, tmp_path: Path) -> None:
    decision, comparison, evidence = made
    # Each kind of figure once is enough here.
    slices = tuple(one for one in comparison.slices if one.metric.name == "token_f1")
    few = replace(comparison, metrics=comparison.metrics[:9], slices=slices)
    names = {one.metric.name for one in few.metrics}
    before, after = (
        replace(side, columns={name: column for name, column in side.columns.items() if name in names})
        for side in (evidence.champion_scores, evidence.candidate_scores)
    )
    evidence = replace(evidence, champion_scores=before, candidate_scores=after)
    for name in ("one", "two"):
        write_report(tmp_path / name, decision, few, evidence)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 11
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_a_report_can_be_written_about_nothing(tmp_path: Path) -> None:
    empty = Scores({})
    comparison = compare(empty, empty, policy())
    decision = decide(comparison, policy(), SUBJECTS, NOW)
    bare = Evidence("assistant", "tiny", "adapter", "base model", empty, empty)
    write_report(tmp_path, decision, comparison, bare)
    assert (tmp_path / "report.md").read_text().startswith("**Gate: INCONCLUSIVE.** The evidence does not decide")
    page = (tmp_path / "report.html").read_text()
    assert "0 items" in page
    for name in ("sequential", "judge", "slices", "safety", "speed"):
        assert f'id="{name}"' not in page
        assert f'href="#{name}"' not in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]


def test_an_evaluation_that_asked_everything_claims_no_saving(made: Made) -> None:
    decision, comparison, evidence = made
    at_once = replace(evidence, stopping=Stopping(240, 240, 0, "", 480, 0))
    assert "Sequential" not in summary_markdown(decision, comparison, at_once)
    assert at_once.stopped_early is None


def test_half_a_character_and_a_formula_stop_no_report(made: Made, tmp_path: Path) -> None:
    decision, comparison, evidence = made
    first, *others = evidence.candidate_answers
    broken = replace(evidence, candidate_answers=[replace(first, answer="\ud800 yes"), *others])
    named = tuple(replace(one, slice="$\\oops$") if one.slice else one for one in decision.checks)
    write_report(tmp_path, replace(decision, checks=named), comparison, broken)
    assert "? yes" in (tmp_path / "items.html").read_text(encoding="utf-8")


def test_the_picture_of_very_many_checks_fits_a_page(made: Made) -> None:
    decision, _, _ = made
    rows = [forest_row(one.evidence, one) for one in decision.checks if one.evidence is not None]
    drawing = forest_drawing((rows * 20)[:200], 0.95)
    assert drawing is not None
    height = int.from_bytes(drawing.png[20:24], "big")
    assert height < 1500
