"""The traffic player: reviews by the published answer, and goes on where it was killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sluice.demo.assistant import Reply
from sluice.demo.plan import load_plan
from sluice.demo.player import TrafficPlayer, review
from sluice.infra.errors import InputError
from sluice.rag.corpus import FaqItem

ITEMS = [
    FaqItem(f"q{n}", "permits", f"Question {n}?", f"The answer to number {n} is a building permit.") for n in range(6)
]


class Tracer:
    def flush(self, timeout_s: float = 30.0) -> None:
        """Nothing waits."""


class Assistant:
    """Answers rightly for even numbers, wrongly for odd ones, and counts."""

    def __init__(self, fail: str = "") -> None:
        self.asked: list[str] = []
        self.tracer = Tracer()
        self.fail = fail

    def ask(self, question: str, *, session: str, user: str) -> Reply:
        self.asked.append(question)
        number = int(question.split()[1].rstrip("?"))
        if question == self.fail:
            return Reply("", "", "", 0.1, "the gateway is gone")
        text = ITEMS[number].answer if number % 2 == 0 else "Bananas are yellow."
        return Reply(f"{number:032x}", text, "sha256:" + "a" * 64, 0.1)


class Store:
    def __init__(self) -> None:
        self.thumbs: dict[str, bool] = {}
        self.corrections: dict[str, str] = {}

    def add_thumb(self, trace_id: str, up: bool, user: str) -> None:
        self.thumbs[trace_id] = up

    def add_correction(self, trace_id: str, text: str, user: str) -> None:
        self.corrections[trace_id] = text


def _player(assistant: Any, store: Any) -> TrafficPlayer:
    return TrafficPlayer(assistant, store, concurrency=2)


def test_thumbs_and_corrections_follow_the_published_answer(tmp_path: Path) -> None:
    store = Store()
    player = _player(Assistant(), store)
    played = player.play(ITEMS, tmp_path / "journal.jsonl")
    assert [one.question for one in played] == [item.id for item in ITEMS]
    assert sorted(store.thumbs.values()) == [False] * 3 + [True] * 3
    assert store.corrections == {f"{n:032x}": ITEMS[n].answer for n in (1, 3, 5)}
    assert (player.tally.up, player.tally.down, player.tally.errors) == (3, 3, 0)


def test_an_interrupted_play_asks_only_what_is_missing(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    _player(Assistant(), Store()).play(ITEMS[:4], journal)
    journal.write_text(journal.read_text() + '{"question": "q4", "tra')
    again, store = Assistant(), Store()
    played = _player(again, store).play(ITEMS, journal)
    assert sorted(again.asked) == ["Question 4?", "Question 5?"]
    assert len(played) == 6
    # Reviews that a kill may have lost are written again for all.
    assert len(store.thumbs) == 6


def test_a_failed_request_is_an_error_that_users_saw(tmp_path: Path) -> None:
    player = _player(Assistant(fail="Question 2?"), Store())
    assert len(player.play(ITEMS, tmp_path / "journal.jsonl")) == 5
    assert (player.tally.errors, player.tally.first_error) == (1, "the gateway is gone")


def test_review_is_content_with_enough_shared_words() -> None:
    item = FaqItem("q", "c", "How long?", "It takes ten weeks by law.")
    assert review(item, Reply("t", "By law it takes ten weeks.", "r", 0.1)).up
    assert review(item, Reply("t", "", "r", 0.1)).correction == item.answer


def test_plans_are_typed() -> None:
    assert load_plan("demo").holdout_size >= 100
    with pytest.raises(InputError, match="no-such-plan"):
        load_plan("no-such-plan")


def test_a_plan_with_a_wrong_field_names_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("base_model: tiny-random-llama\ncolour: red\n")
    with pytest.raises(InputError, match="colour"):
        load_plan(str(path))
