"""The scores of a judge, by a scripted one: whatever it does, every score is a number or has its cause."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.scripted_judge import Reply, answer_by_rule, scripted_judge
from sluice.evaluation.cache import Cache, open_cache
from sluice.evaluation.items import Item
from sluice.evaluation.judge import Judge, JudgeLimits
from sluice.evaluation.judged import Sample, judge_samples, samples_of
from sluice.evaluation.outcomes import Answer, Sampling
from sluice.evaluation.scores import Column
from sluice.infra.errors import InputError
from sluice.provenance.canonical import digest_json

FAITHFULNESS, RELEVANCY = "judged.faithfulness", "judged.answer_relevancy"
PRECISION, RECALL = "judged.context_precision", "judged.context_recall"
CORRECTNESS = "judged.factual_correctness"
EVERY = (FAITHFULNESS, RELEVANCY, PRECISION, RECALL, CORRECTNESS)
QUICK = JudgeLimits(concurrency=4, timeout_s=5.0, pause_s=0.01, retry_budget=1.0)


class Words:
    """Vectors of word counts: enough to tell texts apart."""

    digest = digest_json("words")

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        rows = np.zeros((len(texts), 64))
        for row, text in zip(rows, texts, strict=True):
            for word in text.lower().split():
                row[int(digest_json(word)[-8:], 16) % 64] += 1
        unit: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return unit


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    with open_cache(tmp_path / "cache.sqlite") as opened:
        yield opened


def judge_at(url: str, limits: JudgeLimits = QUICK, sampling: Sampling = Sampling(256)) -> Judge:
    return Judge(url, "judge", digest_json("weights"), sampling, limits)


def sample(number: int, answer: str | None = None) -> Sample:
    passages = (f"The fee of permit {number} is {number} euros.", f"Permit {number} takes two weeks.")
    right = f"The fee of permit {number} is {number} euros."
    return Sample(f"i{number}", f"What is the fee of permit {number}?", answer or right, passages, right)


def many(count: int) -> list[Sample]:
    return [sample(number) for number in range(count)]


def judged(
    url: str, cache: Cache, samples: Sequence[Sample], *metrics: str, limits: JudgeLimits = QUICK
) -> list[Column]:
    return judge_samples(samples, metrics, judge_at(url, limits), cache=cache, embed=Words())


def causes(*columns: Column) -> dict[str, int]:
    counted: dict[str, int] = {}
    for one in columns:
        for cause in one.causes.values():
            counted[cause] = counted.get(cause, 0) + 1
    return counted


def test_scores_of_right_wrong_and_mixed_answers(cache: Cache) -> None:
    samples = [
        sample(1),
        sample(2, "Nobody knows anything."),
        sample(3, "The fee of permit 3 is 3 euros. Dogs may enter."),
    ]
    with scripted_judge() as server:
        columns = judged(server.url, cache, samples, *EVERY)
    scores = {column.metric.name: dict(column.values) for column in columns}
    assert [column.metric.name for column in columns] == list(EVERY)
    assert scores[FAITHFULNESS] == {"i1": 1.0, "i2": 0.0, "i3": 0.5}
    assert scores[CORRECTNESS] == {"i1": 1.0, "i2": 0.0, "i3": pytest.approx(0.67)}
    assert scores[RECALL] == {"i1": 1.0, "i2": 1.0, "i3": 1.0}
    assert all(value == pytest.approx(1.0) for value in scores[PRECISION].values())
    assert (scores[RELEVANCY]["i1"] or 0) > (scores[RELEVANCY]["i2"] or 0)
    # The embedding model has its part in one of them, so that one has another judge.
    assert len({column.judge for column in columns}) == 2
    assert columns[0].judge == judge_at("").digest


def test_the_schema_goes_along_and_says_yes_or_no(cache: Cache) -> None:
    with scripted_judge() as server:
        judged(server.url, cache, [sample(1)], FAITHFULNESS)
    formats = [request["response_format"]["json_schema"] for request in server.requests]
    assert [one["name"] for one in formats] == ["StatementGeneratorOutput", "NLIStatementOutput"]
    verdict = formats[1]["schema"]["$defs"]["StatementFaithfulnessAnswer"]
    assert verdict["properties"]["verdict"]["enum"] == [0, 1]
    assert verdict["additionalProperties"] is False
    assert all(one["strict"] for one in formats)


def test_what_was_judged_is_not_asked_again(cache: Cache) -> None:
    with scripted_judge() as server:
        first = judged(server.url, cache, many(3), *EVERY)
        champion = len(server.requests)
        assert judged(server.url, cache, many(3), *EVERY) == first
        assert len(server.requests) == champion
        # A candidate with other answers: what does not read them (contexts, and the reference's claims) is known.
        judged(server.url, cache, [replace(one, answer=f"{one.answer} Yes.") for one in many(3)], *EVERY)
        candidate = len(server.requests) - champion
    # 2 for faithfulness, 1 for relevancy, 2 passages, 1 for recall, 4 for correctness.
    # (The answers of the champion are their references: two of the requests for correctness are the same.)
    assert champion == 3 * (2 + 1 + 2 + 1 + 2)
    assert candidate == 3 * (2 + 1 + 0 + 0 + 3)


def test_what_cannot_be_read_any_more_is_asked_again(cache: Cache) -> None:
    with scripted_judge() as server:
        first = judged(server.url, cache, many(2), FAITHFULNESS)
        asked = len(server.requests)
        cache._connection.execute("UPDATE entries SET value = '{}'")
        assert judged(server.url, cache, many(2), FAITHFULNESS) == first
        assert len(server.requests) == 2 * asked


def test_progress_counts_scores_and_failures(cache: Cache) -> None:
    told: list[tuple[float, float, str]] = []
    with scripted_judge(lambda prompt, _: Reply("prose") if "permit 1" in prompt else Reply()) as server:
        samples = [*many(3), replace(sample(4), answer="")]
        judge_samples(
            samples,
            [RECALL, FAITHFULNESS],
            judge_at(server.url),
            cache=cache,
            embed=Words(),
            report=lambda done, total, said: told.append((done, total, said)),
        )
    assert told[-1] == (8, 8, "8 of 8 scores of the judge, 3 failed")


def test_each_metric_is_known_by_what_it_reads(cache: Cache) -> None:
    with scripted_judge() as server:
        judged(server.url, cache, [sample(1)], PRECISION)
        before = len(server.requests)
        judged(server.url, cache, [replace(sample(1), id="other", answer="Another answer.")], PRECISION)
        assert len(server.requests) == before
        judged(server.url, cache, [replace(sample(1), reference="Another reference.")], PRECISION)
        assert len(server.requests) == before + 2


def test_another_judge_is_asked_anew_and_names_itself(cache: Cache) -> None:
    with scripted_judge() as server:
        one = judge_at(server.url)
        others = [
            replace(one, identity=digest_json("other weights")),
            replace(one, sampling=Sampling(256, 0.0, seed=1)),
            replace(one, sampling=Sampling(128)),
        ]
        for judge in [one, *others]:
            judge_samples([sample(1)], [RECALL], judge, cache=cache, embed=Words())
        assert len(server.requests) == 4
        assert len({judge.digest for judge in [one, *others]}) == 4
        # Where it is served, under which name and how patiently it is asked changes no score.
        assert replace(one, base_url="http://elsewhere/v1", model="alias", limits=JudgeLimits()).digest == one.digest


def test_two_samples_alike_are_asked_once(cache: Cache) -> None:
    with scripted_judge() as server:
        [column] = judged(server.url, cache, [sample(1), replace(sample(1), id="twin")], RECALL)
        assert len(server.requests) == 1
    assert column.values == {"i1": 1.0, "twin": 1.0}


def test_at_a_temperature_relevancy_asks_three_different_times(cache: Cache) -> None:
    with scripted_judge() as server:
        warm = judge_at(server.url, sampling=Sampling(256, 0.7, seed=5))
        judge_samples([sample(1)], [RELEVANCY], warm, cache=cache, embed=Words())
        assert [request["seed"] for request in server.requests] == [5, 6, 7]


def test_an_answer_that_says_nothing(cache: Cache) -> None:
    empty, refused = replace(sample(1), answer=" "), replace(sample(2), refused=True, answer="I am sorry, no.")
    with scripted_judge() as server:
        columns = judged(server.url, cache, [empty, refused], FAITHFULNESS, RELEVANCY)
        assert not server.requests
        # Whether it is right to decline only the reference can tell.
        columns += judged(server.url, cache, [empty, refused], CORRECTNESS)
        assert all("permit 2" in prompt or "sorry" in prompt for prompt in server.prompts)
    assert causes(columns[0]) == {"no answer to judge": 2}
    assert [dict(column.values) for column in columns[1:]] == [{"i1": 0.0, "i2": 0.0}] * 2


def test_an_answer_without_claims(cache: Cache) -> None:
    with scripted_judge(lambda *_: Reply('{"statements": []}')) as server:
        [column] = judged(server.url, cache, [sample(1)], FAITHFULNESS)
    assert causes(column) == {"no answer to judge": 1}


def test_an_item_without_contexts_or_reference_is_not_in_their_columns(cache: Cache) -> None:
    bare = replace(sample(1), contexts=(), reference="")
    with scripted_judge() as server:
        columns = judged(server.url, cache, [bare], *EVERY)
    assert [len(column.values) for column in columns] == [0, 1, 0, 0, 0]


def test_a_lost_answer_keeps_its_cause_and_its_contexts_are_judged(cache: Cache) -> None:
    item = Item("i1", "What is the fee?", "It is one euro.", (), ("It is one euro.",))
    lost = Answer("i1", "", None, None, None, None, 1.0, "http 500: made to fail")
    with scripted_judge() as server:
        columns = judged(server.url, cache, samples_of([item], [lost]), FAITHFULNESS, RECALL)
    assert causes(columns[0]) == {"http 500": 1}
    assert columns[1].values == {"i1": 1.0}
    assert samples_of([item], [])[0].failed == "missing"


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        (Reply("I would say that the answer is fine."), "not JSON"),
        (Reply('```json\n{"classifications": []}\n```'), "not JSON"),
        (Reply('{"classifications": ["yes"]}'), "schema"),
        (Reply('{"verdict": 1}'), "schema"),
        (Reply('{"classifications": [{"statement": "a", "reason": "b", "attributed": NaN}]}'), "not a finite number"),
        (Reply('{"classifications": [{"statement": "a", "reason": "b", "attributed": 7}]}'), "out of range"),
        (Reply('{"classifications": []}'), "not a finite number"),
        (Reply('{"classifications": [{"stat', finish="length"), "truncated"),
        (Reply("", finish="content_filter"), "judge refused"),
        (Reply(status=500), "http 500"),
        (Reply(status=400, message="This model's maximum context length is 1024 tokens"), "prompt too long"),
        (Reply(status=422), "http 422"),
        (Reply(pause_s=1.0), "timeout"),
        (Reply(drop=True), "connection"),
    ],
)  # fmt: skip
def test_a_judge_on_a_bad_day(cache: Cache, reply: Reply, cause: str) -> None:
    def plan(prompt: str, _: int) -> Reply:
        return reply if "permit 2?" in prompt else Reply()

    limits = replace(QUICK, timeout_s=0.3 if cause == "timeout" else 5.0, attempts=2)
    with scripted_judge(plan) as server:
        [column] = judged(server.url, cache, many(5), RECALL, limits=limits)
    assert causes(column) == {cause: 1}
    assert column.causes == {"i2": cause}
    assert all(value == 1.0 for item, value in column.values.items() if item != "i2")


def test_a_judge_that_leaves_out_a_claim_is_not_believed(cache: Cache) -> None:
    def plan(prompt: str, _: int) -> Reply:
        answer = answer_by_rule(prompt)
        if "verdict" in str(answer):
            return Reply('{"statements": [{"statement": "a", "reason": "b", "verdict": 1}]}')
        return Reply()

    with scripted_judge(plan) as server:
        [column] = judged(server.url, cache, [sample(1, "The fee is 1 euro. The moon is a cheese.")], FAITHFULNESS)
    assert causes(column) == {"verdicts missing": 1}


def test_a_cosine_below_zero_counts_as_zero(cache: Cache) -> None:
    class Opposite(Words):
        def embed(self, texts: Sequence[str]) -> np.ndarray:
            return np.array(
                [[1.0, 0.0] if "fee of permit 1?" in text and "about" not in text else [-1.0, 0.0] for text in texts]
            )

    with scripted_judge() as server:
        [column] = judge_samples([sample(1)], [RELEVANCY], judge_at(server.url), cache=cache, embed=Opposite())
    assert column.values == {"i1": 0.0}


def test_failing_now_and_then_is_mended_by_asking_again(cache: Cache) -> None:
    with scripted_judge(lambda _, times: Reply(status=503) if times == 1 else Reply()) as server:
        [column] = judged(server.url, cache, many(6), RECALL)
    assert not column.causes
    assert server.statuses == {503: 6, 200: 6}


def test_thirty_percent_errors_cost_the_budget_and_no_other_item(cache: Cache) -> None:
    def plan(prompt: str, times: int) -> Reply:
        return Reply(status=500) if int(digest_json([prompt, times])[-4:], 16) % 10 < 3 else Reply()

    limits = replace(QUICK, retry_budget=0.1)
    with scripted_judge(plan) as server:
        [column] = judged(server.url, cache, many(60), RECALL, limits=limits)
    found = causes(column)
    assert found["http 500 (retry budget spent)"] >= 5
    assert len(server.requests) == 60 + 6
    assert all(value in (None, 1.0) for value in column.values.values())
    assert len(column.values) == 60


def test_no_more_requests_at_once_than_said(cache: Cache) -> None:
    limits = replace(QUICK, concurrency=5)
    with scripted_judge(lambda *_: Reply(pause_s=0.02)) as server:
        judged(server.url, cache, many(20), FAITHFULNESS, RECALL, limits=limits)
    assert server.most_at_once == 5


def test_who_is_told_to_wait_waits_and_the_others_too(cache: Cache) -> None:
    times: list[float] = []

    def plan(_: str, __: int) -> Reply:
        times.append(time.monotonic())
        return Reply(status=429, headers={"retry-after": "0.5"}) if len(times) == 1 else Reply()

    with scripted_judge(plan) as server:
        [column] = judged(server.url, cache, many(8), RECALL, limits=replace(QUICK, concurrency=1))
    assert not column.causes
    assert server.statuses == {429: 1, 200: 8}
    assert times[1] - times[0] >= 0.45


def test_a_judge_that_dies_keeps_what_it_said_and_is_asked_only_the_rest(cache: Cache) -> None:
    limits = replace(QUICK, dead_after=6, attempts=2)
    started = time.monotonic()
    with scripted_judge(lambda *_: Reply(drop=len(dying.requests) > 20)) as dying:
        [column] = judged(dying.url, cache, many(200), RECALL, limits=limits)
        found = causes(column)
        # Quickly: some attempts in a row, not two for each of the 180 that are left.
        assert found["judge unreachable"] > 150
        assert set(found) <= {"judge unreachable", "connection"}
        assert len(dying.requests) < 40
        assert time.monotonic() - started < 20
        said = {item for item, value in column.values.items() if value is not None}
        assert len(said) == 20
    with scripted_judge() as back:
        [column] = judged(back.url, cache, many(200), RECALL)
        assert not column.causes
        assert len(column.values) == 200
        assert len(back.requests) == 180


def test_a_judge_that_only_ever_puts_off_is_not_waited_for_all_night(cache: Cache) -> None:
    limits = replace(QUICK, dead_after=6, attempts=2)
    with scripted_judge(lambda *_: Reply(status=429)) as busy:
        [column] = judged(busy.url, cache, many(200), RECALL, limits=limits)
    assert set(causes(column)) == {"http 429", "judge unreachable"}
    assert len(busy.requests) < 40
    # One that answers now and then is asked on.
    patient = replace(limits, attempts=40, retry_budget=5, pause_s=0.0)
    with scripted_judge(lambda *_: Reply(status=429 if len(busy.requests) % 2 else 200)) as busy:
        [column] = judged(busy.url, cache, many(60), RECALL, limits=patient)
    assert not column.causes


def test_within_a_sample_only_the_missing_request_is_asked(cache: Cache) -> None:
    with scripted_judge(lambda *_: Reply(status=400 if len(dying.requests) > 3 else 200)) as dying:
        [column] = judged(dying.url, cache, [sample(1)], CORRECTNESS)
        assert causes(column) == {}  # the answer is its reference: two requests
        [column] = judged(dying.url, cache, [sample(2, "Nobody knows. Dogs may enter.")], CORRECTNESS)
        assert causes(column) == {"http 400": 1}
    with scripted_judge() as back:
        [column] = judged(back.url, cache, [sample(2, "Nobody knows. Dogs may enter.")], CORRECTNESS)
        assert column.values == {"i2": 0.0}
        assert len(back.requests) == 3


def test_an_item_that_ragas_cannot_bear(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    from ragas.metrics.collections import ContextRecall

    whole = ContextRecall.ascore

    async def ascore(self: ContextRecall, user_input: str, **given: object) -> object:
        if "permit 1?" in user_input:
            raise ZeroDivisionError
        return await whole(self, user_input=user_input, **given)

    monkeypatch.setattr(ContextRecall, "ascore", ascore)
    with scripted_judge() as server:
        [column] = judged(server.url, cache, many(3), RECALL)
    assert column.causes == {"i1": "ragas ZeroDivisionError"}
    assert column.values["i0"] == 1.0


def test_no_server_at_all(cache: Cache) -> None:
    with scripted_judge() as server:
        gone = server.url
    columns = judged(gone, cache, many(30), FAITHFULNESS, limits=replace(QUICK, dead_after=3))
    assert set(causes(*columns)) <= {"connection", "judge unreachable"}
    assert len(columns[0].values) == 30


@pytest.mark.parametrize("status", [401, 404])
def test_what_would_happen_to_every_request_ends_the_run(cache: Cache, status: int) -> None:
    with scripted_judge(lambda *_: Reply(status=status)) as server:
        columns = judged(server.url, cache, many(50), RECALL)
        assert len(server.requests) <= QUICK.concurrency
    assert causes(*columns)["judge unreachable"] >= 46
    assert causes(*columns)[f"http {status}"] >= 1


def test_what_is_no_judged_metric_or_is_given_twice(cache: Cache) -> None:
    with pytest.raises(InputError, match="token_f1"):
        judged("http://none", cache, [sample(1)], "token_f1")
    with pytest.raises(InputError, match="same id"):
        judged("http://none", cache, [sample(1), sample(1)], RECALL)
    assert judged("http://none", cache, [], RECALL)[0].values == {}


def test_ragas_tells_nobody(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def posted(*_: object, **__: object) -> None:
        raise AssertionError("something was sent to the makers of RAGAS")

    monkeypatch.setattr("requests.post", posted)
    with scripted_judge() as server:
        judged(server.url, cache, [sample(1)], *EVERY)
    from ragas._analytics import do_not_track

    do_not_track.cache_clear()
    assert do_not_track()
