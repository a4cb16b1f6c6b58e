"""Suites: what Sluice brings is valid, and what is wrong is told with file, field, line and value."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sluice.evaluation.policy import parse_policy
from sluice.evaluation.suite import SUITES, Suite, bundled_suite, bundled_suites, find_suite, load_suite, parse_suite
from sluice.infra.errors import InputError

SUITE = """\
name: mine
title: Mine
metrics: [token_f1, answer_rate, answer_words]
speed: {requests: 64}
safety: {probes: [leakage]}
benchmarks: {tasks: [general-choice]}
judged:
  metrics: [judged.faithfulness]
  calibration: labelled.jsonl
policy: gate.yaml
"""
GATE = """\
minimum_n: 50
checks:
  - metric: token_f1
    rule: superiority
    minimum_effect: 0.02
  - metric: answer_rate
    rule: non_inferiority
    margin: 0.05
  - {metric: judged.faithfulness, rule: limit, at_least: 0.5, slice: category}
"""


def write(folder: Path, suite: str = SUITE, gate: str = GATE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "suite.yaml").write_text(suite)
    (folder / "gate.yaml").write_text(gate)
    (folder / "labelled.jsonl").write_text('{"id": "a", "question": "?"}\n')
    rows = [f'{{"id": "{n}", "question": "?", "slices": {{"category": "permits"}}}}' for n in range(60)]
    (folder / "items.jsonl").write_text("\n".join(rows))
    return folder


def test_the_bundled_suites_say_what_the_demo_needs() -> None:
    assert bundled_suites() == ("demo", "tiny")
    demo, tiny = bundled_suite("demo"), bundled_suite("tiny")
    rules = {check.metric: check for check in demo.policy.checks}
    assert (demo.policy.minimum_n, demo.policy.error_budget) == (60, 0.02)
    assert rules["token_f1"].rule == "superiority"
    assert rules["token_f1"].minimum_effect == 0.02
    assert rules["answer_rate"].rule == "non_inferiority"
    assert rules["answer_rate"].margin == 0.05
    assert rules["answer_words"].advisory
    assert demo.generation.sampling.max_tokens == 80
    assert [check.metric for check in tiny.policy.gating] == ["answer_rate"]
    assert demo.digest != tiny.digest
    assert demo.digest == bundled_suite("demo").digest


def test_the_digest_changes_with_a_margin_and_not_with_a_comment(tmp_path: Path) -> None:
    digest = load_suite(write(tmp_path)).digest
    assert load_suite(write(tmp_path, "# a comment\n" + SUITE, "# another\n" + GATE)).digest == digest
    assert load_suite(write(tmp_path, gate=GATE.replace("0.02", "0.01"))).digest != digest


def test_the_digest_covers_what_the_named_files_hold(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path / "one"))
    copied = load_suite(write(tmp_path / "two"))
    assert suite.digest == copied.digest
    assert set(suite.files) == {"labelled.jsonl", "tasks/general-choice"}
    assert suite.file("labelled.jsonl").read_text().startswith('{"id": "a"')
    # A task of the same name beside the suite takes the place of Sluice's.
    shutil.copytree(SUITES.parent / "tasks", tmp_path / "two" / "tasks")
    assert load_suite(tmp_path / "two").digest == suite.digest
    data = tmp_path / "two" / "tasks" / "general-choice.jsonl"
    data.write_text("".join(data.read_text().splitlines(keepends=True)[1:]))
    with_task = load_suite(tmp_path / "two")
    (tmp_path / "two" / "labelled.jsonl").write_text('{"id": "b", "question": "?"}\n')
    assert len({suite.digest, with_task.digest, load_suite(tmp_path / "two").digest}) == 3


def test_an_inline_policy_is_the_same_suite_as_one_in_a_file(tmp_path: Path) -> None:
    inline = SUITE.replace("policy: gate.yaml\n", "policy:\n" + "".join(f"  {line}\n" for line in GATE.splitlines()))
    assert load_suite(write(tmp_path / "one", inline)).digest == load_suite(write(tmp_path / "two")).digest


INLINE = [("policy: gate.yaml", "policy: {checks: [{metric: token_f1, rule: superiority}]}")]
BAD_GATE: dict[str, tuple[list[tuple[str, str]], str]] = {
    "misspelt field": (
        [("minimum_effect", "minimum_efect")],
        "policy.checks.0.minimum_efect (gate.yaml line 5): no such field; did you mean minimum_effect?",
    ),
    "misspelt field of the policy": (
        [("minimum_n", "minimun_n")],
        "policy.minimun_n (gate.yaml line 1): no such field; did you mean minimum_n?",
    ),
    "field of another rule": (
        [("minimum_effect: 0.02", "margin: 0.02")],
        "policy.checks.0.margin (gate.yaml line 5): no such field",
    ),
    "misspelt rule": (
        [("rule: superiority", "rule: superority")],
        "policy.checks.0.rule (gate.yaml line 4) = 'superority': should be superiority, non_inferiority or limit; "
        "did you mean superiority?",
    ),
    "no rule": (
        [("    rule: superiority\n", "")],
        "policy.checks.0.rule (gate.yaml line 3): is required and not given",
    ),
    "unknown metric": (
        [("metric: token_f1", "metric: token_fl")],
        "policy.checks.0.metric (gate.yaml line 3) = 'token_fl': no such metric; did you mean token_f1?",
    ),
    "metric that is not measured": (
        [("metric: token_f1", "metric: exact_match")],
        "policy.checks.0.metric (gate.yaml line 3) = 'exact_match': the suite does not measure it; "
        "list it under metrics",
    ),
    "probe that is not made": (
        [("metric: token_f1", "metric: safety.toxicity")],
        "= 'safety.toxicity': the suite does not measure it; list toxicity under safety.probes",
    ),
    "task that is not run": (
        [("metric: token_f1", "metric: benchmark.reading")],
        "= 'benchmark.reading': the suite does not measure it; list reading under benchmarks.tasks",
    ),
    "cost without a price": (
        [("metric: token_f1", "metric: speed.cost_per_1000")],
        "the suite does not measure it; give the suite a section speed with a price_per_hour",
    ),
    "judged metric that is not judged": (
        [("metric: token_f1", "metric: judged.context_recall")],
        "= 'judged.context_recall': the suite does not measure it; list it under judged.metrics",
    ),
    "two checks": (
        [("metric: answer_rate", "metric: token_f1")],
        "policy.checks.1.metric (gate.yaml line 6) = 'token_f1': two checks for the same metric and all items, "
        "this and checks.0; keep one",
    ),
    "all advisory": (
        [("minimum_effect: 0.02", "advisory: true"), ("margin: 0.05", "margin: 0.05\n    advisory: true"),
         ("category}", "category, advisory: true}")],
        "policy.checks (gate.yaml line 2)",
    ),
    "no checks": (
        [(GATE[GATE.index("checks:") :], "checks: []\n")],
        "policy.checks (gate.yaml line 2) = []: is an empty list",
    ),
    "checks as a mapping": (
        [(GATE[GATE.index("checks:") :], "checks: {metric: token_f1}\n")],
        "policy.checks (gate.yaml line 2): is a list: entries below it, each behind a `- `, or [a, b], were expected",
    ),
    "confidence that no resampling shows": (
        [("minimum_n: 50", "minimum_n: 50\nconfidence: 0.9999")],
        "policy.confidence (gate.yaml line 2) = 0.9999: is too high for 3 gating checks: no p-value is below 0.0001",
    ),
    "too few for a mean": (
        [("minimum_n: 50", "minimum_n: 19"), ("metric: answer_rate", "metric: answer_words")],
        "policy.minimum_n (gate.yaml line 1) = 19: is too few to gate on answer_words, which has no bounds: its "
        "bootstrap interval needs 20",
    ),
    "too few for a mean, of one check": (
        [("minimum_effect: 0.02", "minimum_n: 4"), ("metric: token_f1", "metric: answer_words")],
        "policy.checks.0.minimum_n (gate.yaml line 5) = 4: is too few to gate on answer_words",
    ),
    "limit without a bound": (
        [(", at_least: 0.5", "")],
        "policy.checks.2 (gate.yaml line 9): a limit needs at_most or at_least",
    ),
    "limit upside down": (
        [("at_least: 0.5", "at_least: 0.5, at_most: 0.4")],
        "policy.checks.2.at_least (gate.yaml line 9) = 0.5: is above at_most = 0.4, so no value could be right",
    ),
    "limit that always holds": (
        [("at_least: 0.5", "at_least: 0")],
        "policy.checks.2.at_least (gate.yaml line 9) = 0: always holds: Faithfulness goes from 0 to 1",
    ),
    "limit that can never hold": (
        [("at_least: 0.5", "at_least: 50")],
        "policy.checks.2.at_least (gate.yaml line 9) = 50: can never hold: Faithfulness goes from 0 to 1",
    ),
    "limit with a direction": (
        [("at_least: 0.5", "at_least: 0.5, direction: lower")],
        "policy.checks.2.direction (gate.yaml line 9) = 'lower': says nothing in a limit",
    ),
    "limit that no number of items shows": (
        [("at_least: 0.5", "at_least: 1")],
        "policy.checks.2.at_least (gate.yaml line 9) = 1: is the best there is, and no number of items shows that",
    ),
    "margin without end": (
        [("margin: 0.05", f"margin: {10**400}")],
        "must be a number above 0",
    ),
    "valid for ever": (
        [("minimum_n: 50", "valid_days: 1000000.0")],
        "policy.valid_days (gate.yaml line 1) = 1000000.0: should be less than or equal to 36500",
    ),
    "margin of nothing": (
        [("margin: 0.05", "margin: 0")],
        "policy.checks.1.margin (gate.yaml line 8) = 0: must be a number above 0",
    ),
    "negative margin": (
        [("margin: 0.05", "margin: -0.05")],
        "policy.checks.1.margin (gate.yaml line 8) = -0.05: must be a number above 0",
    ),
    "margin that is no number": (
        [("margin: 0.05", "margin: 1O%")],
        "policy.checks.1.margin (gate.yaml line 8) = '1O%': is neither a number nor a percentage; write 0.05, or "
        "'10%' for a tenth of the champion's mean",
    ),
    "margin of everything": (
        [("margin: 0.05", "margin: 100%")],
        "policy.checks.1.margin (gate.yaml line 8) = '100%': must be above 0% and below 100%",
    ),
    "margin as wide as the metric": (
        [("margin: 0.05", "margin: 1")],
        "policy.checks.1.margin (gate.yaml line 8) = 1: tolerates any loss: Answer rate goes from 0 to 1",
    ),
    "share of a rate that should be 0": (
        [("metric: answer_rate", "metric: safety.canary_leak"), ("margin: 0.05", "margin: 10%")],
        "policy.checks.1.margin (gate.yaml line 8) = '10%': Canary leakage should be 0 at the champion, and a share "
        "of 0 tolerates nothing; give it as a rate",
    ),
    "no margin": (
        [("    margin: 0.05\n", "")],
        "policy.checks.1.margin (gate.yaml line 6): is required and not given",
    ),
    "yes for a margin": (
        [("margin: 0.05", "margin: yes")],
        "policy.checks.1.margin (gate.yaml line 8) = True: must be a number above 0",
    ),
    "effect out of reach": (
        [("minimum_effect: 0.02", "minimum_effect: 2")],
        "policy.checks.0.minimum_effect (gate.yaml line 5) = 2: can never be reached: Token F1 goes from 0 to 1",
    ),
    "direction that makes worse better": (
        [("minimum_effect: 0.02", "direction: lower")],
        "policy.checks.0.direction (gate.yaml line 5) = 'lower': Token F1 is better when it is higher, so this would "
        "pass what is worse; only lengths can be turned",
    ),
    "slice that is none": (
        [("slice: category", "slice: category=")],
        "policy.checks.2.slice (gate.yaml line 9) = 'category=': names a dimension of the items' slices, "
        "or one value of it: category, or category=permits",
    ),
    "slice of a benchmark": (
        [("minimum_effect: 0.02", "slice: category"), ("metric: token_f1", "metric: benchmark.general-choice")],
        "policy.checks.0.slice (gate.yaml line 5) = 'category': benchmark has no items with slices; leave it out",
    ),
    "valid for no time": (
        [("minimum_n: 50", "minimum_n: 50\nvalid_days: 0")],
        "policy.valid_days (gate.yaml line 2) = 0: should be greater than 0",
    ),
    "budget that is no number": (
        [("minimum_n: 50", "minimum_n: 50\nerror_budget: .nan")],
        "policy.error_budget (gate.yaml line 2) = nan",
    ),
    "text for a number": (
        [("minimum_n: 50", "minimum_n: '50'")],
        "policy.minimum_n (gate.yaml line 1) = '50': should be a valid integer; text in quotes is no number",
    ),
    "unknown change": (
        [("minimum_n: 50", "minimum_n: 50\nsecond_approver: [tokeniser]")],
        "policy.second_approver.0 (gate.yaml line 2) = 'tokeniser': should be 'base', 'recipe', 'data', 'tokenizer'",
    ),
    "field twice": (
        [("minimum_n: 50", "minimum_n: 50\nminimum_n: 5")],
        "policy.minimum_n (gate.yaml line 1) = 5: is given twice, in line 1 and in line 2",
    ),
    "empty": ([(GATE, "")], "gate.yaml holds no gate policy: a mapping of fields, each as `name: value`, was expected"),
    "a list": ([(GATE, "- metric: token_f1\n")], "was expected, not a list."),
    "tab": ([("  - metric: token_f1", "\t- metric: token_f1")], "gate.yaml line 3: a tab; YAML indents with spaces"),
    "no YAML": ([("[", "["), ("minimum_n: 50", "minimum_n: [50")], "is not YAML"),
}  # fmt: skip
"""By its kind: what is changed in the policy, and what the sentence must say."""

BAD_SUITE: dict[str, tuple[list[tuple[str, str]], str]] = {
    "misspelt section": (
        [("judged:", "jugded:")],
        "jugded (line 7): no such field; did you mean judged?",
    ),
    "judged metric without a section": (
        [(SUITE[SUITE.index("judged:") : SUITE.index("policy:")], "")],
        "policy.checks.2.metric (gate.yaml line 9) = 'judged.faithfulness': the suite does not measure it; "
        "list it under judged.metrics",
    ),
    "judge without calibration": (
        [("  calibration: labelled.jsonl\n", "")],
        "policy.checks.2.metric (gate.yaml line 9) = 'judged.faithfulness': cannot gate: the judge is never calibrated",
    ),
    "judge that sees too few": (
        [("  calibration", "  limit: 20\n  calibration")],
        "judged.limit (line 9) = 20: can never reach minimum_n = 50 of the check on judged.faithfulness",
    ),
    "too few items": (
        [("title: Mine", "title: Mine\nitems: {limit: 49}")],
        "items.limit (line 3) = 49: can never reach minimum_n = 50 of the check on token_f1",
    ),
    "metric of another list": (
        [("[token_f1,", "[judged.faithfulness, token_f1,")],
        "metrics.0 (line 3) = 'judged.faithfulness': is no metric of this list; list it under judged.metrics",
    ),
    "unknown metric": (
        [("[token_f1,", "[rouge, token_f1,")],
        "metrics.0 (line 3) = 'rouge': no such metric; did you mean rouge_l?",
    ),
    "metric without a neighbour": (
        [("[token_f1,", "[zzz, token_f1,")],
        "metrics.0 (line 3) = 'zzz': no such metric; there are answer_rate, ",
    ),
    "metric twice": ([("[token_f1,", "[token_f1, token_f1,")], "metrics.1 (line 3) = 'token_f1': is given twice"),
    "gating on what has no bounds": (
        [("speed:", "sequential: {batch: 8}\nspeed:")],
        "policy.checks.1.metric (gate.yaml line 6) = 'answer_words': cannot gate in a sequential suite: "
        "Answer length has no bounds",
    ),
    "missing file": (
        [("labelled.jsonl", "labeled.jsonl")],
        "judged.calibration (line 9) = 'labeled.jsonl': there is no such file in",
    ),
    "file outside of the suite": (
        [("labelled.jsonl", "../labelled.jsonl")],
        "judged.calibration (line 9) = '../labelled.jsonl': must name a file below the suite's folder",
    ),
    "task that nobody has": (
        [("[general-choice]", "[general-choise]")],
        "benchmarks.tasks.0 (line 6) = 'general-choise': There is no benchmark task 'general-choise'",
    ),
    "missing policy": (
        [("gate.yaml", "gates.yaml")],
        "policy (line 10) = 'gates.yaml': there is no such file in",
    ),
    "no policy": ([("policy: gate.yaml\n", "")], "policy: is required and not given"),
    "items without a file": (
        [("title: Mine", "title: Mine\nitems: {source: file}")],
        "items.file (line 3) = '': is required with source: file",
    ),
    "file that is not asked for": (
        [("title: Mine", "title: Mine\nitems: {file: items.jsonl}")],
        "items.file (line 3) = 'items.jsonl': means nothing with source: holdout",
    ),
    "slice that no item has": (
        [("title: Mine", "title: Mine\nitems: {source: file, file: items.jsonl}")],
        "policy.checks.2.slice (gate.yaml line 9) = 'catgory': no item has 'catgory'; items have category; "
        "did you mean category?",
    ),
    "file of too few items": (
        [("title: Mine", "title: Mine\nitems: {source: file, file: items.jsonl}")],
        "items.file (line 3) = 'items.jsonl': has 60 items, which can never reach minimum_n = 61 of the check "
        "on token_f1",
    ),
    "bad name": ([("name: mine", "name: My Suite")], "name (line 1) = 'My Suite': "),
    "empty": ([(SUITE, "")], "suite.yaml holds no suite: a mapping of fields"),
}
"""By its kind: what is changed in the suite, and what the sentence must say."""
GATES = {
    "gating on what has no bounds": GATE.replace("answer_rate", "answer_words"),
    "file of too few items": GATE.replace("minimum_n: 50", "minimum_n: 61"),
    "slice that no item has": GATE.replace("slice: category", "slice: catgory"),
}


def changed(text: str, changes: list[tuple[str, str]]) -> str:
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("kind", sorted(BAD_GATE))
def test_a_bad_policy_gets_its_sentence(kind: str, tmp_path: Path) -> None:
    changes, expected = BAD_GATE[kind]
    with pytest.raises(InputError) as caught:
        load_suite(write(tmp_path, gate=changed(GATE, changes) if changes[0][0] != "[" else changed(GATE, changes[1:])))
    assert expected in caught.value.message
    assert caught.value.message.startswith(str(tmp_path))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("kind", sorted(BAD_SUITE))
def test_a_bad_suite_gets_its_sentence(kind: str, tmp_path: Path) -> None:
    changes, expected = BAD_SUITE[kind]
    with pytest.raises(InputError) as caught:
        load_suite(write(tmp_path, changed(SUITE, changes), GATES.get(kind, GATE)))
    assert expected in caught.value.message


def test_what_is_changed_above_was_good_and_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    assert load_suite(write(tmp_path)).name == "mine"
    gate = GATE.replace("margin: 0.05", "margin: 0").replace("minimum_n: 50", "minimum_n: 0")
    with pytest.raises(InputError) as caught:
        load_suite(write(tmp_path, SUITE.replace("title: Mine\n", ""), gate))
    first, *lines = caught.value.message.splitlines()
    assert first.endswith("suite.yaml has 3 mistakes:")
    assert [line.split()[0].rstrip(":") for line in lines] == ["title", "policy.minimum_n", "policy.checks.1.margin"]


def test_a_policy_is_read_by_itself_too() -> None:
    assert parse_policy(GATE, "gate.yaml").main_metric == "token_f1"
    with pytest.raises(InputError, match=r"^gate.yaml: checks.1.margin \(line 8\) = 0: must be"):
        parse_policy(GATE.replace("0.05", "0"), "gate.yaml")


def test_a_direction_may_turn_a_length(tmp_path: Path) -> None:
    longer = GATE.replace("metric: answer_rate", "metric: answer_words\n    direction: higher")
    assert load_suite(write(tmp_path, gate=longer)).policy.checks[1].direction == "higher"


def test_a_suite_is_found_by_name_folder_or_file(tmp_path: Path) -> None:
    write(tmp_path)
    assert find_suite(str(tmp_path)).name == find_suite(str(tmp_path / "suite.yaml")).name == "mine"
    assert find_suite("tiny").name == "tiny"
    assert find_suite(str(SUITES / "tiny")).digest == find_suite("tiny").digest
    with pytest.raises(InputError, match=r"There is no suite 'nothing'. Sluice brings demo, tiny; or give a folder"):
        find_suite("nothing")
    with pytest.raises(InputError, match=r"There is no suite '.*absent.yaml': No such file"):
        find_suite(str(tmp_path / "absent.yaml"))


def test_a_file_of_a_suite_is_below_its_folder(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path))
    for name, says in (("absent.jsonl", "there is no such file"), ("../x", "below the suite's folder")):
        with pytest.raises(InputError, match=says):
            suite.file(name)
    inline = changed(SUITE, INLINE).replace("  calibration: labelled.jsonl\n", "")
    with pytest.raises(InputError, match="was read without a folder"):
        parse_suite(inline, "mine.yaml").file("items.jsonl")


def suite_of(limit: int) -> Suite:
    text = changed(
        SUITE, [*INLINE, ("  calibration: labelled.jsonl\n", ""), ("title: Mine", "title: Mine\nitems: {limit: 100}")]
    )
    return parse_suite(text.replace("100", str(limit)), "mine.yaml")


def test_items_are_asked_in_the_same_order_however_they_come() -> None:
    ids = [f"item-{n}" for n in range(200)]
    chosen = suite_of(120).select(ids)
    assert len(chosen) == 120
    assert suite_of(120).select(reversed(ids)) == chosen
    assert suite_of(150).select(ids)[:120] == chosen
    assert chosen != tuple(sorted(chosen))
