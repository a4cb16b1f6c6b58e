"""Suites: what Sluice brings is valid, and what is misspelt is refused with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice.evaluation.suite import bundled_suite, find_suite, parse_suite
from sluice.infra.errors import InputError

SUITE = """
name: mine
title: Mine
metrics: [token_f1, answer_rate]
policy:
  minimum_n: 50
  checks:
    - {metric: token_f1, rule: superiority, minimum_effect: 0.02}
"""


def test_the_bundled_suites_say_what_the_demo_needs() -> None:
    demo, tiny = bundled_suite("demo"), bundled_suite("tiny")
    rules = {check.metric: check for check in demo.policy.checks}
    assert (demo.policy.minimum_n, demo.policy.error_budget) == (100, 0.02)
    assert rules["token_f1"].rule == "superiority"
    assert rules["token_f1"].minimum_effect == 0.02
    assert rules["answer_rate"].null == -0.05
    assert rules["answer_words"].advisory
    assert demo.generation.sampling.max_tokens == 80
    assert [check.metric for check in tiny.policy.gating] == ["answer_rate"]
    assert demo.digest != tiny.digest
    assert demo.digest == bundled_suite("demo").digest


def test_the_digest_changes_with_a_margin_and_not_with_a_comment() -> None:
    suite = parse_suite(SUITE, "mine.yaml")
    assert parse_suite("# a comment\n" + SUITE, "mine.yaml").digest == suite.digest
    assert parse_suite(SUITE.replace("0.02", "0.01"), "mine.yaml").digest != suite.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("minimum_effect: 0.02", "minimum_efect: 0.02"), r"minimum_efect.*[Ee]xtra"),
        (("rule: superiority, minimum_effect: 0.02", "rule: non_inferiority"), r"margin: Field required"),
        (("rule: superiority", "rule: better"), r"better"),
        (("metric: token_f1", "metric: token_f2"), r"'token_f2' is unknown; there are token_f1"),
        (("[token_f1, answer_rate]", "[answer_rate]"), r"checks 'token_f1', which `metrics` does not list"),
        (("minimum_n: 50", "minimum_n: 1"), r"policy.minimum_n.*greater than or equal to 2 \(got 1\)"),
        (("minimum_n: 50", "minimum_n: 19"), r"minimum_n = 19 is too few to gate on the mean 'token_f1'"),
        (("minimum_n: 50", "minimum_n: 50\n  error_budget: .nan"), r"error_budget"),
        (("minimum_effect: 0.02", "advisory: true"), r"every check is advisory"),
        (("title: Mine", "title: Mine\nitems: {limit: 49}"), r"items.limit = 49 can never reach"),
        (("0.02}", "0.02}\n    - {metric: token_f1, rule: non_inferiority, margin: 1}"), r"two checks"),
        (("name: mine", "name: [mine"), r"is not YAML"),
    ],
)
def test_a_wrong_suite_is_refused_naming_the_place(change: tuple[str, str], message: str) -> None:
    assert change[0] in SUITE
    with pytest.raises(InputError, match=message):
        parse_suite(SUITE.replace(*change), "mine.yaml")


def test_a_suite_is_found_by_name_or_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(SUITE)
    assert find_suite(str(tmp_path / "mine.yaml")).name == "mine"
    assert find_suite("tiny").name == "tiny"
    with pytest.raises(InputError, match="no suite 'nothing'"):
        find_suite("nothing")
    with pytest.raises(InputError, match="cannot be read"):
        find_suite(str(tmp_path / "absent.yaml"))


def test_a_limit_selects_the_same_items_in_whatever_order() -> None:
    suite = parse_suite(SUITE.replace("title: Mine", "title: Mine\nitems: {limit: 60}"), "mine.yaml")
    ids = [f"item-{n}" for n in range(100)]
    chosen = suite.select(ids)
    assert len(chosen) == 60
    assert set(suite.select(reversed(ids))) == set(chosen)
    assert [i for i in ids if i in chosen] == list(chosen)
    assert chosen != tuple(ids[:60])
