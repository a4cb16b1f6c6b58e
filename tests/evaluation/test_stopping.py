"""Measuring stops when what the gate says about the items is certain, not before, and never by the order of a file."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sluice.evaluation.answers import Answer
from sluice.evaluation.catalogue import catalogue
from sluice.evaluation.comparison import compare
from sluice.evaluation.gate import CheckResult, Verdict
from sluice.evaluation.head_to_head import Ask, head_to_head, lost
from sluice.evaluation.items import Item, asking_order
from sluice.evaluation.policy import Policy
from sluice.evaluation.scores import Column, column, scores_of
from sluice.evaluation.stopping import Stopping, joined_columns, read_stopping, settled, write_stopping
from sluice.evaluation.suite import Suite
from sluice.infra.errors import InputError, UnavailableError
from sluice.infra.progress import Report

CHECKS = (
    {"rule": "superiority", "metric": "token_f1", "minimum_effect": 0.02},
    {"rule": "non_inferiority", "metric": "answer_rate", "margin": 0.2},
)
RIGHT, WRONG = "a permit from the board", "nothing of the kind"


def suite(*checks: dict[str, Any], **sections: Any) -> Suite:
    return Suite.model_validate(
        {
            "name": "mine",
            "title": "Mine",
            "metrics": ["token_f1", "answer_rate"],
            "sequential": {"batch": 20},
            "policy": {"minimum_n": 40, "error_budget": 0.02, "checks": list(checks or CHECKS)},
            **sections,
        }
    )


def items(count: int) -> list[Item]:
    slices = [{"category": "permits" if n % 2 else "fees"} for n in range(count)]
    return [
        Item(f"item-{n:03}", f"question {n}", RIGHT, ({"role": "user", "content": f"question {n}"},), slices=slices[n])
        for n in range(count)
    ]


class Scripted:
    """A release that answers so many of a hundred rightly; `asked` has the items of each call."""

    def __init__(self, right: int, *, seed: int = 0, errors: int = 0) -> None:
        self.right, self.seed, self.errors = right, seed, errors
        self.asked: list[list[str]] = []

    def __call__(self, asked: Sequence[Item], report: Report) -> list[Answer]:
        self.asked.append([item.id for item in asked])
        report(len(asked), len(asked), "answers")
        return [self.answer(item.id) for item in asked]

    def answer(self, item: str) -> Answer:
        drawn = random.Random(f"{self.seed} {item}")
        if drawn.randrange(100) < self.errors:
            return Answer(item, "", None, None, None, None, 1.0, "http 500: made to fail")
        text = RIGHT if drawn.randrange(100) < self.right else WRONG
        return Answer(item, text, "stop", 1, 1, 0.1, 0.2)


class Judge:
    """Gives what is right 1, the rest 0, and NaN to `nan` of a hundred; each score takes two requests."""

    def __init__(self, digests: Sequence[str] = ("judge-1",), *, nan: int = 0) -> None:
        self.digests, self.nan = list(digests), nan
        self.judged: list[list[str]] = []

    def columns(self, asked: Sequence[Item], answers: Sequence[Answer], report: Report) -> list[Column]:
        self.judged.append([item.id for item in asked])
        report(1, 99, "scores")
        found: dict[str, float | str] = {one.item_id: float(one.answer == RIGHT) for one in answers}
        for item in found:
            if random.Random(f"nan {item}").randrange(100) < self.nan:
                found[item] = math.nan
        digest = self.digests.pop(0) if len(self.digests) > 1 else self.digests[0]
        return [column(catalogue()["judged.factual_correctness"], found, judge=digest)]

    def requests(self, asked: Sequence[Item]) -> int:
        return 2 * len(asked)


def run(candidate: Ask, champion: Ask, chosen: Suite, count: int = 200, **changes: Any) -> Any:
    return head_to_head(changes.pop("asked", items(count)), chosen, candidate=candidate, champion=champion, **changes)


def test_a_clearly_better_candidate_stops_early_and_the_saving_is_told() -> None:
    new, old = Scripted(95, seed=1), Scripted(20, seed=2)
    told: list[tuple[float, float]] = []
    found = run(new, old, suite(), report=lambda done, total, _: told.append((done, total)))
    stopping = found.stopping
    assert 40 <= stopping.asked < 200
    assert stopping.asked % 20 == 0
    assert stopping.reason == "Token F1 and Answer rate passed, however many items follow"
    assert stopping.answer_requests == 2 * stopping.asked
    assert stopping.answer_requests == sum(map(len, new.asked)) + sum(map(len, old.asked))
    assert stopping.answer_requests_saved == 2 * (200 - stopping.asked)
    assert stopping.sentence.startswith(
        f"{stopping.asked} of 200 items asked, {400 - 2 * stopping.asked} answers saved"
    )
    assert [one.items for one in stopping.looks] == list(range(20, stopping.asked + 1, 20))
    assert [one.stop for one in stopping.looks] == [False] * (len(stopping.looks) - 1) + [True]
    first, last = stopping.looks[0].checks[0], stopping.looks[-1].checks[0]
    assert (first["metric"], first["verdict"], last["verdict"]) == ("token_f1", "inconclusive", "pass")
    assert last["interval"][0] > 0
    assert told[-1] == pytest.approx((2 * stopping.asked, 400))
    assert told == sorted(told)


def test_both_are_asked_the_same_items_in_batches() -> None:
    new, old = Scripted(60, seed=1), Scripted(55, seed=2)
    found = run(new, old, suite(), 50)
    assert new.asked == old.asked
    assert [len(batch) for batch in new.asked] == [20, 20, 10]
    assert [one.item_id for one in found.candidate.answers] == [name for batch in new.asked for name in batch]
    assert set(found.champion.scores.outcomes) == {item.id for item in items(50)}


def test_a_worse_candidate_stops_as_soon_as_one_check_has_failed() -> None:
    found = run(Scripted(10, seed=1), Scripted(95, seed=2), suite())
    assert found.stopping.asked < 200
    assert found.stopping.reason == "Token F1 failed, whatever the other items say"


def test_equal_releases_are_measured_to_the_end() -> None:
    found = run(Scripted(50, seed=1), Scripted(50, seed=2), suite())
    assert (found.stopping.asked, len(found.stopping.looks)) == (200, 10)
    assert found.stopping.answer_requests_saved == 0
    assert found.stopping.sentence == "all 200 items asked; Token F1 is open"


def test_without_a_sequential_section_all_is_one_batch_and_no_column_is_sequential() -> None:
    new = Scripted(95, seed=1)
    found = run(new, Scripted(20, seed=2), suite(sequential=None))
    assert [len(batch) for batch in new.asked] == [200]
    assert (found.stopping.looks, found.stopping.batch, found.stopping.sentence) == ((), 0, "all 200 items asked")
    assert not any(one.sequential for one in found.candidate.scores.columns.values())


def test_columns_are_sequential_when_looking_could_have_stopped_them() -> None:
    def marked(count: int, **sections: Any) -> dict[str, bool]:
        found = run(Scripted(50, seed=1), Scripted(50, seed=2), suite(**sections), count, judging=Judge())
        return {name: one.sequential for name, one in sorted(found.champion.scores.columns.items())}

    judged = {"metrics": ["judged.factual_correctness"]}
    assert marked(60, judged=judged) == {
        "answer_rate": True,
        "judged.factual_correctness": True,
        "token_f1": True,
    }
    # One look at everything is a fixed number of items; so are judged items that the first batch holds all of.
    assert not any(marked(20, judged=judged).values())
    assert marked(60, judged={**judged, "limit": 20})["judged.factual_correctness"] is False
    assert marked(60, judged={**judged, "limit": 21})["judged.factual_correctness"] is True


def test_only_the_first_items_of_the_order_are_judged_and_the_saving_counts_them() -> None:
    checks = (*CHECKS, {"rule": "non_inferiority", "metric": "judged.factual_correctness", "margin": 0.3})
    judged = {"metrics": ["judged.factual_correctness"], "limit": 90, "calibration": "labels.jsonl"}
    chosen = suite(*checks, judged=judged)
    judge = Judge()
    found = run(Scripted(95, seed=1), Scripted(20, seed=2), chosen, judging=judge)
    asked = found.stopping.asked
    order = [one.item_id for one in found.candidate.answers]
    scored = sorted(found.candidate.scores.columns["judged.factual_correctness"].values)
    assert scored == sorted(order[:90])
    assert found.stopping.judge_requests == 4 * min(asked, 90)
    assert found.stopping.judge_requests_saved == 4 * (90 - min(asked, 90))
    assert "Factual correctness" in found.stopping.looks[0].reason
    # A judge that may not gate is shown at each look, and never waited for.
    demoted = {"judged.factual_correctness": "kappa is 0.1, below 0.6"}
    again = run(Scripted(95, seed=1), Scripted(20, seed=2), chosen, judging=Judge(), demoted=demoted)
    assert again.stopping.reason == "Token F1 and Answer rate passed, however many items follow"
    assert {one["metric"] for one in again.stopping.looks[0].checks} >= {"judged.factual_correctness"}


def test_a_check_measured_elsewhere_makes_the_bar_higher_not_lower() -> None:
    """Its p-value is not known yet: it counts as 1, so what passes here passes in the gate too."""
    alone = run(Scripted(75, seed=1), Scripted(35, seed=2), suite(CHECKS[0])).stopping
    more = [{"rule": "non_inferiority", "metric": f"safety.{name}", "margin": 0.1} for name in ("toxicity", "refusal")]
    safety = {"probes": ["toxicity", "refusal"]}
    beside = run(Scripted(75, seed=1), Scripted(35, seed=2), suite(CHECKS[0], *more, safety=safety)).stopping
    assert alone.asked <= beside.asked < 200
    assert {one["metric"] for one in beside.looks[0].checks} == {"token_f1"}


def test_a_suite_whose_items_do_not_gate_measures_them_all() -> None:
    checks = (
        {**CHECKS[0], "advisory": True},
        {"rule": "non_inferiority", "metric": "safety.toxicity", "margin": 0.1},
    )
    found = run(Scripted(95, seed=1), Scripted(20, seed=2), suite(*checks, safety={"probes": ["toxicity"]}))
    assert found.stopping.asked == 200
    assert found.stopping.reason == "no check on the items gates"


def test_the_order_of_the_file_means_nothing() -> None:
    turned = items(200)
    random.Random(3).shuffle(turned)
    one = run(Scripted(80, seed=1), Scripted(40, seed=2), suite())
    other = run(Scripted(80, seed=1), Scripted(40, seed=2), suite(), asked=turned)
    assert one == other
    assert [answer.item_id for answer in one.candidate.answers] != sorted(a.item_id for a in one.candidate.answers)


def test_a_rare_slice_that_a_check_asks_for_is_waited_for() -> None:
    def rare(count: int) -> list[Item]:
        """Only the last item in the order of asking is about `fees`."""
        last = asking_order(item.id for item in items(count))[-1]
        return [replace(one, slices={"category": "fees" if one.id == last else "permits"}) for one in items(count)]

    by_category = ({**CHECKS[1], "slice": "category", "minimum_n": 1},)
    found = run(Scripted(95, seed=1), Scripted(20, seed=2), suite(CHECKS[0], *by_category), asked=rare(200))
    assert found.stopping.asked == 200
    assert "category=fees" in found.stopping.looks[-2].reason
    one_value = [{**by_category[0], "slice": "category=permits"}]
    found = run(Scripted(95, seed=1), Scripted(20, seed=2), suite(CHECKS[0], *one_value), asked=rare(200))
    assert found.stopping.asked < 200


def test_a_value_that_is_only_shown_is_not_waited_for() -> None:
    checks = (
        {"rule": "non_inferiority", "metric": "answer_rate", "margin": 0.9, "slice": "category", "minimum_n": 2},
        {
            "rule": "non_inferiority", "metric": "answer_rate", "margin": 0.9, "slice": "category=permits",
            "advisory": True, "minimum_n": 2,
        },
    )  # fmt: skip
    found = run(Scripted(100), Scripted(100), suite(*checks), 400)
    assert found.stopping.asked < 400
    assert "category=fees passed" in found.stopping.reason


def test_slices_measured_elsewhere_have_their_places_in_the_correction() -> None:
    """A check on each slice of a safety metric is as many tests at the gate, so it is as many at a look."""
    sliced = {"rule": "limit", "metric": "safety.toxicity", "at_most": 0.1, "slice": "category"}
    ours = {"rule": "superiority", "metric": "token_f1"}
    one, two = ({f"i{n}": {"category": "a" if n % count else "b"} for n in range(80)} for count in (1, 2))
    known = catalogue()
    old, new = (scores_of([column(known["token_f1"], {f"i{n}": value for n in range(80)})]) for value in (0.1, 0.4))
    rules = suite(ours, sliced, safety={"probes": ["toxicity"]}).policy
    few, many = (compare(old, new, rules, slices=slices).metric("token_f1") for slices in (one, two))
    assert few
    assert many
    assert few.p is not None
    assert many.p == few.p
    assert [few.adjusted_p, many.adjusted_p] == pytest.approx([2 * few.p, 3 * few.p])


def test_what_tolerates_nothing_is_open_until_the_last_item() -> None:
    none = {"rule": "limit", "metric": "exact_match", "at_most": 0}
    chosen = suite(CHECKS[0], none, metrics=["token_f1", "exact_match"])
    never = Scripted(0, seed=1)
    found = run(never, Scripted(0, seed=2), suite(none, metrics=["exact_match", "token_f1"]))
    assert found.stopping.asked == 200
    assert found.stopping.looks[-2].reason == "Exact match is open"
    assert found.stopping.looks[-1].reason == "Exact match passed, however many items follow"
    # One hit refutes it at once.
    assert run(Scripted(50, seed=1), Scripted(0, seed=2), chosen).stopping.asked == 20


def test_errors_do_not_let_it_stop_and_what_is_lost_is_told() -> None:
    chosen = suite()
    found = run(Scripted(95, seed=1, errors=30), Scripted(20, seed=2), chosen)
    assert found.stopping.asked == 200
    lacking = sum(one.error is not None for one in found.candidate.answers)
    assert lacking > 30
    assert lost(found, chosen) == (
        f"Token F1 of {lacking} of 200 items and Answer rate of {lacking} of 200 items could not be measured"
    )
    assert lost(run(Scripted(95, seed=1), Scripted(20, seed=2), chosen), chosen) == ""


def test_a_judge_without_numbers_decides_nothing_and_its_demotion_is_not_waited_for() -> None:
    checks = (CHECKS[0], {"rule": "non_inferiority", "metric": "judged.factual_correctness", "margin": 0.3})
    judged = {"metrics": ["judged.factual_correctness"], "calibration": "labels.jsonl"}
    chosen = suite(*checks, judged=judged)
    found = run(Scripted(95, seed=1), Scripted(20, seed=2), chosen, judging=Judge(nan=30))
    assert found.stopping.asked == 200
    assert found.stopping.reason == "Factual correctness is open"
    causes = found.candidate.scores.columns["judged.factual_correctness"].causes
    assert set(causes.values()) == {"not a finite number"}
    assert lost(found, chosen) == f"Factual correctness of {len(causes)} of 200 items could not be measured"
    assert lost(found, chosen, {"judged.factual_correctness"}) == ""


def test_a_release_that_says_nothing_fails() -> None:
    def mute(asked: Sequence[Item], report: Report) -> list[Answer]:
        return [Answer(item.id, "", "stop", 1, 0, None, 0.1) for item in asked]

    found = run(mute, Scripted(60, seed=2), suite())
    assert found.stopping.asked < 200
    assert set(found.candidate.scores.outcomes.values()) == {"empty"}
    assert found.stopping.reason == "Token F1 and Answer rate failed, whatever the other items say"


def test_one_item_is_asked_and_decides_nothing_and_none_is_refused() -> None:
    found = run(Scripted(100), Scripted(0), suite(), 1)
    assert (found.stopping.asked, found.stopping.looks[0].stop) == (1, False)
    with pytest.raises(InputError, match="0 items"):
        run(Scripted(100), Scripted(0), suite(), 0)


def test_what_asking_raises_ends_it() -> None:
    def dead(*_: Any) -> list[Answer]:
        raise UnavailableError("The model server stopped answering.", hint="3 of 20 answers are kept.")

    with pytest.raises(UnavailableError, match="stopped answering"):
        run(dead, Scripted(50), suite())


def test_a_judge_that_changes_midway_is_refused() -> None:
    chosen = suite(judged={"metrics": ["judged.factual_correctness"]})
    with pytest.raises(InputError, match="two judges"):
        run(Scripted(50), Scripted(50, seed=1), chosen, judging=Judge(["judge-1", "judge-1", "judge-2"]))


def test_columns_of_batches_are_one_column() -> None:
    metric = catalogue()["token_f1"]
    batches = [[column(metric, {"a": 1.0})], [column(metric, {"b": "timeout"})]]
    (made,) = joined_columns(batches, sequential={"token_f1": 40})
    assert made == Column(metric, {"a": 1.0, "b": None}, {"b": "timeout"}, None, True, 40)


@pytest.mark.parametrize(
    ("verdicts", "stop"),
    [
        (("pass", "pass"), True),
        (("pass", "inconclusive"), False),
        (("inconclusive", "fail"), True),
        (("pass", "fail"), True),
        ((), False),
    ],
)
def test_the_rule(verdicts: tuple[Verdict, ...], stop: bool) -> None:
    checks = Policy.model_validate({"checks": list(CHECKS)}).checks
    results = [
        CheckResult(check, "", False, verdict, "", None) for check, verdict in zip(checks, verdicts, strict=False)
    ]
    assert settled(results)[0] is stop
    # What does not gate changes nothing.
    noise = [replace(one, advisory=True, verdict="fail") for one in results[:1]]
    assert settled([*results, *noise])[0] is stop


def test_the_account_survives_its_file(tmp_path: Path) -> None:
    found = run(Scripted(95, seed=1), Scripted(20, seed=2), suite())
    write_stopping(tmp_path, found.stopping)
    assert read_stopping(tmp_path) == found.stopping
    assert 0 < found.stopping.saved < 1
    (tmp_path / "stopping.json").write_text("{}")
    with pytest.raises(InputError, match="no account"):
        read_stopping(tmp_path)
    assert Stopping(1, 1, 0, "", 2, 0).saved == 0
