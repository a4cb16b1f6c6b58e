"""Answers come back in order, whatever the server does; what is finished is never asked twice."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from sluice.evaluation.answers import Answer, Patience, Prompt, Sampling, generate_answers, read_answers, write_answers
from sluice.infra.errors import InputError, UnavailableError
from tests.evaluation.chat_server import Reply, chat_server

QUICK = Patience(timeout_s=5.0, attempts=3, pause_s=0.01)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"item-{n}", [{"role": "user", "content": f"question {n}"}]) for n in range(count)]


def test_every_item_is_answered_once_in_order_with_bounded_concurrency(tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []
    with chat_server(lambda question, _: Reply(f"answer to {question}", pause_s=0.02)) as server:
        answers = generate_answers(
            prompts(12), base_url=server.url, model="release-1", work_dir=tmp_path, concurrency=3, patience=QUICK,
            report=lambda done, total, _: seen.append((done, total)),
        )  # fmt: skip
    assert [a.item_id for a in answers] == [f"item-{n}" for n in range(12)]
    assert answers[4].answer == "answer to question 4"
    assert (answers[4].finish_reason, answers[4].prompt_tokens, answers[4].completion_tokens) == ("stop", 7, 4)
    assert answers[4].ttft_s is not None
    assert 0 < answers[4].ttft_s <= answers[4].latency_s
    assert len(server.asked) == 12
    assert 2 <= server.most_at_once <= 3
    assert [seen[0], seen[-1]] == [(0, 12), (12, 12)]


def test_a_second_call_asks_nothing_and_another_model_asks_everything(tmp_path: Path) -> None:
    with chat_server(lambda question, _: Reply(question)) as server:
        first = generate_answers(prompts(4), base_url=server.url, model="a", work_dir=tmp_path, patience=QUICK)
        assert generate_answers(prompts(4), base_url=server.url, model="a", work_dir=tmp_path, patience=QUICK) == first
        assert len(server.asked) == 4
        generate_answers(prompts(4), base_url=server.url, model="b", work_dir=tmp_path, patience=QUICK)
        assert len(server.asked) == 8
        longer = Sampling(max_tokens=81)
        generate_answers(prompts(4), base_url=server.url, model="a", work_dir=tmp_path, patience=QUICK, sampling=longer)
        assert len(server.asked) == 12


def test_a_run_killed_in_the_middle_of_a_line_asks_only_what_is_missing(tmp_path: Path) -> None:
    with chat_server(lambda question, _: Reply(question)) as server:
        whole = generate_answers(prompts(5), base_url=server.url, model="a", work_dir=tmp_path, patience=QUICK)
        journal = tmp_path / "answers.work.jsonl"
        lines = journal.read_bytes().splitlines(keepends=True)
        kept = {json.loads(line)["answer"]["item_id"] for line in lines[:3]}
        journal.write_bytes(b"".join(lines[:3]) + lines[3][:25])
        server.asked.clear()
        again = generate_answers(prompts(5), base_url=server.url, model="a", work_dir=tmp_path, patience=QUICK)
    assert [a.answer for a in again] == [a.answer for a in whole]
    assert set(server.asked) == {f"question {n}" for n in range(5) if f"item-{n}" not in kept}
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_what_can_happen_to_an_item_is_an_outcome_of_its_own(tmp_path: Path) -> None:
    plans = {
        "question 0": Reply("fine"),
        "question 1": Reply("cut off here", finish="length"),
        "question 2": Reply(""),
        "question 3": Reply("I'm sorry, but I can't help with that."),
        "question 4": Reply(status=500),
        "question 5": Reply("the stream ends", finish=None),
        "question 6": Reply(status=400),
    }
    patience = Patience(timeout_s=20, attempts=2, pause_s=0.01)
    with chat_server(lambda question, _: plans[question]) as server:
        answers = generate_answers(prompts(7), base_url=server.url, model="a", work_dir=tmp_path, patience=patience)
    outcomes = [a.outcome for a in answers]
    assert outcomes == ["answered", "truncated", "empty", "refused", "error", "error", "error"]
    causes = [(a.error or "").split(":")[0] for a in answers[4:]]
    assert causes == ["http 500", "unfinished", "http 400"]
    tries = {question: server.asked.count(question) for question in plans}
    assert [tries[f"question {n}"] for n in range(7)] == [1, 1, 1, 1, 2, 2, 1]


def test_an_item_that_takes_too_long_is_a_timeout(tmp_path: Path) -> None:
    impatient = Patience(timeout_s=0.2, attempts=2, pause_s=0.01)
    with chat_server(lambda *_: Reply(pause_s=0.6)) as server:
        (answer,) = generate_answers(prompts(1), base_url=server.url, model="a", work_dir=tmp_path, patience=impatient)
    assert (answer.outcome, answer.answer, answer.finish_reason) == ("timeout", "", None)
    assert answer.error == "timeout: no whole answer within 0.2 s"
    assert answer.latency_s >= 0.4


def test_a_transient_failure_is_tried_again_and_a_recorded_error_is_asked_again(tmp_path: Path) -> None:
    with chat_server(lambda _, attempt: Reply(status=503) if attempt == 1 else Reply("late")) as server:
        once = Patience(timeout_s=5, attempts=1)
        assert generate_answers(
            prompts(1), base_url=server.url, model="a", work_dir=tmp_path, patience=once
        )[0].error  # fmt: skip
        (answer,) = generate_answers(prompts(1), base_url=server.url, model="a", work_dir=tmp_path, patience=once)
    assert (answer.answer, answer.error) == ("late", None)
    with chat_server(lambda _, attempt: Reply(status=503) if attempt < 3 else Reply("third")) as server:
        (answer,) = generate_answers(prompts(1), base_url=server.url, model="b", work_dir=tmp_path, patience=QUICK)
    assert answer.answer == "third"


def test_a_dead_server_stops_the_run_and_says_what_is_kept(tmp_path: Path) -> None:
    with chat_server(lambda question, _: Reply(question)) as server:
        generate_answers(prompts(2), base_url=server.url, model="a", work_dir=tmp_path, patience=QUICK)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    with pytest.raises(UnavailableError, match="stopped answering") as raised:
        generate_answers(prompts(20), base_url=dead, model="a", work_dir=tmp_path, patience=QUICK)
    assert raised.value.hint.startswith("2 of 20 answers are kept")


@pytest.mark.parametrize(("status", "error"), [(404, InputError), (401, UnavailableError), (403, UnavailableError)])
def test_what_concerns_every_item_stops_at_once(tmp_path: Path, status: int, error: type[Exception]) -> None:
    with chat_server(lambda *_: Reply(status=status)) as server, pytest.raises(error, match=r"made to fail"):
        generate_answers(prompts(30), base_url=server.url, model="nobody", work_dir=tmp_path, concurrency=2)
    assert len(server.asked) <= 4


def test_no_items_and_equal_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 items"):
        generate_answers([], base_url="http://127.0.0.1:1/v1", model="a", work_dir=tmp_path)
    with pytest.raises(InputError, match="same id"):
        generate_answers(prompts(1) * 2, base_url="http://127.0.0.1:1/v1", model="a", work_dir=tmp_path)


def test_answers_survive_their_file(tmp_path: Path) -> None:
    answers = [
        Answer("å\u2028", 'line\nbreak "quoted" \u2028 x', "stop", 1, 2, 0.5, 1.5),
        Answer("b", "", None, None, None, None, 2.0, "timeout: x"),
    ]
    write_answers(tmp_path / "answers.jsonl", answers)
    assert read_answers(tmp_path / "answers.jsonl") == answers
    (tmp_path / "answers.jsonl").write_text('{"item_id": "a"}\n')
    with pytest.raises(InputError, match="Line 1"):
        read_answers(tmp_path / "answers.jsonl")


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("I\u2019m sorry, I can't say.", "refused"),
        ("I don't know.", "refused"),
        ("The context does not mention it.", "refused"),
        ("You cannot build without a permit.", "answered"),
        ("I know: a permit.", "answered"),
        ("  \n", "empty"),
    ],
)
def test_a_refusal_is_known_by_its_opening_only(text: str, outcome: str) -> None:
    assert Answer("a", text, "stop", 1, 1, 0.1, 0.2).outcome == outcome
