"""A judge before labelled items: a good one may gate, and each way of being a bad one is found out and named."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.scripted_judge import Plan, Reply, ScriptedJudge, answer_by_rule, scripted_judge
from sluice.evaluation.cache import Cache, open_cache
from sluice.evaluation.calibration import JudgeCalibration, calibrate, demoted_without_calibration
from sluice.evaluation.calibration_figures import best_kappa, halves, length_bias, predicted_labels, threshold
from sluice.evaluation.judge import Judge, JudgeLimits, reach
from sluice.evaluation.judge_pairs import labelled_pairs, pair_prompt
from sluice.evaluation.judged import Sample
from sluice.evaluation.labelled import LabelledItem, labelled_digest, read_labelled
from sluice.evaluation.outcomes import Sampling
from sluice.evaluation.policy import JudgeFloor
from sluice.infra.errors import InputError, UnavailableError
from sluice.provenance.canonical import canonical_json, digest_json
from tests.evaluation.test_judged import Words

FAITHFULNESS, RECALL = "judged.faithfulness", "judged.context_recall"
FLOOR = JudgeFloor(minimum_n=20)
LIMITS = JudgeLimits(concurrency=8, timeout_s=5.0, pause_s=0.01)


def items(count: int = 24) -> tuple[LabelledItem, ...]:
    """Good and bad answers to each of `count` / 2 questions, of one length."""
    found = []
    for number in range(count // 2):
        passages = (f"The fee of permit {number} is {number} euros.",)
        for label, answer in (
            (1, f"The fee of permit {number} is {number} euros."),
            (0, "Nobody in the town knows it all."),
        ):
            sample = Sample(f"i{number}-{label}", f"What is the fee of permit {number}?", answer, passages)
            found.append(LabelledItem(sample, {FAITHFULNESS: label}, "somebody"))
    return tuple(found)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    with open_cache(tmp_path / "cache.sqlite") as opened:
        yield opened


def calibrated(
    cache: Cache,
    plan: Plan = lambda *_: Reply(),
    rated: Sequence[LabelledItem] | None = None,
    floor: JudgeFloor | None = FLOOR,
    repeats: int = 3,
) -> tuple[JudgeCalibration, ScriptedJudge]:
    with scripted_judge(plan) as server:
        judge = Judge(server.url, "judge", digest_json("weights"), Sampling(256), LIMITS)
        found = calibrate(
            rated or items(), [FAITHFULNESS, RECALL], judge, repeats=repeats, floor=floor, cache=cache, embed=Words()
        )
    return found, server


def is_verdict(prompt: str) -> bool:
    return '"title": "NLIStatementOutput"' in prompt


def flipped(prompt: str) -> Reply:
    content = answer_by_rule(prompt)
    for one in content["statements"]:
        one["verdict"] = 1 - one["verdict"]
    return Reply(json.dumps(content))


def test_a_judge_that_agrees_with_people_may_gate(cache: Cache) -> None:
    found, server = calibrated(cache)
    [metric] = found.metrics
    assert (metric.labelled, metric.asked, metric.valid, metric.kappa) == (24, 24, 24, 1.0)
    assert metric.kappa_low > 0.7
    assert (metric.self_agreement, metric.position_bias, metric.pairs, metric.length_bias) == (1.0, 0.0, 12, 0.0)
    assert found.demoted(FLOOR, [FAITHFULNESS, "token_f1"]) == {}
    assert found.demoted(FLOOR, [RECALL]) == {RECALL: "no labelled items for this metric"}
    # Asked three times, whatever the cache knows: 2 requests an item, 2 orders a pair.
    assert len(server.requests) == 24 * 2 * 3 + 12 * 2
    assert found.labelled_by == ("somebody",)


def test_the_same_calibration_comes_from_the_cache(cache: Cache) -> None:
    first, _ = calibrated(cache)
    again, server = calibrated(cache, rated=tuple(reversed(items())))
    assert again == first
    assert not server.requests
    assert JudgeCalibration.from_json(json.loads(canonical_json(first.to_json()))) == first


def test_a_judge_that_guesses_is_advisory_and_found_out_early(cache: Cache) -> None:
    def plan(prompt: str, _: int) -> Reply:
        return flipped(prompt) if is_verdict(prompt) and int(digest_json(prompt)[-1], 16) % 2 else Reply()

    found, server = calibrated(cache, plan)
    [metric] = found.metrics
    assert metric.asked < 24
    assert metric.self_agreement is None
    assert len(server.requests) <= 2 * metric.asked
    reason = found.demoted(FLOOR, [FAITHFULNESS])[FAITHFULNESS]
    assert "its agreement with people may be as low as kappa" in reason
    assert "(0.60 is needed)" in reason
    whole, _ = calibrated(cache, plan, floor=None)
    assert whole.metrics[0].asked == 24
    assert whole.metrics[0].self_agreement is not None
    assert whole.metrics[0].kappa < 0.5


def test_a_judge_that_contradicts_itself(cache: Cache) -> None:
    def plan(prompt: str, times: int) -> Reply:
        # When it is asked again it says the contrary of every second one.
        return flipped(prompt) if times > 1 and is_verdict(prompt) and "7" in digest_json(prompt)[-8:] else Reply()

    found, _ = calibrated(cache, plan)
    [metric] = found.metrics
    assert metric.kappa == 1.0
    assert metric.self_agreement is not None
    assert metric.self_agreement < 0.9
    assert metric.position_bias is None  # needless by then
    assert "asked again it says the same in" in found.demoted(FLOOR, [FAITHFULNESS])[FAITHFULNESS]


def test_a_judge_that_prefers_what_it_sees_first(cache: Cache) -> None:
    def plan(prompt: str, _: int) -> Reply:
        return Reply('{"reason": "it comes first", "better": 1}') if "answer_1" in prompt else Reply()

    found, _ = calibrated(cache, plan)
    assert found.metrics[0].position_bias == 1.0
    assert found.demoted(FLOOR, [FAITHFULNESS]) == {
        FAITHFULNESS: "the order decides 100% of the pairs (10% are tolerated)"
    }


def test_a_judge_that_fails_on_every_pair_has_no_position_bias_measured(cache: Cache) -> None:
    found, _ = calibrated(cache, lambda prompt, _: Reply("prose") if "answer_1" in prompt else Reply())
    assert found.metrics[0].pairs == 0
    assert found.demoted(FLOOR, [FAITHFULNESS]) == {FAITHFULNESS: "its position bias was not measured"}


def test_a_judge_that_answers_in_prose_is_found_out_after_a_portion(cache: Cache) -> None:
    found, server = calibrated(cache, lambda *_: Reply("All fine!"))
    [metric] = found.metrics
    assert (metric.asked, metric.valid, metric.causes) == (8, 0, {"not JSON": 8})
    assert len(server.requests) <= 8 + 4  # a fifth of the 16 planned
    reason = found.demoted(FLOOR, [FAITHFULNESS])[FAITHFULNESS]
    assert reason.startswith("the judge scored 0 of 8 items (95% are needed), mostly because: not JSON")


def test_too_few_labelled_items(cache: Cache) -> None:
    found, _ = calibrated(cache, rated=items(12))
    assert "12 labelled items, 20 are needed" in found.demoted(FLOOR, [FAITHFULNESS])[FAITHFULNESS]


def test_a_judge_that_dies_while_it_is_calibrated(cache: Cache) -> None:
    with pytest.raises(UnavailableError, match="is gone") as raised:
        calibrated(cache, lambda *_: Reply(drop=True))
    assert "calibrate again" in raised.value.hint
    found, _ = calibrated(cache)
    assert found.demoted(FLOOR, [FAITHFULNESS]) == {}


def test_without_a_calibration_no_judged_metric_gates() -> None:
    assert demoted_without_calibration(["token_f1", FAITHFULNESS]) == {
        FAITHFULNESS: "the judge was not calibrated: the suite names no labelled items"
    }


def test_what_is_no_calibration() -> None:
    with pytest.raises(InputError, match="no calibration"):
        JudgeCalibration.from_json({"judge": "x"})


def test_threshold_separates_good_from_bad() -> None:
    labels = {"a": 1, "b": 1, "c": 0, "d": 0}
    assert threshold({"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.1}, labels) == 0.75
    assert threshold({"a": 0.9, "b": 0.6, "c": 0.4, "d": 0.1}, labels) == 0.5  # of equal cuts the nearest to a half
    assert threshold({"a": 0.9}, labels) == 0.5


def test_no_label_has_a_part_in_its_own_prediction() -> None:
    scores = {f"i{n}": n / 40 for n in range(40)}
    labels = {f"i{n}": int(n >= 20) for n in range(40)}
    predicted, _ = predicted_labels(scores, labels)
    half = halves(labels)
    for item, label in labels.items():
        # An item of the same label in the same half: turning this one's label over would also move the halves.
        other = {**labels, item: 1 - label}
        if halves(other) == half:
            assert predicted_labels(scores, other)[0][item] == predicted[item]


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=5), st.integers(0, 1), min_size=2, max_size=30))
def test_halves_are_even(labels: dict[str, int]) -> None:
    half = halves(labels)
    assert set(half) == set(labels)
    for label in (0, 1):
        sides = [half[item] for item, its in labels.items() if its == label]
        assert abs(sides.count(0) - sides.count(1)) <= 1


def test_the_best_case_gives_no_good_judge_up_and_no_guesser_hope() -> None:
    labels = {f"i{n}": n % 2 for n in range(60)}
    good = {f"i{n}": float(n % 2) for n in range(60)}
    guessed = {f"i{n}": float(n // 2 % 2) for n in range(60)}
    for told in range(8, 61, 8):
        assert best_kappa({f"i{n}": good[f"i{n}"] for n in range(told)}, labels).low > FLOOR.kappa
    assert best_kappa({f"i{n}": guessed[f"i{n}"] for n in range(8)}, labels).low > FLOOR.kappa
    assert best_kappa({f"i{n}": guessed[f"i{n}"] for n in range(32)}, labels).low < FLOOR.kappa


def test_length_bias_leaves_peoples_judgement_out() -> None:
    labels = {f"i{n}": n % 2 for n in range(40)}
    words = {f"i{n}": 10 + n % 7 + 20 * (n % 2) for n in range(40)}  # good answers are longer
    fair = {f"i{n}": 0.2 + 0.6 * (n % 2) for n in range(40)}
    assert length_bias(fair, labels, words) == 0.0
    led = {item: score + words[item] / 1000 for item, score in fair.items()}
    assert length_bias(led, labels, words) == pytest.approx(1.0)
    against = {item: score - words[item] / 1000 for item, score in fair.items()}
    assert length_bias(against, labels, words) == pytest.approx(-1.0)
    assert length_bias({"i1": 0.5}, labels, words) is None


def test_pairs_are_good_and_bad_answers_to_one_question() -> None:
    pairs = labelled_pairs(items(8), FAITHFULNESS)
    assert len(pairs) == 4
    assert all(
        good.question == bad.question and good.id.endswith("-1") and bad.id.endswith("-0") for good, bad in pairs
    )
    prompt = pair_prompt(FAITHFULNESS, *pairs[0])
    assert pairs[0][0].contexts[0] in prompt
    assert '"reference"' not in prompt


@pytest.mark.parametrize(("name", "count"), [("demo", 60), ("tiny", 12)])
def test_the_labelled_sets_that_come_with_sluice(name: str, count: int) -> None:
    found = read_labelled(Path(str(files("sluice.evaluation") / "suites" / name / "calibration.jsonl")))
    assert len(found) == count
    for metric in (FAITHFULNESS, "judged.factual_correctness", "judged.answer_relevancy"):
        labels = [item.labels[metric] for item in found if metric in item.labels]
        assert name == "tiny" or len(labels) >= FLOOR.minimum_n
        assert 0.2 < sum(labels) / len(labels) < 0.8
    # Length must not give the label away.
    for metric in (FAITHFULNESS, "judged.factual_correctness", "judged.answer_relevancy"):
        rated = [item for item in found if metric in item.labels]
        words = [len(item.sample.answer.split()) for item in rated]
        labels = [item.labels[metric] for item in rated]
        best = max(
            sum((count >= cut) == bool(label) for count, label in zip(words, labels, strict=True)) / len(rated)
            for cut in range(min(words), max(words) + 2)
        )
        assert name == "tiny" or best < max(sum(labels), len(labels) - sum(labels)) / len(labels) + 0.15


ROW = {
    "id": "a", "question": "What is it?", "contexts": ["It is."], "answer": "It is.", "reference": "It is.",
    "labels": {FAITHFULNESS: 1}, "labelled_by": "somebody",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"id": ""}, "id = ''"),
        ({"labels": {}}, "labels"),
        ({"labels": {"token_f1": 1}}, "token_f1"),
        ({"labels": {FAITHFULNESS: 0.5}}, "must be 0 or 1"),
        ({"labels": {FAITHFULNESS: True}}, "must be 0 or 1"),
        ({"contexts": []}, "reads contexts"),
        ({"contexts": "It is."}, "list of texts"),
        ({"labelled_by": None}, "labelled_by"),
        ({"label": 1}, "label is no field"),
        ({"reference": 3}, "reference"),
    ],
)
def test_a_labelled_item_that_is_wrong(tmp_path: Path, change: dict[str, object], told: str) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{json.dumps({**ROW, 'id': 'b', **change})}\n")
    with pytest.raises(InputError, match="line 2") as raised:
        read_labelled(path)
    assert told in raised.value.message


def test_labelled_files(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n\n{json.dumps({**ROW, 'id': 'b'})}\n")
    found = read_labelled(path)
    assert [item.sample.id for item in found] == ["a", "b"]
    assert labelled_digest(found) == labelled_digest(found[::-1])
    changed = (replace(found[0], labels={FAITHFULNESS: 0}), found[1])
    assert labelled_digest(changed) != labelled_digest(found)
    assert asdict(found[0])["labelled_by"] == "somebody"
    for text, told in (("", "0 labelled items"), ("[]", "must be an object"), ("{", "is not JSON")):
        path.write_text(text)
        with pytest.raises(InputError, match=told):
            read_labelled(path)
    path.write_text(f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n")
    with pytest.raises(InputError, match="given twice"):
        read_labelled(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_labelled(tmp_path / "none")


def test_a_judge_that_mostly_fails_when_asked_again_was_not_measured(cache: Cache) -> None:
    def asked_again(prompt: str, times: int) -> Reply:
        return Reply("Certainly!") if times > 1 and int(digest_json(prompt)[-1], 16) > 1 else Reply()

    found, _ = calibrated(cache, asked_again)
    assert found.demoted(FLOOR, [FAITHFULNESS]) == {FAITHFULNESS: "its self agreement was not measured"}


def test_a_judge_that_fails_on_most_pairs_has_no_position_bias_measured(cache: Cache) -> None:
    def plan(prompt: str, _: int) -> Reply:
        return Reply("Certainly!") if "better one" in prompt and "permit 3 " not in prompt else Reply()

    found, _ = calibrated(cache, plan)
    assert found.demoted(FLOOR, [FAITHFULNESS]) == {FAITHFULNESS: "its position bias was not measured"}


@pytest.mark.parametrize("key", ["sk-secret\n", "sk-secr\u00e9t"])
def test_a_key_that_no_header_holds_is_not_shown(key: str) -> None:
    with pytest.raises(InputError, match=r"judge\.api_key") as caught:
        Judge("http://127.0.0.1:9/v1", "judge", "weights", api_key=key)
    assert "secr" not in str(caught.value)
    with pytest.raises(InputError, match=r"judge\.url holds a name or password") as caught:
        Judge("http://somebody:secret@127.0.0.1:9/v1", "judge", "weights")
    assert "secret" not in str(caught.value)


def test_reaching_a_judge() -> None:
    with scripted_judge() as server:
        judge = Judge(server.url, "judge", "x")
        reach(judge)
        with pytest.raises(InputError, match="'other' is not served"):
            reach(replace(judge, model="other"))
    with pytest.raises(UnavailableError, match="does not answer"):
        reach(judge)
    assert "secret" not in repr(replace(judge, api_key="secret"))
