"""Evaluations on a real store, cache and HTTP server: nothing is asked twice, and nothing is believed that was lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice.components.answers import answers_step
from sluice.components.holdout import held_out
from sluice.components.rerun import rerun
from sluice.components.task import Task
from sluice.curation.holdout import HoldoutItem, read_holdout, write_holdout
from sluice.evaluation.answers import read_answers
from sluice.evaluation.items import ITEMS_FILE, read_items
from sluice.evaluation.scores import read_scores
from sluice.evaluation.stopping import read_stopping
from sluice.infra.errors import UnavailableError
from sluice.pipelines.reproduce import _compare_output, _scores_within
from sluice.provenance.canonical import canonical_json
from sluice.provenance.step_records import parse_record
from sluice.rag.prompt import build_messages
from tests.components.scripted_releases import SUITE, Place, place, server
from tests.evaluation.chat_server import ChatServer, chat_server

__all__ = ["place", "server"]


def test_the_champion_is_not_asked_again_when_the_next_candidate_comes(place: Place, server: ChatServer) -> None:
    champion, first, second = place.release("champion", 20), place.release("first", 60), place.release("second", 90)
    made, running = place.evaluate(first, champion)
    assert running.state.summary == "all 30 items asked; candidate 30 answered; champion 30 answered"
    assert len(server.asked_of(place.name(champion))) == 30
    again, hit = place.evaluate(first, champion)
    assert (again, hit.state.hit) == (made, True)
    other, _ = place.evaluate(second, champion)
    assert len(server.asked_of(place.name(champion))) == 30
    assert len(server.asked) == 90
    # A candidate that has become champion is known as well, whoever asks.
    place.evaluate(second, first)
    answers_step(
        Task("answers", place.workspace), release=first, base=place.base, prompts=place.prompts, suite=place.suite
    )
    assert len(server.asked) == 90
    folder = place.workspace.folder(other)
    assert read_stopping(folder).sentence == "all 30 items asked"
    assert read_answers(folder / "champion" / "answers.jsonl") == read_answers(
        place.workspace.folder(made) / "champion" / "answers.jsonl"
    )
    new, old = (read_scores(folder / side).columns["token_f1"].values for side in ("candidate", "champion"))
    assert sum(value or 0 for value in new.values()) > sum(value or 0 for value in old.values())


def test_another_precision_is_another_model(place: Place, server: ChatServer) -> None:
    one, other = place.release("one", 20), place.release("other", 60)
    place.evaluate(one, other)
    serving = place.workspace.settings.serving.model_copy(update={"dtype": "float32"})
    settings = place.workspace.settings.model_copy(update={"serving": serving})
    object.__setattr__(place.workspace, "settings", settings)
    place.evaluate(one, other)
    assert len(server.asked) == 120


def test_a_sequential_suite_stops_and_says_what_that_saved(place: Place, server: ChatServer) -> None:
    place.suite = place.write(SUITE + "sequential: {batch: 10}\n")
    champion, better = place.release("champion", 5), place.release("better", 95)
    made, running = place.evaluate(better, champion)
    stopping = read_stopping(place.workspace.folder(made))
    assert 20 <= stopping.asked < 30
    assert len(server.asked) == 2 * stopping.asked
    assert running.state.summary.startswith(
        f"{stopping.asked} of 30 items asked, {stopping.answer_requests_saved} answers saved: Token F1 passed"
    )


def test_the_order_of_the_items_changes_nothing(place: Place, server: ChatServer) -> None:
    place.suite = place.write(SUITE + "sequential: {batch: 10}\n")
    champion, better = place.release("champion", 30), place.release("better", 70)
    one, _ = place.evaluate(better, champion)
    other, _ = place.evaluate(better, champion, prompts=place.prompts_of(30, shuffled=True))
    files = [
        {entry.path: entry.digest for entry in place.workspace.artifacts.manifest(made).files} for made in (one, other)
    ]
    assert files[0] == files[1]
    assert len(server.asked) == 2 * read_stopping(place.workspace.folder(one)).asked


def test_a_server_that_dies_leaves_what_it_said_and_the_next_run_asks_the_rest(place: Place) -> None:
    champion, candidate = place.release("champion", 20), place.release("candidate", 60)
    with chat_server(by_model=place.reply) as server:
        place.at(server)
        answers_step(
            Task("answers", place.workspace),
            release=candidate,
            base=place.base,
            prompts=place.prompts,
            suite=place.suite,
        )
    with pytest.raises(UnavailableError, match="stopped answering") as raised:
        place.evaluate(candidate, champion)
    assert "0 of 30 answers are kept" in raised.value.hint
    with chat_server(by_model=place.reply) as back:
        place.at(back)
        _, running = place.evaluate(candidate, champion)
    assert len(back.asked) == len(back.asked_of(place.name(champion))) == 30
    assert running.state.summary.startswith("all 30 items asked")


def test_what_was_lost_is_asked_again_by_the_next_run_and_nothing_else(place: Place, server: ChatServer) -> None:
    champion, candidate = place.release("champion", 20), place.release("candidate", 60)
    place.failing = {f"question {n}" for n in range(9)}
    broken, running = place.evaluate(candidate, champion)
    assert running.state.summary.endswith("Token F1 of 9 of 30 items could not be measured")
    assert "candidate 21 answered, 9 error" in running.state.summary
    place.failing = {"question 3"}
    server.asked.clear()
    mended, running = place.evaluate(candidate, champion)
    assert sorted(set(server.asked)) == sorted(f"question {n}" for n in range(9))
    assert len(server.asked) == 18
    assert mended != broken
    # One lost of thirty is within the policy's budget: that is a result.
    server.asked.clear()
    assert place.evaluate(candidate, champion)[0] == mended
    assert server.asked == []
    assert running.state.hit is False


def test_reproduction_really_asks_again_and_compares_both_sides(
    place: Place, server: ChatServer, tmp_path: Path
) -> None:
    champion, candidate = place.release("champion", 20), place.release("candidate", 60)
    made, running = place.evaluate(candidate, champion)
    place_of_record = next(
        info.key
        for info in place.workspace.objects.list("steps/")
        if parse_record(info.key, place.workspace.objects.get(info.key)).key.name == "evaluate"
    )
    record = parse_record(place_of_record, place.workspace.objects.get(place_of_record))
    server.asked.clear()
    scratch, again = rerun(place.workspace, record, tmp_path / "once-more", suite=place.suite)
    assert len(server.asked) == 60
    told = _compare_output(scratch, "evaluation", made, again.output.artifacts["evaluation"])
    assert (told.same, told.account) == (True, True)
    assert told.note.startswith("30 of 30 answers of the candidate are the same text; 30 of 30 answers of the champion")
    place.right[place.name(candidate)] = 0
    scratch, worse = rerun(place.workspace, record, tmp_path / "otherwise", suite=place.suite)
    told = _compare_output(scratch, "evaluation", made, worse.output.artifacts["evaluation"])
    assert not told.same
    assert "30 of 30 answers of the champion" in told.note
    scores = {one.metric: one for one in _scores_within(scratch, told)}
    fallen, kept = scores["candidate token_f1"], scores["champion token_f1"]
    assert fallen.recorded is not None
    assert fallen.rerun is not None
    assert fallen.recorded > fallen.rerun
    assert kept.recorded == kept.rerun
    assert running.state.outputs["evaluation"] == made


def test_a_suites_own_items_are_asked_as_written_and_kept_out_of_training(place: Place) -> None:
    folder = place.workspace.settings.home / "holdout"
    write_holdout([HoldoutItem("old", "an old question", "yes", "fees")], folder)
    frozen = place.workspace.artifacts.put_directory(folder, "holdout").digest
    place.workspace.objects.put("holdouts/assistant.json", canonical_json({"digest": frozen}))
    beside = place.workspace.settings.home / "mine.jsonl"
    with_passage = '{"id": "b", "question": "Why?", "contexts": ["Because."]}\n'
    beside.write_text('{"id": "a", "question": "What is it?", "reference": "A permit"}\n' + with_passage)
    suite = place.write(SUITE.replace("minimum_n: 20", "minimum_n: 2") + "items: {source: file, file: mine.jsonl}\n")
    running = Task("holdout", place.workspace)
    held, prompts = held_out(running, index="", size=1, suite=suite)
    assert running.state.summary == "2 questions of suite mine, kept out of training"
    kept_out = [item.question for item in read_holdout(place.workspace.folder(held))]
    assert kept_out == ["an old question", "What is it?", "Why?"]
    plain, passages = read_items(place.workspace.folder(prompts) / ITEMS_FILE)
    assert plain == read_items(beside)[0]
    # Passages are in the prompt as production would put them there.
    assert list(passages.messages) == build_messages("Why?", ["Because."])
    assert held_out(Task("holdout", place.workspace), index="", size=1, suite=suite) == (held, prompts)
    beside.write_text(beside.read_text().replace("permit", "licence"))
    assert held_out(Task("holdout", place.workspace), index="", size=1, suite=suite)[1] != prompts
