"""A decision in words: what was needed and shown, what was missing, for how long it holds, and what to do next."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np

from sluice.evaluation.calibration import JudgeCalibration, MetricCalibration
from sluice.evaluation.comparison import compare
from sluice.evaluation.decision import Decision
from sluice.evaluation.explanation import Explanation, Standing, explain
from sluice.evaluation.gate import decide
from sluice.evaluation.scores import Scores
from sluice.evaluation.stopping import Stopping
from tests.evaluation.scores import NOW, SUBJECTS, policy, scores

N = 120
RNG = np.random.default_rng(1)
BASE = RNG.uniform(0.05, 0.5, N).tolist()
BETTER = [min(1.0, x + d) for x, d in zip(BASE, RNG.uniform(-0.1, 0.5, N), strict=True)]
ANSWERED = [1.0] * N


def decided(old: Scores, new: Scores, *checks: dict[str, Any], changes: Any = (), **more: Any) -> Decision:
    rules = policy(*checks, second_approver=["base", "data"])
    return decide(compare(old, new, rules, **more), rules, SUBJECTS, NOW, changes=changes)


def passing(**more: Any) -> Decision:
    return decided(scores(token_f1=BASE, answer_rate=ANSWERED), scores(token_f1=BETTER, answer_rate=ANSWERED), **more)


def told(explained: Explanation, about: str) -> str:
    return " ".join(says for name, says in explained.notes if name == about)


def test_a_pass_says_who_has_to_approve_and_until_when() -> None:
    explained = explain(passing(), now=NOW + timedelta(hours=1), standing=Standing(version=7))
    assert explained.paragraph.startswith("The candidate may replace the champion: on 120 held-out questions")
    assert told(explained, "valid") == "for another 7 days, until 2026-11-28 10:00 UTC."
    assert told(explained, "approval") == "one person has to approve; nobody did yet."
    assert told(explained, "missing") == "no item lacks a score on either side."
    assert "Holm" in told(explained, "correction")
    assert told(explained, "power") == ""
    assert explained.next_step.startswith("Read the report, then a person: `sluice approve 7 --reason WHY`")
    first = explained.rows[0]
    assert (first.metric, first.needed, first.verdict, first.gates) == (
        "Token F1",
        "better, by 0.02 or more",
        "pass",
        "",
    )
    assert first.difference.startswith("+0.")


def test_two_people_and_why() -> None:
    decision = passing(changes={"data", "recipe", "base"})
    explained = explain(decision, now=NOW, standing=Standing(approvals=("ann",)))
    assert told(explained, "approval") == (
        "two different people have to approve, because of another base model and another dataset; ann did."
    )
    assert "then another person: `sluice approve VERSION" in explained.next_step
    both = explain(decision, now=NOW, standing=Standing(approvals=("ann", "bob")))
    assert both.next_step == "It is approved; `sluice release status` shows the rollout."


def test_what_became_of_it_comes_before_everything() -> None:
    decision = passing()
    expired = explain(decision, now=NOW + timedelta(days=8))
    assert told(expired, "valid") == "expired 24 hours ago, at 2026-11-28 10:00 UTC."
    assert expired.next_step.startswith("It has expired.")
    closed = explain(decision, now=NOW, standing=Standing(closed="ann rejected it"))
    assert closed.next_step == "Nothing: ann rejected it."
    assert told(closed, "approval") == "ann rejected it."
    later = explain(decision, now=NOW, standing=Standing(later=True))
    assert later.next_step.startswith("There is a later decision about this candidate")


def test_a_fail_says_what_was_refuted_and_everything_else_that_is_open() -> None:
    silent = [0.0 if n % 3 == 0 else 1.0 for n in range(N)]
    new = scores(token_f1=BASE, answer_rate=silent)
    explained = explain(decided(scores(token_f1=BASE, answer_rate=ANSWERED), new), now=NOW)
    assert explained.paragraph.startswith("The candidate must not replace the champion")
    assert "worse than the champion by more than 0.05." in explained.paragraph
    assert "not one of 120 items scores otherwise" in explained.paragraph
    assert told(explained, "approval") == "a decision that did not pass cannot be approved."
    assert "mend data or recipe" in explained.next_step


def test_an_inconclusive_decision_says_what_would_mend_it() -> None:
    old = scores(token_f1=BASE, answer_rate=ANSWERED)
    holes: list[float | None] = [None if n < 30 else value for n, value in enumerate(BETTER)]
    lost = explain(decided(old, scores(token_f1=holes, answer_rate=ANSWERED)), now=NOW)
    assert told(lost, "missing") == "Token F1 lacks 30 of 120 (30 timeout)."
    assert "Mend what lost the scores" in lost.next_step
    few = explain(decided(scores(token_f1=BASE[:50]), scores(token_f1=BETTER[:50])), now=NOW)
    assert "Ask more items, or lower minimum_n" in few.next_step
    noisy = np.clip(np.array(BASE) + np.random.default_rng(2).normal(0.01, 0.2, N), 0, 1).tolist()
    unsure = explain(decided(old, scores(token_f1=noisy, answer_rate=ANSWERED)), now=NOW)
    assert "would show what is asked" in unsure.next_step
    assert "for what is asked" in told(unsure, "power")
    nothing = explain(decided(Scores({}), Scores({})), now=NOW)
    assert "Have the suite measure" in nothing.next_step
    assert nothing.rows[0].champion == "–"


def test_the_judges_standing_and_the_saving_are_told() -> None:
    checks = ({"rule": "superiority", "metric": "token_f1"}, {"rule": "superiority", "metric": "judged.faithfulness"})
    old, new = (scores(token_f1=v, judged__faithfulness=[0.5] * N) for v in (BASE, BETTER))
    lower = {"judged.faithfulness": "its agreement with people may be as low as kappa 0.21 (0.60 is needed)"}
    one = MetricCalibration("judged.faithfulness", "j", 80, 80, 80, 0.41, 0.21, 0.59, (0.5, 0.5), 0.1)
    calibration = JudgeCalibration("j", "smollm2-135m", "l", ("ann",), 3, (one,))
    stopping = Stopping(480, 96, 32, "Token F1 passed, however many items follow", 192, 768)
    decision = decided(old, new, *checks, demoted=lower)
    explained = explain(decision, now=NOW, calibration=calibration, stopping=stopping)
    assert told(explained, "judge") == (
        "smollm2-135m, against people: faithfulness kappa 0.41 [0.21, 0.59] on 80 labels (lower limit 0.60 needed to "
        f"gate). Faithfulness does not gate: {lower['judged.faithfulness']}."
    )
    assert told(explained, "asked").startswith("96 of 480 items asked, 768 answers saved")
    assert [row.gates for row in explained.rows] == ["", "demoted"]
    document = explained.to_json()
    assert {"about": "valid", "says": told(explained, "valid")} in document["notes"]
