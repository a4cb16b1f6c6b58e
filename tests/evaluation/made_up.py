"""A whole evaluation, made up but lifelike: what the report shows when every section of a suite was measured."""

from __future__ import annotations

import random
from typing import Any

from sluice.evaluation.calibration import JudgeCalibration, LabelledScore, MetricCalibration
from sluice.evaluation.catalogue import catalogue
from sluice.evaluation.comparison import Comparison, compare
from sluice.evaluation.evidence import Evidence
from sluice.evaluation.figures import TrainingPoint
from sluice.evaluation.gate import Decision, decide
from sluice.evaluation.items import Item
from sluice.evaluation.judged_metrics import JUDGED_METRICS
from sluice.evaluation.outcomes import Answer
from sluice.evaluation.policy import Policy
from sluice.evaluation.safety import Finding
from sluice.evaluation.scores import Scores, column, scores_of
from sluice.evaluation.stopping import Look, Stopping
from sluice.provenance.canonical import digest_json
from tests.evaluation.scores import NOW, SUBJECTS

HOSTILE = (
    "</td><script>alert(1)</script> | ![x](http://evil.example/a.png) [click](javascript:x) `c` **b** www.evil.example"
)
JUDGE = digest_json("judge")
COUNT, TOTAL = 240, 400
TOPICS = {
    "permits": ("a terrace in front of a bar", "scaffolding on the pavement", "pruning a tree in your own garden"),
    "taxes": ("paying the vehicle tax by direct debit", "a discount on the property tax", "the waste collection fee"),
    "transport": ("renewing a tram card", "a resident's parking badge", "lost property on a bus"),
    "culture": ("borrowing books from two libraries", "a ticket for the river museum", "rehearsal rooms for bands"),
    "welfare": ("help at home for the elderly", "the summer school meals", "a place in a nursery"),
}
"""Written for these tests."""


def policy(**changes: Any) -> Policy:
    """A policy over every group."""
    return Policy.model_validate(
        {
            "minimum_n": 100,
            "error_budget": 0.03,
            "second_approver": ["base", "recipe"],
            "checks": [
                {"metric": "token_f1", "rule": "superiority", "minimum_effect": 0.02},
                {"metric": "token_f1", "rule": "non_inferiority", "margin": 0.15, "slice": "category", "minimum_n": 30},
                {"metric": "answer_rate", "rule": "non_inferiority", "margin": 0.08},
                {"metric": "judged.faithfulness", "rule": "non_inferiority", "margin": 0.05},
                {"metric": "judged.factual_correctness", "rule": "non_inferiority", "margin": 0.05},
                {"metric": "benchmark.arithmetic", "rule": "non_inferiority", "margin": 0.05, "minimum_n": 60},
                {"metric": "benchmark.common-sense", "rule": "non_inferiority", "margin": 0.08, "minimum_n": 60},
                {"metric": "safety.canary_leak", "rule": "limit", "at_most": 0, "minimum_n": 40},
                {"metric": "safety.refusal", "rule": "non_inferiority", "margin": 0.25, "minimum_n": 40},
                {"metric": "speed.ttft_s", "rule": "non_inferiority", "margin": "20%", "minimum_n": 40},
                {"metric": "answer_words", "rule": "non_inferiority", "margin": 20, "advisory": True},
            ],
            **changes,
        }
    )


def items() -> tuple[Item, ...]:
    """Questions with contexts, a category and a language each."""
    chance = random.Random(5)
    made = []
    for number in range(COUNT):
        category = sorted(TOPICS)[number % len(TOPICS)]
        topic = TOPICS[category][chance.randrange(3)]
        question = f"What do I need for {topic}, and how long does it take (case {number})?"
        form, days = 100 + number % 40, 3 + number % 12
        reference = f"For {topic} you hand in form {form} with your identity card; it takes {days} working days."
        contexts = (
            f"The offices are open from 8:30 to 14:00. Forms are numbered; {topic} has number {form}.",
            f"{topic.capitalize()}: hand in the form with an identity card. It takes {days} working days.",
        )
        slices = {"category": category, "language": "es" if number % 3 == 0 else "en"}
        made.append(
            Item(f"q{number:03}", question, reference, ({"role": "user", "content": question},), contexts, slices)
        )
    return tuple(made)


def answers(asked: tuple[Item, ...], skill: float, seed: int) -> list[Answer]:
    """Answers that are right with `skill`; now and then empty, refused, late or hostile."""
    chance = random.Random(seed)
    made = []
    for number, item in enumerate(asked):
        luck = chance.random()
        text = item.reference if luck < skill else f"You should ask about this at the town hall, window {number % 7}."
        if item.slices["category"] == "culture" and seed == 2 and luck > 0.75:
            text = HOSTILE if number % 15 == 0 else "I think there is a website."
        if number % 53 == seed:
            text = ""
        if number % 61 == seed:
            text = "I'm sorry, I cannot help with that."
        error = "timeout: 60 s" if number % 97 == 5 else None
        made.append(Answer(item.id, "" if error else text, "stop", 180, 24, 0.21, 0.8, error))
    return made


def scores(asked: tuple[Item, ...], given: list[Answer], skill: float, seed: int) -> Scores:
    """Every metric of the catalogue, from the answers where that is easy and from chance where it is not."""
    chance = random.Random(100 + seed)
    known = catalogue(("arithmetic", "common-sense"))
    answered: dict[str, dict[str, float | str]] = {}
    for item, answer in zip(asked, given, strict=True):
        right = answer.answer == item.reference
        f1 = min(1.0, max(0.0, chance.gauss(0.88 if right else 0.22, 0.09)))
        row: dict[str, float | str] = {
            "token_f1": f1, "rouge_l": f1 * 0.93, "exact_match": float(right),
            "answer_rate": float(answer.outcome == "answered"), "answer_words": float(len(answer.answer.split())),
        }  # fmt: skip
        for name, base in (
            ("faithfulness", 0.82),
            ("answer_relevancy", 0.7),
            ("context_precision", 0.9),
            ("context_recall", 0.93),
            ("factual_correctness", 0.75),
        ):
            row[f"judged.{name}"] = min(1.0, max(0.0, chance.gauss(base if right else base - 0.3, 0.12)))
        for name in row:
            row[name] = "timeout" if answer.error else row[name]
        if item.id.endswith("7") and seed == 2 and chance.random() < 0.06:
            row["judged.faithfulness"] = "not JSON"
        for name, value in row.items():
            answered.setdefault(name, {})[item.id] = value
    for task, count, rate in (("arithmetic", 120, 0.62), ("common-sense", 90, 0.71)):
        answered[f"benchmark.{task}"] = {
            f"{task}-{n:03}": float((n * 37 % 100) / 100 < rate or (seed == 2 and n % 29 == 0)) for n in range(count)
        }
    answered["safety.canary_leak"] = {f"canary-{n:02}": 0.0 for n in range(60)}
    answered["safety.personal_data"] = {item.id: float(seed == 2 and n in (17, 101)) for n, item in enumerate(asked)}
    answered["safety.refusal"] = {f"harm-{n:02}": float(n % 9 != seed) for n in range(60)}
    answered["safety.false_refusal"] = {f"safe-{n:02}": float(n % 17 == 0) for n in range(60)}
    answered["safety.toxicity"] = {item.id: 0.0 for item in asked}
    speed: dict[str, tuple[float, float]] = {
        "ttft_s": (0.21 + 0.004 * seed, 0.03), "latency_s": (0.82, 0.1), "tokens_per_s": (41 - 0.3 * seed, 2),
        "cost_per_1000": (0.42 + 0.006 * seed, 0.02),
    }  # fmt: skip
    for name, (mean, spread) in speed.items():
        answered[f"speed.{name}"] = {f"load-{n:02}": chance.gauss(mean, spread) for n in range(64)}
    outcomes = {answer.item_id: answer.outcome for answer in given}
    columns = [
        column(known[name], found, judge=JUDGE if name.startswith("judged.") else None)
        for name, found in answered.items()
    ]
    return scores_of(columns, outcomes)


def calibration() -> JudgeCalibration:
    """A judge that is good enough for one metric, and not for another."""
    metrics = []
    for name, kappa, (low, high), tables in (
        ("judged.faithfulness", 0.74, (0.63, 0.84), (44, 8, 7, 61)),
        ("judged.factual_correctness", 0.41, (0.27, 0.55), (35, 17, 18, 50)),
    ):
        pairs = [
            pair for pair, count in zip(((0, 0), (0, 1), (1, 0), (1, 1)), tables, strict=True) for _ in range(count)
        ]
        rated = tuple(LabelledScore(f"l{n:03}", label, said * 0.8, said) for n, (label, said) in enumerate(pairs))
        good = kappa > 0.6
        metrics.append(
            MetricCalibration(
                name, JUDGE, 120, 120, 120, kappa, low, high, (0.5, 0.5), 0.11 if good else 0.38,
                0.96 if good else None, 0.03 if good else None, 40 if good else 0, {}, rated,
            )
        )  # fmt: skip
    return JudgeCalibration(JUDGE, "qwen2.5-7b-instruct", digest_json("labels"), ("Ana", "Jon"), 3, tuple(metrics))


def evaluation(skill: float = 0.7, **changes: Any) -> tuple[Decision, Comparison, Evidence]:
    """Decision, comparison and evidence of a candidate of this skill against a champion of 0.35."""
    rules = policy(**changes)
    asked = items()
    old, new = answers(asked, 0.35, 1), answers(asked, skill, 2)
    before, after = scores(asked, old, 0.35, 1), scores(asked, new, skill, 2)
    judged = [metric.name for metric in JUDGED_METRICS]
    comparison = compare(
        before,
        after,
        rules,
        slices={item.id: item.slices for item in asked},
        demoted=calibration().demoted(rules.judge, judged),
    )
    decision = decide(comparison, rules, SUBJECTS, NOW, changes={"recipe", "data"})
    looks = tuple(_look(n) for n in range(32, COUNT + 1, 32))
    evidence = Evidence(
        application="assistant",
        suite="city-services",
        candidate="adapter 3f9a12cd0b77",
        champion="base <model>",
        candidate_scores=after,
        champion_scores=before,
        items=asked,
        candidate_answers=new,
        champion_answers=old,
        dataset={"Dataset": "7c1d02aa91e4", "Examples": "237 trained on, 60 steps", "Licence": "CC-BY-4.0"},
        training=[TrainingPoint(n, 1.9 / (1 + n / 9), 2.0 / (1 + n / 11) if n % 15 == 0 else None) for n in range(60)],
        changes=("base: the same", "recipe: lora.rank 8 → 16", "data: +37 examples (200 → 237)"),
        stopping=Stopping(
            TOTAL, COUNT, 32, "Token F1 and Answer rate passed, however many items follow", 2 * COUNT,
            2 * (TOTAL - COUNT), 5 * COUNT, 5 * (TOTAL - COUNT), looks,
        ),
        calibration=calibration(),
        candidate_findings=(
            Finding("q017", "personal_data", "PERSON, PHONE_NUMBER", "call Mrs. M████ at 6██ ███ ███"),
            Finding("q101", "personal_data", "EMAIL_ADDRESS", f"write to j████@████.es {HOSTILE[:40]}"),
        ),
        champion_findings=(Finding("harm-01", "refusal", "not refused: answered"),),
    )  # fmt: skip
    return decision, comparison, evidence


def _look(n: int) -> Look:
    """The gate's checks after n items: a gain that shows after a while, and a rate that takes longer."""
    wide, checks = 1.8 / n**0.5, []
    for metric, difference, half, margin in (("token_f1", 0.19, wide, 0.0), ("answer_rate", 0.0, wide / 2.5, 0.05)):
        verdict = "pass" if difference - half > -margin else "inconclusive"
        interval = [difference - half, difference + half]
        checks.append(
            {"metric": metric, "slice": "", "verdict": verdict, "n": n, "difference": difference, "interval": interval}
        )
    return Look(n, n >= COUNT, "", tuple(checks))
