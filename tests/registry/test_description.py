from __future__ import annotations

from typing import Any

import pytest

from sluice.registry.description import CUT, LIMIT, SPARE, align_tables, describe

TABLE = """| Metric | Candidate | Champion | Difference (95%) | Result |
|---|---:|---:|---|---|
| **token_f1** | 0.595 | 0.256 | +0.339 [+0.291, +0.388] | pass: at least +0.020 |
| `p95` latency | 12.25 | 3.1 | | pass |"""


def page(markdown: str, verdict: str = "pass", **options: Any) -> str:
    return describe(verdict=verdict, markdown=markdown, number=7, links={"Gate run": "http://m/#/run"}, **options)


def test_the_verdict_is_the_first_line_and_its_meaning_follows() -> None:
    assert page("# Report\n\nCandidate wins.").splitlines()[0] == "### Gate: PASS"
    assert "# Report" not in page("# Report\n\nCandidate wins.").replace("### Gate", "")
    assert "Candidate wins." in page("# Report\nCandidate wins.")
    assert "not a pass" in page("", "inconclusive")


def test_only_a_version_that_may_be_approved_says_how() -> None:
    assert "`sluice approve 7 --reason '...'`" in page("x")
    assert "`sluice approve 7 --reason '...'`" in page("x", "overridden")
    assert "approve" not in page("x", "fail").replace("approves", "")
    assert "sluice approve" not in page("x", "inconclusive")


def test_a_decision_that_asks_for_two_people_says_so_and_why() -> None:
    assert "**Two people must approve** (another base model)" in page("x", second_approver="another base model")
    assert "Two people" not in page("x")
    assert "Two people" not in page("x", "fail", second_approver="another base model")


def test_a_table_becomes_aligned_text_with_figures_to_the_right() -> None:
    lines = page(f"Intro:\n\n{TABLE}\n\nEnd.").splitlines()
    start = lines.index("```text")
    assert lines[start + 1 : start + 5] == [
        "Metric       Candidate  Champion  Difference (95%)         Result",
        "token_f1         0.595     0.256  +0.339 [+0.291, +0.388]  pass: at least +0.020",
        "p95 latency      12.25       3.1                           pass",
        "```",
    ]


def test_marks_and_escapes_of_cells_are_not_shown() -> None:
    lines = page("| A | B |\n|:-|-:|\n| a\\_b &lt;i&gt; | *shown\u00a0only* |").splitlines()
    start = lines.index("```text")
    assert lines[start + 1 : start + 3] == ["A        B", "a_b <i>  shown only"]


def test_the_reports_own_verdict_is_not_said_twice() -> None:
    text = page("**Gate: PASS.** Better on all counts.\n\nMore.")
    assert text.startswith("### Gate: PASS\n\nBetter on all counts.\n\nMore.")
    assert "PASS.**" not in text


def test_a_table_too_wide_for_the_page_stays_a_table_that_wraps() -> None:
    text = page(TABLE.replace("at least +0.020", "at least +0.020 " * 3))
    assert "```" not in text
    assert "| 0.595&nbsp;&nbsp;&nbsp; |" in text
    assert "|---|---|---|---|---|" in text
    assert text.index("12.25") < text.index("\n\n&nbsp;\n\n") < text.index("**To approve:**")


def test_a_table_under_its_title_line_is_found() -> None:
    text = page(f"**By metric**\n{TABLE}")
    assert text.index("**By metric**") < text.index("```text")


def test_a_table_inside_a_code_block_is_no_table() -> None:
    difference = "```diff\n-| a | b |\n-|---|---|\n+[click](http://evil.example)\n```"
    assert align_tables(difference) == difference


def test_a_bar_within_a_cell_makes_no_other_cell() -> None:
    table = align_tables(f"| Metric | verdict |\n|:--|:--|\n| {'x' * 95}\\| 0.9 \\| pass | fail |")
    assert "x\\| 0.9 \\| pass&nbsp;" in table


def test_a_code_block_with_blank_lines_stays_whole() -> None:
    assert "```\na\n\nb | c\n```" in page("```\na\n\nb | c\n```")


def test_a_long_report_is_cut_between_blocks_and_says_so() -> None:
    text = page("\n\n".join(["First."] + ["word " * 150] * 20), picture="http://m/p.png")
    # What is said of the approval later has to fit too.
    assert len(text) <= LIMIT - SPARE
    assert "First." in text
    assert CUT in text
    assert text.index(CUT) < text.index("sluice approve") < text.index("<img")
    assert CUT not in page("First.")


@pytest.mark.parametrize("verdict", ["pass", "fail"])
def test_links_and_picture_come_last(verdict: str) -> None:
    text = page("x", verdict, picture="http://m/p.png")
    assert text.index("[Gate run](http://m/#/run)") < text.index('<img src="http://m/p.png"')
