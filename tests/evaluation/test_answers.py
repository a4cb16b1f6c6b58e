"""Answers come back in order, whatever the server does; what is answered is never asked twice."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sluice.evaluation.answers import Answer, Patience, Prompt, Sampling, generate_answers, read_answers, write_answers
from sluice.evaluation.cache import Cache, open_cache
from sluice.infra.errors import InputError, UnavailableError
from tests.evaluation.chat_server import ChatServer, Reply, chat_server

QUICK = Patience(timeout_s=60.0, attempts=3, pause_s=0.01)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    with open_cache(tmp_path / "cache.sqlite") as opened:
        yield opened


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"item-{n}", [{"role": "user", "content": f"question {n}"}]) for n in range(count)]


def ask(items: list[Prompt], url: str, cache: Cache, **changes: Any) -> list[Answer]:
    given = {"base_url": url, "model": "release-1", "model_digest": "digest-1", "patience": QUICK, **changes}
    return generate_answers(items, cache=cache, **given)


def test_every_item_is_answered_once_in_order_with_bounded_concurrency(cache: Cache) -> None:
    seen: list[tuple[float, float]] = []
    with chat_server(lambda question, _: Reply(f"answer to {question}", pause_s=0.02)) as server:
        answers = ask(
            prompts(12), server.url, cache, concurrency=3, report=lambda done, total, _: seen.append((done, total))
        )
    assert [a.item_id for a in answers] == [f"item-{n}" for n in range(12)]
    assert answers[4].answer == "answer to question 4"
    assert (answers[4].finish_reason, answers[4].prompt_tokens, answers[4].completion_tokens) == ("stop", 7, 4)
    assert answers[4].ttft_s is not None
    assert 0 < answers[4].ttft_s <= answers[4].latency_s
    assert len(server.asked) == 12
    assert 2 <= server.most_at_once <= 3
    assert [seen[0], seen[-1]] == [(0, 12), (12, 12)]


def test_one_model_is_asked_once_whatever_it_is_called_and_another_is_asked_anew(cache: Cache) -> None:
    told: list[str] = []
    with chat_server(lambda question, _: Reply(question)) as server:
        first = ask(prompts(4), server.url, cache)
        renamed = ask(
            prompts(5), server.url, cache, model="release-2", report=lambda *state: told.append(state[2])
        )  # fmt: skip
        assert renamed[:4] == first
        assert server.asked_of("release-2") == ["question 4"]
        assert told[-1] == "5 of 5 answers, 4 known before, 0 failed"
        # The item's id is the suite's business: the same question elsewhere has the same answer.
        elsewhere = ask([Prompt("other", prompts(1)[0].messages)], server.url, cache)
        assert (elsewhere[0].item_id, elsewhere[0].answer) == ("other", "question 0")
        assert len(server.asked) == 5
        ask(prompts(4), server.url, cache, model_digest="digest-2")
        assert len(server.asked) == 9
        ask(prompts(4), server.url, cache, sampling=Sampling(max_tokens=81))
        assert len(server.asked) == 13
        ask([Prompt("item-0", prompts(1)[0].messages, [{"type": "function"}])], server.url, cache)
        assert server.bodies[-1]["tools"] == [{"type": "function"}]
        assert len(server.asked) == 14


def test_what_can_happen_to_an_item_is_an_outcome_of_its_own(cache: Cache) -> None:
    plans = {
        "question 0": Reply("fine"),
        "question 1": Reply("cut off here", finish="length"),
        "question 2": Reply(""),
        "question 3": Reply("I'm sorry, but I can't help with that."),
        "question 4": Reply("I do not know."),
        "question 5": Reply(status=500),
        "question 6": Reply("the stream ends", finish=None),
        "question 7": Reply(status=400),
        "question 8": Reply("the line drops", cut=True),
        "question 9": Reply("a proxy talks", junk=True),
    }
    with chat_server(lambda question, _: plans[question]) as server:
        answers = ask(prompts(10), server.url, cache, patience=Patience(timeout_s=60, attempts=2, pause_s=0.01))
    outcomes = [a.outcome for a in answers]
    assert outcomes == ["answered", "truncated", "empty", "refused", "no_answer", *["error"] * 5]
    causes = [(a.error or "").split(":")[0] for a in answers[5:]]
    assert causes == ["http 500", "unfinished", "http 400", "connection", "not JSON"]
    tries = {question: server.asked.count(question) for question in plans}
    assert [tries[f"question {n}"] for n in range(10)] == [1, 1, 1, 1, 1, 2, 2, 1, 2, 2]


def test_an_item_that_takes_too_long_is_a_timeout(cache: Cache) -> None:
    impatient = Patience(timeout_s=0.2, attempts=2, pause_s=0.01)
    with chat_server(lambda *_: Reply(pause_s=0.6)) as server:
        (answer,) = ask(prompts(1), server.url, cache, patience=impatient)
    assert (answer.outcome, answer.answer, answer.finish_reason) == ("timeout", "", None)
    assert answer.error == "timeout: no whole answer within 0.2 s"
    assert answer.latency_s >= 0.4


def test_a_transient_failure_is_tried_again_and_an_error_is_never_kept(cache: Cache) -> None:
    with chat_server(lambda _, attempt: Reply(status=503) if attempt == 1 else Reply("late")) as server:
        once = Patience(timeout_s=60, attempts=1)
        assert ask(prompts(1), server.url, cache, patience=once)[0].error
        (answer,) = ask(prompts(1), server.url, cache, patience=once)
    assert (answer.answer, answer.error) == ("late", None)
    with chat_server(lambda _, attempt: Reply(status=503) if attempt < 3 else Reply("third")) as server:
        (answer,) = ask(prompts(1), server.url, cache, model_digest="b")
    assert answer.answer == "third"


def test_tool_calls_streamed_in_pieces_are_put_together(cache: Cache) -> None:
    pieces = [
        {"index": 0, "id": "a", "type": "function", "function": {"name": "find_permit", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"number": '}},
        {"index": 1, "id": "b", "type": "function", "function": {"name": "now", "arguments": None}},
        {"index": 0, "function": {"arguments": '"B 12", "year": 2026}'}},
        {"index": 2, "id": "c", "type": "function", "function": {"name": "broken", "arguments": '{"a": '}},
    ]
    plans = {
        "question 0": Reply("", finish="tool_calls", calls=pieces),
        "question 1": Reply('<tool_call>{"name": "now", "arguments": {}}</tool_call>'),
        "question 2": Reply("", finish="length", calls=pieces[-1:]),
    }
    with chat_server(lambda question, _: plans[question]) as server:
        called, wrote, cut = ask(prompts(3), server.url, cache)
        again = ask(prompts(3), server.url, cache)
    assert called.tool_calls == (
        {"name": "find_permit", "arguments": {"number": "B 12", "year": 2026}},
        {"name": "now", "arguments": {}},
        {"name": "broken", "arguments": '{"a": '},
    )
    assert (called.outcome, called.answer, called.ttft_s is not None) == ("answered", "", True)
    assert (wrote.outcome, wrote.tool_calls, wrote.answer[:11]) == ("answered", (), "<tool_call>")
    assert cut.outcome == "truncated"
    assert again == [called, wrote, cut]
    assert len(server.asked) == 3


def test_a_character_cut_in_two_is_whole_again_and_half_a_one_can_be_written(cache: Cache, tmp_path: Path) -> None:
    halves: list[dict[str, Any]] = [
        {"index": 0, "function": {"name": "x", "arguments": part}} for part in ('{"a": "\ud83e', '\uddf1"}')
    ]
    halves[1]["function"]["name"] = ""
    plans = {"question 0": Reply("half \ud83e"), "question 1": Reply("", finish="tool_calls", calls=halves)}
    with chat_server(lambda question, _: plans[question]) as server:
        answers = ask(prompts(2), server.url, cache)
    assert answers[0].answer == "half \ufffd"
    assert answers[1].tool_calls == ({"name": "x", "arguments": {"a": "\U0001f9f1"}},)
    write_answers(tmp_path / "answers.jsonl", answers)
    assert read_answers(tmp_path / "answers.jsonl") == answers


def test_a_server_that_dies_stops_the_run_and_when_it_is_back_only_the_rest_is_asked(cache: Cache) -> None:
    with chat_server(lambda question, _: Reply(question)) as server:
        ask(prompts(2), server.url, cache)
    with pytest.raises(UnavailableError, match="stopped answering") as raised:
        ask(prompts(20), server.url, cache, concurrency=4)
    assert raised.value.hint.startswith("2 of 20 answers are kept")
    # The last item alone is enough to notice it: nobody there is not an error of the item.
    with pytest.raises(UnavailableError, match="stopped answering"):
        ask(prompts(3), server.url, cache)
    with chat_server(lambda question, _: Reply(question), port=int(server.url.split(":")[2][:-3])) as back:
        assert len(ask(prompts(20), back.url, cache)) == 20
    assert sorted(back.asked) == sorted(f"question {n}" for n in range(2, 20))


def test_a_server_that_dies_while_it_answers_leaves_what_was_whole(cache: Cache) -> None:
    """The first five are answered, then each connection is dropped and no new one is taken."""
    with socket.create_server(("127.0.0.1", 0)) as gate:
        port = gate.getsockname()[1]
        with chat_server(lambda question, _: Reply(question)) as server:
            relay = threading.Thread(target=_relay, args=(gate, server, 5), daemon=True)
            relay.start()
            with pytest.raises(UnavailableError) as raised:
                ask(prompts(12), f"http://127.0.0.1:{port}/v1", cache, concurrency=1)
            relay.join(5)
            assert raised.value.hint.startswith("5 of 12 answers are kept")
            server.asked.clear()
            assert len(ask(prompts(12), server.url, cache)) == 12
    assert len(server.asked) == 7


def _relay(gate: socket.socket, server: ChatServer, answers: int) -> None:
    """Pass so many connections on to the server, then close the door."""
    host, port = server.url.split("/")[2].split(":")
    for _ in range(answers):
        client, _address = gate.accept()
        with client, socket.create_connection((host, int(port))) as behind:
            client.settimeout(0.2)
            while True:
                try:
                    if not (data := client.recv(65536)):
                        break
                except TimeoutError:
                    break
                behind.sendall(data)
            while data := behind.recv(65536):
                client.sendall(data)
    gate.close()


ASKING = """
import sys
from pathlib import Path
from sluice.evaluation.answers import Prompt, generate_answers
from sluice.evaluation.cache import open_cache

url, path, count = sys.argv[1:]
items = [Prompt(f"item-{n}", [{"role": "user", "content": f"question {n}"}]) for n in range(int(count))]
with open_cache(Path(path)) as cache:
    generate_answers(items, base_url=url, model="release-1", model_digest="digest-1", cache=cache, concurrency=2)
"""


def test_a_killed_run_asks_only_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    slow = threading.Event()
    with chat_server(lambda question, _: Reply(question, pause_s=0.0 if slow.is_set() else 0.15)) as server:
        process = subprocess.Popen([sys.executable, "-c", ASKING, server.url, str(path), "20"])
        try:
            deadline = time.monotonic() + 30
            while len(server.asked) < 8 and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
        asked = len(server.asked)
        slow.set()
        server.asked.clear()
        with open_cache(path) as cache:
            assert [a.answer for a in ask(prompts(20), server.url, cache)] == [f"question {n}" for n in range(20)]
    assert 8 <= asked < 20
    # What was being answered as the kill came is asked again: two at once, so two at most.
    assert len(server.asked) <= 20 - asked + 2
    assert len(server.asked) < 20


@pytest.mark.parametrize(("status", "error"), [(404, InputError), (401, UnavailableError), (403, UnavailableError)])
def test_what_concerns_every_item_stops_at_once(cache: Cache, status: int, error: type[Exception]) -> None:
    with chat_server(lambda *_: Reply(status=status)) as server, pytest.raises(error, match=r"made to fail"):
        ask(prompts(30), server.url, cache, model="nobody", concurrency=2)
    assert len(server.asked) <= 4


def test_no_items_and_equal_ids_are_refused(cache: Cache) -> None:
    with pytest.raises(InputError, match="0 items"):
        ask([], "http://127.0.0.1:1/v1", cache)
    with pytest.raises(InputError, match="same id"):
        ask(prompts(1) * 2, "http://127.0.0.1:1/v1", cache)


def test_answers_survive_their_file(tmp_path: Path) -> None:
    answers = [
        Answer("å\u2028", 'line\nbreak "quoted" \u2028 x', "stop", 1, 2, 0.5, 1.5),
        Answer("b", "", None, None, None, None, 2.0, "timeout: x"),
        Answer("c", "", "tool_calls", 1, 2, 0.5, 1.5, tool_calls=({"name": "now", "arguments": {}},)),
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
        ("I cannot help with that.", "refused"),
        ("As an AI language model, I have no opinion.", "refused"),
        ("I won't write this for you.", "refused"),
        ("I don't know.", "no_answer"),
        ("Sorry, I do not know that one.", "no_answer"),
        ("The context does not mention it.", "no_answer"),
        ("Based on the provided context, it is not stated when.", "no_answer"),
        ("I'm sorry, but the passages don't contain the fee.", "no_answer"),
        ("I cannot answer this from the context.", "no_answer"),
        ("I don't have enough information to say.", "no_answer"),
        ("Unfortunately, there is no information about that here.", "no_answer"),
        ("You cannot build without a permit.", "answered"),
        ("I know: a permit.", "answered"),
        ("In the context, a permit costs 100.", "answered"),
        ("The information must contain a drawing.", "answered"),
        ("Unknownness is no word.", "answered"),
        ("  \n", "empty"),
    ],
)
def test_a_refusal_and_not_knowing_are_known_by_their_opening_only(text: str, outcome: str) -> None:
    assert Answer("a", text, "stop", 1, 1, 0.1, 0.2).outcome == outcome
