"""The gate: better passes, worse fails, and what nobody knows never passes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sluice.evaluation.catalogue import catalogue
from sluice.evaluation.comparison import compare
from sluice.evaluation.gate import Subjects, decide, read_decision
from sluice.evaluation.scores import Column, Scores, column, scores_of
from sluice.evaluation.suite import bundled_suite
from sluice.infra.errors import InputError
from sluice.provenance.canonical import digest_json
from tests.evaluation.scores import NOW, SUBJECTS, gate, policy, scores

N = 120
RNG = np.random.default_rng(1)
BASE = RNG.uniform(0.05, 0.5, N).tolist()
BETTER = [min(1.0, x + d) for x, d in zip(BASE, RNG.uniform(-0.1, 0.5, N), strict=True)]
ANSWERED = [1.0] * N


def test_a_better_candidate_passes_and_says_so_in_words() -> None:
    decision = gate(scores(token_f1=BASE, answer_rate=ANSWERED), scores(token_f1=BETTER, answer_rate=ANSWERED))
    assert decision.verdict == "pass"
    assert "may replace the champion: on 120 held-out questions its answers are better in Token F1" in decision.summary
    assert [result.verdict for result in decision.checks] == ["pass", "pass"]


def test_a_worse_candidate_fails() -> None:
    decision = gate(scores(token_f1=BETTER, answer_rate=ANSWERED), scores(token_f1=BASE, answer_rate=ANSWERED))
    assert decision.verdict == "fail"
    assert "must not replace the champion" in decision.summary
    assert "not better than the champion" in decision.reasons[0]


def test_a_candidate_that_stops_answering_fails_however_good_its_words() -> None:
    silent = [0.0 if n % 3 == 0 else 1.0 for n in range(N)]
    decision = gate(scores(token_f1=BASE, answer_rate=ANSWERED), scores(token_f1=BETTER, answer_rate=silent))
    assert decision.verdict == "fail"
    assert "worse in Answer rate (0.667 against 1.000)" in decision.summary


def test_the_same_answers_do_not_pass() -> None:
    same = scores(token_f1=BASE, answer_rate=ANSWERED)
    decision = gate(same, same)
    assert decision.verdict == "inconclusive"
    assert decision.reasons == (
        "Token F1 0.000 [−0.029, +0.029]: not one of 120 items scores otherwise; 120 items would show 0.029.",
        "Answer rate 0.000 [−0.031, +0.031]: a drop of 0.05 is excluded.",
    )
    many = scores(token_f1=BASE * 2, answer_rate=ANSWERED * 2)
    assert gate(many, many).reasons[0] == (
        "Token F1 0.000 [−0.016, +0.016]: not better by 0.02, which the interval excludes."
    )


def test_a_small_gain_is_inconclusive_and_says_how_many_items_it_needs() -> None:
    noisy = np.clip(np.array(BASE) + np.random.default_rng(2).normal(0.01, 0.2, N), 0, 1).tolist()
    decision = gate(scores(token_f1=BASE, answer_rate=ANSWERED), scores(token_f1=noisy, answer_rate=ANSWERED))
    assert decision.verdict == "inconclusive"
    assert "the champion stays" in decision.summary
    assert "items would show 0.02" in decision.reasons[0]


def test_a_sure_gain_below_the_minimum_effect_does_not_pass() -> None:
    little = (np.array(BASE * 5) + np.random.default_rng(2).uniform(0.0, 0.02, N * 5)).tolist()
    champion = scores(token_f1=BASE * 5, answer_rate=ANSWERED * 5)
    decision = gate(champion, scores(token_f1=little, answer_rate=ANSWERED * 5))
    assert decision.verdict == "fail"
    assert "not better by 0.02, which the interval excludes" in decision.reasons[0]


def test_less_is_better_where_the_metric_says_so() -> None:
    rules = policy({"rule": "non_inferiority", "metric": "answer_words", "margin": 10})
    short = np.random.default_rng(3).integers(20, 40, N).astype(float)
    assert gate(scores(answer_words=short.tolist()), scores(answer_words=(short + 3).tolist()), rules).verdict == "pass"
    wordy = (short + np.random.default_rng(4).uniform(15, 60, N)).tolist()
    exploded = gate(scores(answer_words=short.tolist()), scores(answer_words=wordy), rules)
    assert exploded.verdict == "fail"
    assert gate(scores(answer_words=wordy), scores(answer_words=short.tolist()), rules).verdict == "pass"


def test_an_advisory_check_is_shown_and_does_not_gate() -> None:
    checks = [{**check.model_dump(), "advisory": check.metric == "token_f1"} for check in policy().checks]
    decision = gate(
        scores(token_f1=BETTER, answer_rate=ANSWERED), scores(token_f1=BASE, answer_rate=ANSWERED), policy(*checks)
    )
    assert decision.verdict == "pass"
    assert decision.checks[0].verdict == "fail"


def test_too_few_items_too_many_errors_and_none_at_all_are_inconclusive_each_with_its_message() -> None:
    def decided(champion: Scores, candidate: Scores) -> str:
        decision = gate(champion, candidate)
        assert decision.verdict == "inconclusive"
        return decision.reasons[0]

    few = decided(
        scores(token_f1=BASE[:99], answer_rate=ANSWERED[:99]), scores(token_f1=BETTER[:99], answer_rate=ANSWERED[:99])
    )
    assert "99 items have scores on both sides, and the policy needs 100" in few
    holes = [None if n < 3 else x for n, x in enumerate(BETTER)]
    errors = decided(scores(token_f1=BASE, answer_rate=ANSWERED), scores(token_f1=holes, answer_rate=ANSWERED))
    assert "3 of 120 items (2.5%) lack a score (3 timeout), and the error budget is 2.0%" in errors
    nothing = decided(Scores({}), Scores({}))
    assert "0 items" in nothing
    one = decided(scores(token_f1=[0.1], answer_rate=[1.0]), scores(token_f1=[0.9], answer_rate=[1.0]))
    assert "1 item has scores on both sides, and the policy needs 100" in one
    unmeasured = decided(scores(answer_rate=ANSWERED), scores(answer_rate=ANSWERED))
    assert unmeasured == "token_f1: it was not measured."
    other = scores(token_f1=BETTER, answer_rate=ANSWERED)
    renamed = scores_of(
        Column(one.metric, {f"x{i}": value for i, value in one.values.items()}) for one in other.columns.values()
    )
    assert "240 of 240 items (100.0%) lack a score" in decided(scores(token_f1=BASE, answer_rate=ANSWERED), renamed)


def test_two_errors_of_120_are_within_the_budget() -> None:
    holes = [None if n < 2 else x for n, x in enumerate(BETTER)]
    decision = gate(scores(token_f1=BASE, answer_rate=ANSWERED), scores(token_f1=holes, answer_rate=ANSWERED))
    assert decision.verdict == "pass"
    assert decision.to_json()["checks"][0]["missing"] == {"timeout": 2}


NO_VALUE = st.sampled_from([None, math.nan, math.inf, -math.inf])


@settings(max_examples=30, deadline=None)
@given(
    champion_holes=st.dictionaries(st.integers(0, N - 1), NO_VALUE, max_size=40),
    candidate_holes=st.dictionaries(st.integers(0, N - 1), NO_VALUE, max_size=40),
    metric=st.sampled_from(["token_f1", "answer_rate"]),
)
@example(champion_holes={}, candidate_holes=dict.fromkeys(range(N), math.nan), metric="token_f1")
@example(champion_holes=dict.fromkeys(range(N), math.inf), candidate_holes={}, metric="answer_rate")
def test_what_is_no_number_never_helps(
    champion_holes: dict[int, float | None], candidate_holes: dict[int, float | None], metric: str
) -> None:
    """A comparison that would pass does so only while the items without a number stay within the budget."""

    def punched(values: list[float], holes: dict[int, float | None]) -> list[float | None]:
        return [holes.get(n, value) for n, value in enumerate(values)]

    champion: dict[str, list[float | None]] = {"token_f1": [*BASE], "answer_rate": [*ANSWERED]}
    candidate: dict[str, list[float | None]] = {"token_f1": [*BETTER], "answer_rate": [*ANSWERED]}
    champion[metric] = punched(BASE if metric == "token_f1" else ANSWERED, champion_holes)
    candidate[metric] = punched(BETTER if metric == "token_f1" else ANSWERED, candidate_holes)
    decision = gate(scores(**champion), scores(**candidate))
    lost = len({*champion_holes, *candidate_holes})
    if lost > 0.02 * N:
        assert decision.verdict == "inconclusive"
        assert f"{lost} of 120 items" in " ".join(decision.reasons)
    else:
        # Two equal rates of 118 exclude a drop of 0.05 as those of 120 do.
        assert decision.verdict == "pass"
    json.dumps(decision.to_json(), allow_nan=False)


def test_equal_models_are_called_superior_no_more_often_than_alpha_says() -> None:
    """A/A: two draws of the same skewed score, 200 times. One-sided alpha 0.025; at most 5% with tolerance."""
    rng = np.random.default_rng(77)
    rules = policy({"rule": "superiority", "metric": "token_f1"}, minimum_n=60)
    passed = 0
    for _ in range(200):
        ability = rng.beta(0.6, 1.2, 60)
        draws = [np.where(rng.random(60) < ability, 1.0, rng.beta(2, 5, 60)).tolist() for _ in "ab"]
        passed += gate(scores(token_f1=draws[0]), scores(token_f1=draws[1]), rules).verdict == "pass"
    assert passed <= 10


def test_holm_counts_the_gating_checks_only() -> None:
    # 16 gained and 5 lost: McNemar's p is 0.0133, below 0.025 alone, above it times two.
    before, after = [0.0] * 16 + [1.0] * 5 + [1.0] * 99, [1.0] * 16 + [0.0] * 5 + [1.0] * 99
    alone = policy({"rule": "superiority", "metric": "exact_match"})
    assert gate(scores(exact_match=before), scores(exact_match=after), alone).verdict == "pass"
    both = ({"rule": "superiority", "metric": "exact_match"}, {"rule": "superiority", "metric": "token_f1"})
    champion = scores(exact_match=before, token_f1=BASE)
    weak = np.clip(np.array(BASE) + np.random.default_rng(9).normal(0.0, 0.2, N), 0, 1).tolist()
    decision = gate(champion, scores(exact_match=after, token_f1=weak), policy(*both))
    assert decision.checks[0].verdict == "inconclusive"
    assert "not after correction" in decision.checks[0].reason
    uncorrected = gate(champion, scores(exact_match=after, token_f1=weak), policy(*both, correction="none"))
    assert uncorrected.checks[0].verdict == "pass"
    advisory = policy(both[0], {**both[1], "advisory": True})
    assert gate(champion, scores(exact_match=after, token_f1=weak), advisory).verdict == "pass"


def test_the_same_scores_give_the_same_bytes_in_whatever_order() -> None:
    champion, candidate = (scores(token_f1=column, answer_rate=ANSWERED) for column in (BASE, BETTER))

    def backwards(given: Scores) -> Scores:
        columns = [
            replace(one, values=dict(sorted(one.values.items(), reverse=True))) for one in given.columns.values()
        ]
        return scores_of(reversed(columns), dict(sorted(given.outcomes.items(), reverse=True)))

    one = gate(champion, candidate).to_json()
    assert digest_json(one) == digest_json(gate(backwards(champion), backwards(candidate)).to_json())
    assert digest_json(one) != digest_json(gate(candidate, champion).to_json())


def test_the_decision_names_everything_it_rests_on_and_when_it_ends() -> None:
    champion, candidate = (scores(token_f1=column, answer_rate=ANSWERED) for column in (BASE, BETTER))
    decision = gate(champion, candidate)
    report = digest_json("report")
    document = decision.with_report(report).to_json()
    assert [document[name] for name in ("candidate", "champion", "holdout", "suite", "index")] == [
        SUBJECTS.candidate, SUBJECTS.champion, SUBJECTS.holdout, SUBJECTS.suite, SUBJECTS.index,
    ]  # fmt: skip
    assert (decision.to_json()["report"], document["report"]) == (None, report)
    assert (document["created"], document["expires"]) == ("2026-11-21T10:00:00+00:00", "2026-11-28T10:00:00+00:00")
    rules = policy()
    shorter = decide(compare(champion, candidate, rules), rules, SUBJECTS, NOW, longest_valid_hours=1)
    assert shorter.expires == "2026-11-21T11:00:00+00:00"
    longer = decide(compare(champion, candidate, rules), rules, SUBJECTS, NOW, longest_valid_hours=9999)
    assert longer.expires == decision.expires


def test_what_is_no_digest_or_no_moment_is_refused() -> None:
    with pytest.raises(InputError, match=r"champion = 'latest'"):
        Subjects(SUBJECTS.candidate, "latest", SUBJECTS.holdout, SUBJECTS.suite)
    with pytest.raises(InputError, match="report"):
        gate(scores(token_f1=BASE), scores(token_f1=BETTER)).with_report("v1")
    comparison = compare(scores(token_f1=BASE), scores(token_f1=BETTER), policy())
    with pytest.raises(InputError, match="no time zone"):
        decide(comparison, policy(), SUBJECTS, datetime(2026, 1, 1))
    with pytest.raises(InputError, match="confidence"):
        decide(comparison, policy(confidence=0.9), SUBJECTS, datetime(2026, 1, 1, tzinfo=UTC))


def test_the_tiny_suite_passes_two_equal_models_and_stops_a_collapse() -> None:
    rules = bundled_suite("tiny").policy
    cut_off = scores(answer_rate=[0.0] * 8, token_f1=[0.0] * 8)
    assert gate(cut_off, cut_off, rules).verdict == "pass"
    well = scores(answer_rate=[1.0] * 8, token_f1=[0.5] * 8)
    assert gate(well, well, rules).verdict == "pass"
    # Eight items cannot prove a loss of more than 0.27; they do keep a collapsed model from passing.
    collapsed = gate(well, cut_off, rules)
    assert collapsed.verdict == "inconclusive"
    assert "[−1.000, −0.266]: a drop of 0.5 is not excluded" in collapsed.reasons[0]
    assert gate(well, scores(answer_rate=[None] + [1.0] * 7, token_f1=[0.5] * 8), rules).verdict == "inconclusive"


def half_lost() -> tuple[Scores, Scores]:
    """30% of the judge's answers are lost at random places on the candidate's side."""
    lost = set(np.random.default_rng(8).choice(N, 36, replace=False).tolist())
    sides = []
    for values, holes in ((BASE, set()), (BETTER, lost)):
        found: dict[str, float | str] = {f"{n:04}": "not JSON" if n in holes else v for n, v in enumerate(values)}
        sides.append(scores_of([column(catalogue()["judged.faithfulness"], found, judge="a")]))
    return sides[0], sides[1]


def test_thirty_percent_judge_errors_are_inconclusive_with_the_worst_case_in_the_sentence() -> None:
    rules = policy({"rule": "superiority", "metric": "judged.faithfulness"}, minimum_n=50)
    decision = gate(*half_lost(), rules)
    assert decision.verdict == "inconclusive"
    found = decision.checks[0].evidence
    assert found is not None
    assert found.low is not None
    assert found.low > 0, "what is left would pass"
    assert decision.reasons == (
        "Faithfulness: 36 of 120 items (30.0%) lack a score (36 not JSON), and the error budget is 2.0%; "
        "the difference would be +0.057 if all of them went against the candidate, +0.357 if all went for it.",
    )
    assert decision.summary.startswith("The evidence does not decide, so the champion stays. Faithfulness: 36 of 120")


@pytest.mark.parametrize(
    ("champion", "candidate", "says"),
    [
        ([], [], "token_f1: it was not measured."),
        ([0.2], [0.9], "Token F1: 1 item has scores on both sides, and the policy needs 100."),
        (
            [0.2] * N,
            [math.nan] * N,
            "Token F1: 120 of 120 items (100.0%) lack a score (120 not a finite number), and the error budget is 2.0%; "
            "the difference would be −0.200 if all of them went against the candidate, +0.800 if all went for it.",
        ),
        (
            [0.2] * N,
            [0.9] * 110,
            "Token F1: 10 of 120 items (8.3%) lack a score (10 missing), and the error budget is 2.0%; the difference "
            "would be +0.625 if all of them went against the candidate, +0.708 if all went for it.",
        ),
    ],
)
def test_what_cannot_speak_has_its_exact_message(
    champion: list[float | None], candidate: list[float | None], says: str
) -> None:
    rules = policy({"rule": "superiority", "metric": "token_f1"})
    old, new = (scores(token_f1=side) if side else scores(answer_rate=[1.0]) for side in (champion, candidate))
    decision = gate(old, new, rules)
    assert (decision.verdict, decision.reasons) == ("inconclusive", (says,))


def test_no_items_at_all_and_the_message() -> None:
    decision = gate(Scores({}), Scores({}))
    assert decision.reasons == (
        "token_f1: there is nothing to compare, the suite gave 0 items.",
        "answer_rate: there is nothing to compare, the suite gave 0 items.",
    )


def test_many_thousand_items_take_seconds_and_decide() -> None:
    rng = np.random.default_rng(11)
    before = rng.uniform(0, 1, 30_000)
    after = np.clip(before + rng.normal(0.03, 0.2, len(before)), 0, 1)
    rules = policy(
        {"rule": "superiority", "metric": "token_f1"},
        {"rule": "non_inferiority", "metric": "answer_words", "margin": 1, "advisory": True},
    )
    old, new = (scores(token_f1=v.tolist(), answer_words=(v * 40).tolist()) for v in (before, after))
    decision = gate(old, new, rules)
    assert decision.verdict == "pass"
    found = decision.checks[0].evidence
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert 0 < found.high - found.low < 0.02
    assert found.low < (after - before).mean() < found.high


def test_a_decision_is_read_back_as_it_was_written() -> None:
    rules = policy(
        {"rule": "superiority", "metric": "token_f1", "slice": "category"},
        {"rule": "non_inferiority", "metric": "token_f1", "margin": "10%", "slice": "category=waste", "minimum_n": 5},
        {"rule": "limit", "metric": "answer_rate", "at_least": 0.5},
        {"rule": "non_inferiority", "metric": "judged.faithfulness", "margin": 0.1},
        second_approver=["base", "data"],
    )
    slices = {f"{n:04}": {"category": "waste" if n % 4 else "roads"} for n in range(N)}
    champion = scores(token_f1=[None, *BASE[1:]], answer_rate=ANSWERED)
    comparison = compare(champion, scores(token_f1=BETTER, answer_rate=ANSWERED), rules, slices=slices)
    decision = decide(comparison, rules, SUBJECTS, NOW, changes={"data", "recipe"}).with_report(digest_json("report"))
    document = json.loads(json.dumps(decision.to_json()))
    read = read_decision(document)
    assert read.to_json() == document
    assert read.second_approver_because == ("another dataset",)
    assert (document["approvers"], decide(comparison, rules, SUBJECTS, NOW, changes={"recipe"}).approvers) == (2, 1)
    assert [one.check for one in read.checks] == [one.check for one in decision.checks]
    for field, value in (("version", 2), ("checks", [{}]), ("policy", {}), ("candidate", "x")):
        with pytest.raises(InputError):
            read_decision({**document, field: value})
    with pytest.raises(InputError, match="no decision of a gate"):
        read_decision({})
