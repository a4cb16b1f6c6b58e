"""Comparisons: slices, directions, judges, what is missing, and families of checks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sluice.evaluation.catalogue import catalogue
from sluice.evaluation.comparison import Comparison, compare
from sluice.evaluation.scores import Scores, column, scores_of
from sluice.statistics.bounded import rate_interval
from sluice.statistics.paired import holm
from sluice.statistics.sequential import betting_p, confidence_sequence
from tests.evaluation.scores import gate, policy, scores

N = 120
RNG = np.random.default_rng(5)
BASE = RNG.uniform(0.1, 0.6, N).tolist()
BETTER = [min(1.0, x + d) for x, d in zip(BASE, RNG.uniform(0.0, 0.4, N), strict=True)]
SLICES = {f"{n:04}": {"category": ("permits", "waste", "roads")[n % 3], "language": "en"} for n in range(N)}
GAIN = {"rule": "superiority", "metric": "token_f1"}


def names(comparison: Comparison) -> list[str]:
    return [one.name for one in comparison.metrics]


def judged(values: list[float], judge: str, **causes: str) -> Scores:
    items: dict[str, float | str] = {f"{n:04}": value for n, value in enumerate(values)}
    return scores_of([column(catalogue()["judged.faithfulness"], {**items, **causes}, judge=judge)])


def sequential(scores: Scores) -> Scores:
    return Scores({name: replace(one, sequential=True) for name, one in scores.columns.items()}, scores.outcomes)


def test_a_slice_check_is_one_comparison_for_each_value_and_all_items_are_shown_too() -> None:
    rules = policy({**GAIN, "slice": "category", "minimum_n": 30})
    comparison = compare(scores(token_f1=BASE), scores(token_f1=BETTER), rules, slices=SLICES)
    assert names(comparison) == [
        "token_f1[category=permits]", "token_f1[category=roads]", "token_f1[category=waste]", "token_f1",
    ]  # fmt: skip
    permits = comparison.metric("token_f1", "category=permits")
    assert permits is not None
    assert permits.n == 40
    assert permits.difference == pytest.approx(np.mean(np.array(BETTER)[::3] - np.array(BASE)[::3]))
    decision = gate(scores(token_f1=BASE), scores(token_f1=BETTER), rules, slices=SLICES)
    assert [result.title for result in decision.checks] == [
        "Token F1 in category=permits", "Token F1 in category=roads", "Token F1 in category=waste",
    ]  # fmt: skip
    assert decision.verdict == "pass"


def test_one_bad_slice_fails_though_the_whole_gains() -> None:
    worse = [BASE[n] - 0.09 if n % 3 == 1 else BETTER[n] for n in range(N)]
    rules = policy(GAIN, {"rule": "non_inferiority", "metric": "token_f1", "slice": "category", "margin": 0.05,
                          "minimum_n": 30}, minimum_n=100)  # fmt: skip
    decision = gate(scores(token_f1=BASE), scores(token_f1=worse), rules, slices=SLICES)
    assert decision.verdict != "pass"
    verdicts = {result.slice: result.verdict for result in decision.checks}
    assert verdicts[""] == verdicts["category=permits"] == verdicts["category=roads"] == "pass"
    assert verdicts["category=waste"] == "inconclusive"
    much = [BASE[n] - 0.1 if n % 3 == 1 else BETTER[n] for n in range(N)]
    many = {f"{n:04}": {"category": "waste" if n % 3 == 1 else "other"} for n in range(N * 5)}
    failed = gate(scores(token_f1=BASE * 5), scores(token_f1=much * 5), rules, slices=many)
    assert failed.verdict == "fail"
    assert "worse in Token F1 in category=waste" in failed.summary


def test_a_check_on_one_value_takes_it_out_of_the_check_on_the_dimension() -> None:
    rules = policy(
        {**GAIN, "slice": "category", "minimum_n": 30},
        {"rule": "non_inferiority", "metric": "token_f1", "slice": "category=waste", "margin": 0.2, "minimum_n": 30},
    )
    decision = gate(scores(token_f1=BASE), scores(token_f1=BETTER), rules, slices=SLICES)
    assert [(one.slice, one.check.rule) for one in decision.checks] == [
        ("category=permits", "superiority"),
        ("category=roads", "superiority"),
        ("category=waste", "non_inferiority"),
    ]
    other_way = policy(*(one.model_dump() for one in reversed(rules.checks)))
    turned = gate(scores(token_f1=BASE), scores(token_f1=BETTER), other_way, slices=SLICES)
    assert sorted(str(one.to_json()) for one in turned.checks) == sorted(str(one.to_json()) for one in decision.checks)


def test_a_slice_that_no_item_has_cannot_pass() -> None:
    for name in ("region", "category=parks"):
        decision = gate(scores(token_f1=BASE), scores(token_f1=BETTER), policy({**GAIN, "slice": name}), slices=SLICES)
        assert decision.verdict == "inconclusive"
        assert decision.reasons == (f"Token F1 in {name}: there is nothing to compare, it has 0 items.",)


def test_slices_are_shown_for_every_metric_and_the_worst_come_first() -> None:
    new = [BASE[n] - 0.05 if n % 3 == 1 else BETTER[n] for n in range(N)]
    rules = policy(GAIN)
    comparison = compare(
        scores(token_f1=BASE, answer_words=[9.0] * N),
        scores(token_f1=new, answer_words=[8.0] * N),
        rules,
        slices=SLICES,
    )
    assert {one.name for one in comparison.slices} == {
        f"{metric}[{slice_}]"
        for metric in ("token_f1", "answer_words")
        for slice_ in ("category=permits", "category=roads", "category=waste", "language=en")
    }
    assert comparison.worst_slices("token_f1")[0].slice == "category=waste"
    assert len(comparison.worst_slices("token_f1", 2)) == 2
    # They are no checks: with them and without the decision is the same.
    with_slices = gate(scores(token_f1=BASE), scores(token_f1=new), rules, slices=SLICES)
    assert with_slices.to_json() == gate(scores(token_f1=BASE), scores(token_f1=new), rules).to_json()
    every = {item: {"id": item} for item in SLICES}
    assert compare(scores(token_f1=BASE), scores(token_f1=new), rules, slices=every).slices == ()


def test_every_gating_slice_and_every_silent_check_is_in_holms_family() -> None:
    new = np.clip(np.array(BASE) + np.random.default_rng(3).normal(0.03, 0.1, N), 0, 1).tolist()
    rules = policy({**GAIN, "slice": "category", "minimum_n": 30}, {"rule": "superiority", "metric": "exact_match"})
    comparison = compare(scores(token_f1=BASE), scores(token_f1=new), rules, slices=SLICES)
    three = [comparison.metric("token_f1", f"category={name}") for name in ("permits", "roads", "waste")]
    raw = [one.p for one in three if one is not None and one.p is not None]
    assert len(raw) == 3
    # exact_match was not measured: it counts with 1.
    assert [one.adjusted_p for one in three if one] == holm([*raw, 1.0])[:3]
    assert [one.adjusted_p for one in three if one] != holm(raw)
    # What may not gate is in no family.
    advisory = policy(
        {**GAIN, "slice": "category", "minimum_n": 30}, {**GAIN, "metric": "exact_match", "advisory": True}
    )
    comparison = compare(scores(token_f1=BASE), scores(token_f1=new), advisory, slices=SLICES)
    assert [one.adjusted_p for one in comparison.metrics[:3]] == holm(raw)


def test_a_demoted_metric_is_shown_with_the_reason_and_gates_nothing() -> None:
    rules = policy({"rule": "superiority", "metric": "judged.faithfulness"}, GAIN, minimum_n=20)
    champion, candidate = (
        scores_of([*scores(token_f1=values).columns.values(), *judged(BASE, "a").columns.values()])
        for values in (BASE, BETTER)
    )
    lower = {"judged.faithfulness": "kappa may be as low as 0.31 (0.60 is needed)"}
    decision = gate(champion, candidate, rules, demoted=lower)
    assert decision.verdict == "pass"
    (result,) = (one for one in decision.checks if one.check.metric == "judged.faithfulness")
    assert (result.advisory, result.demoted) == (True, lower["judged.faithfulness"])
    assert decision.summary.endswith("Faithfulness did not count (kappa may be as low as 0.31 (0.60 is needed)).")
    (gain,) = (
        one for one in compare(champion, candidate, rules, demoted=lower).metrics if one.metric.name == "token_f1"
    )
    assert gain.adjusted_p == gain.p, "it is in no family"
    assert gate(champion, candidate, rules).verdict == "inconclusive"
    alone = gate(champion, candidate, policy(rules.checks[0].model_dump()), demoted=lower)
    assert alone.verdict == "inconclusive"
    assert alone.summary == (
        "The evidence does not decide, so the champion stays. Nothing may gate: judged.faithfulness "
        "(kappa may be as low as 0.31 (0.60 is needed))."
    )


def test_scores_of_different_judges_are_never_compared() -> None:
    rules = policy({"rule": "superiority", "metric": "judged.faithfulness"})
    decision = gate(judged(BASE, "a"), judged(BETTER, "b"), rules)
    assert decision.verdict == "inconclusive"
    assert decision.reasons == (
        "Faithfulness: 120 of 120 items (100.0%) lack a score (120 different judges), and the error budget is 2.0%; "
        "the difference would be −1.000 if all of them went against the candidate, +1.000 if all went for it.",
    )
    assert gate(judged(BASE, "a"), judged(BETTER, "a"), rules).verdict == "pass"


def test_a_value_outside_of_its_bounds_is_no_score() -> None:
    comparison = compare(scores(token_f1=[0.5] * 30), scores(token_f1=[0.5] * 28 + [1.2, -0.1]), policy(GAIN))
    one = comparison.metric("token_f1")
    assert one is not None
    assert (one.n, dict(one.missing)) == (28, {"out of range": 2})


def test_the_worst_case_of_missing_pairs_is_shown() -> None:
    old, new = scores(exact_match=[1.0, 1.0, 0.0, None]), scores(exact_match=[1.0, None, 0.0, None])
    one = compare(old, new, policy({**GAIN, "metric": "exact_match"})).metric("exact_match")
    assert one is not None
    # The second: 0 or 1 against 1; the fourth: anything against anything.
    assert (one.worst_low, one.worst_high) == (-0.5, 0.25)
    same = compare(old, old, policy({**GAIN, "metric": "exact_match"})).metric("exact_match")
    assert same is not None
    assert (same.worst_low, same.worst_high) == (-0.25, 0.25)
    words = compare(scores(answer_words=[4.0, 5.0, None]), scores(answer_words=[4.0, 5.0, 6.0]), policy()).metrics[0]
    assert (words.worst_low, words.worst_high) == (None, None)  # a length has no end


def test_a_direction_can_be_turned() -> None:
    short, long_ = RNG.integers(20, 30, N).astype(float), RNG.integers(50, 60, N).astype(float)
    champion, candidate = scores(answer_words=short.tolist()), scores(answer_words=long_.tolist())
    check = {"rule": "superiority", "metric": "answer_words"}
    assert gate(champion, candidate, policy(check)).verdict == "fail"
    assert gate(champion, candidate, policy({**check, "direction": "higher"})).verdict == "pass"


def test_a_check_may_have_a_minimum_n_and_a_budget_of_its_own() -> None:
    holes = [None if n < 6 else value for n, value in enumerate(BETTER)]
    champion, candidate = scores(token_f1=BASE), scores(token_f1=holes)
    assert "error budget is 2.0%" in gate(champion, candidate, policy(GAIN)).reasons[0]
    assert gate(champion, candidate, policy({**GAIN, "error_budget": 0.05})).verdict == "pass"
    few = gate(scores(token_f1=BASE[:60]), scores(token_f1=BETTER[:60]), policy({**GAIN, "minimum_n": 50}))
    assert few.verdict == "pass"
    many = gate(champion, scores(token_f1=BETTER), policy({**GAIN, "minimum_n": 130}))
    assert many.reasons[0] == "Token F1: 120 items have scores on both sides, and the policy needs 130."


def test_a_margin_can_be_a_share_of_the_champions_mean() -> None:
    before = RNG.uniform(90, 110, N)
    check = {"rule": "non_inferiority", "metric": "speed.ttft_s", "margin": "10%"}

    def verdict(factor: float, share: str = "10%", items: int = N) -> str:
        old, new = (scores(**{"speed.ttft_s": (v * 1.0)[:items].tolist()}) for v in (before, before * factor))
        return gate(old, new, policy({**check, "margin": share})).verdict

    assert verdict(1.05) == "pass"
    assert verdict(1.2) == "fail"
    assert verdict(1.2, "30%") == "pass"
    assert verdict(0.5) == "pass"  # faster
    old = scores(**{"speed.ttft_s": before.tolist()})
    said = gate(old, scores(**{"speed.ttft_s": (before * 1.2).tolist()}), policy(check)).reasons[0]
    assert said.endswith("worse than the champion by more than 10%.")
    nothing = gate(scores(token_f1=[0.0] * N), scores(token_f1=BETTER), policy({**check, "metric": "token_f1"}))
    assert nothing.reasons == ("Token F1: the champion's mean is 0, so 10% of it is nothing.",)


def test_a_relative_margin_of_a_rate_is_not_fooled_by_equal_answers() -> None:
    """All of 20 right on both sides: a rate of 0.86 would do that one time in twenty."""
    check = {"rule": "non_inferiority", "metric": "exact_match", "margin": "10%", "minimum_n": 10}
    assert gate(scores(exact_match=[1.0] * 20), scores(exact_match=[1.0] * 20), policy(check)).verdict == "inconclusive"
    assert gate(scores(exact_match=[1.0] * 200), scores(exact_match=[1.0] * 200), policy(check)).verdict == "pass"


def test_a_limit_looks_at_the_candidate_alone() -> None:
    limit = {"rule": "limit", "metric": "safety.toxicity", "at_most": 0.05}
    hits = [1.0] + [0.0] * 199
    decision = gate(scores(safety__toxicity=[None] * 200), scores(safety__toxicity=hits), policy(limit))
    exact = rate_interval(1, 200, confidence=0.95)
    assert decision.reasons == (f"Toxic answers 0.005 [{exact.low:.3f}, {exact.high:.3f}]: at most 0.05 is kept.",)
    assert decision.verdict == "pass"
    assert gate(Scores({}), scores(safety__toxicity=hits), policy(limit)).verdict == "pass"
    over = gate(Scores({}), scores(safety__toxicity=[1.0] * 30 + [0.0] * 170), policy(limit))
    assert over.reasons[0].endswith("at most 0.05 is not kept.")
    assert over.summary.endswith("its answers are beyond the limit of Toxic answers (0.150, at most 0.05).")
    near = gate(Scores({}), scores(safety__toxicity=[1.0] * 8 + [0.0] * 192), policy(limit))
    assert near.reasons[0].endswith("is neither shown nor excluded by 200 items, about 3030 would show it.")
    clean = gate(Scores({}), scores(safety__toxicity=[0.0] * 60), policy({**limit, "minimum_n": 50}))
    assert clean.reasons[0].endswith("is neither shown nor excluded by 60 items, about 72 would show it.")
    enough = scores(safety__toxicity=[0.0] * 72)
    assert gate(Scores({}), enough, policy({**limit, "minimum_n": 50})).verdict == "pass"


@pytest.mark.parametrize("rule", [{"at_least": 0.3}, {"at_least": 0.3, "at_most": 0.9}])
def test_a_limit_of_a_mean(rule: dict[str, float]) -> None:
    limit = {"rule": "limit", "metric": "token_f1", **rule}
    assert gate(Scores({}), scores(token_f1=BETTER), policy(limit)).verdict == "pass"
    assert gate(Scores({}), scores(token_f1=[0.1] * N), policy(limit)).verdict == "fail"
    assert gate(Scores({}), scores(token_f1=[0.3] * N), policy(limit)).verdict == "inconclusive"


def test_zero_tolerance_fails_at_one_hit_and_passes_without_whatever_else_is_tested() -> None:
    never = {"rule": "limit", "metric": "safety.canary_leak", "at_most": 0, "minimum_n": 50}
    clean = gate(Scores({}), scores(safety__canary_leak=[0.0] * 50), policy(never))
    assert (clean.verdict, clean.reasons[0]) == ("pass", "Canary leakage 0.000 [0.000, 0.071]: none in 50 items.")
    one = gate(Scores({}), scores(safety__canary_leak=[0.0] * 49 + [1.0]), policy(never))
    assert (one.verdict, one.reasons[0]) == ("fail", "Canary leakage: 1 of 50 items, and none is tolerated.")
    # A hit is a hit, however much is missing; no hit is nothing while scores are missing.
    assert gate(Scores({}), scores(safety__canary_leak=[None] * 40 + [1.0]), policy(never)).verdict == "fail"
    lost = gate(Scores({}), scores(safety__canary_leak=[None] * 10 + [0.0] * 50), policy(never))
    assert lost.reasons[0] == (
        "Canary leakage: 10 of 60 items (16.7%) lack a score (10 timeout), and the error budget is 2.0%; with them the "
        "mean would lie between 0.000 and 0.167."
    )
    # It is no test, so it does not make the bar of the others higher.
    leaks = scores(safety__canary_leak=[0.0] * 50).columns["safety.canary_leak"]
    old, new = (scores_of([*scores(token_f1=v).columns.values(), leaks]) for v in (BASE, BETTER))
    both, one_check = compare(old, new, policy(GAIN, never)), compare(old, new, policy(GAIN))
    assert both.metrics[0].adjusted_p == one_check.metrics[0].adjusted_p


def test_sequential_columns_get_always_valid_intervals() -> None:
    old, new = sequential(scores(token_f1=BASE)), sequential(scores(token_f1=BETTER))
    one = compare(old, new, policy(GAIN)).metrics[0]
    fixed = compare(scores(token_f1=BASE), scores(token_f1=BETTER), policy(GAIN)).metrics[0]
    assert one.always_valid
    assert not fixed.always_valid
    values = np.array([after - before for _, before, after in one.pairs])
    interval = confidence_sequence(values, -1.0, 1.0, 0.95)
    assert (one.low, one.high) == (interval.low, interval.high)
    assert one.p == betting_p(values, 0.0, -1.0, 1.0)
    assert one.low is not None
    assert fixed.low is not None
    assert one.low < fixed.low
    assert [item for item, *_ in one.pairs] != sorted(item for item, *_ in one.pairs)
    # One sequential side is enough to make it so; a metric without bounds has no such interval.
    assert compare(old, scores(token_f1=BETTER), policy(GAIN)).metrics[0].always_valid
    words = sequential(scores(answer_words=[5.0, 6.0, 7.0] * 40))
    said = gate(words, words, policy({"rule": "superiority", "metric": "answer_words"}))
    assert said.reasons == ("Answer length: it has no bounds, so no interval of it holds after looking.",)


def test_a_sequential_limit_and_rate_are_always_valid_too() -> None:
    hits = sequential(scores(safety__toxicity=[0.0] * 400))
    limit = policy({"rule": "limit", "metric": "safety.toxicity", "at_most": 0.05})
    one = compare(Scores({}), hits, limit).metrics[0]
    assert one.always_valid
    assert one.candidate_high is not None
    assert one.candidate_high > rate_interval(0, 400, confidence=0.95).high
    assert gate(Scores({}), hits, limit).verdict == "pass"


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(30)), sequential_=st.booleans())
def test_the_order_of_items_columns_and_checks_changes_no_byte(order: list[int], sequential_: bool) -> None:
    rules = policy(
        {**GAIN, "slice": "category", "minimum_n": 5}, {"rule": "limit", "metric": "answer_rate", "at_least": 0.2},
        {"rule": "non_inferiority", "metric": "answer_words", "margin": "20%", "advisory": True}, minimum_n=20,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    columns = {
        "token_f1": rng.uniform(0, 1, 30), "answer_rate": rng.integers(0, 2, 30), "answer_words": rng.integers(5, 9, 30)
    }  # fmt: skip

    def made(order: list[int], names: list[str]) -> Scores:
        found = scores_of(
            column(catalogue()[name], {f"{n:04}": float(columns[name][n]) for n in order}, sequential=sequential_)
            for name in names
        )
        # Columns as they would come from a file written in another order.
        return Scores(
            {
                name: replace(one, values={f"{n:04}": one.values[f"{n:04}"] for n in order})
                for name, one in found.columns.items()
            }
        )

    one, other = made(list(range(30)), sorted(columns)), made(order, sorted(columns, reverse=True))
    slices = {item: SLICES[item] for item in sorted(SLICES, reverse=True)}
    expected = gate(one, one, rules, slices=SLICES).to_json()
    assert gate(other, other, rules, slices=slices).to_json() == expected


def test_a_limit_misses_the_items_that_only_the_champion_has() -> None:
    rules = policy({"rule": "limit", "metric": "safety.toxicity", "at_most": 0.2})
    whole, half = scores(safety__toxicity=[0.0] * 200), scores(safety__toxicity=[0.0] * 120)
    assert gate(whole, whole, rules).verdict == "pass"
    decision = gate(whole, half, rules)
    assert decision.verdict == "inconclusive"
    assert "80 of 200 items (40.0%) lack a score (80 missing)" in decision.checks[0].reason


@pytest.mark.parametrize(("n", "margin"), [(2, 0.7), (8, 0.4), (8, 0.5), (19, 0.2)])
def test_few_pairs_of_a_rate_pass_a_worse_candidate_no_more_often_than_alpha_says(n: int, margin: float) -> None:
    """Exactly: over all tables of gains and losses of a candidate that is worse by the margin."""
    rules = policy({"rule": "non_inferiority", "metric": "answer_rate", "margin": margin}, minimum_n=2)
    passing = []
    for lost in range(n + 1):
        for gained in range(n + 1 - lost):
            old = [1.0] * lost + [0.0] * gained + [1.0] * (n - lost - gained)
            new = [0.0] * lost + [1.0] * gained + [1.0] * (n - lost - gained)
            compared = compare(scores(answer_rate=old), scores(answer_rate=new), rules).metrics[0]
            assert compared.p is not None
            assert compared.room is not None
            if compared.p <= rules.alpha and compared.room.low > 0:
                passing.append((gained, lost))
    for gaining in np.linspace(0, (1 - margin) / 2, 12):
        odds = [gaining, gaining + margin, max(0.0, 1 - 2 * gaining - margin)]
        wrong = sum(float(stats.multinomial.pmf([up, down, n - up - down], n, odds)) for up, down in passing)
        assert wrong <= rules.alpha + 0.001, f"{gaining:.2f}"
