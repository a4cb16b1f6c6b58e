from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sluice.curation import attributes as names
from sluice.curation.attributes import format_contexts, format_messages, format_request, parse_messages, record_of_span
from sluice.curation.records import THUMB, Context, Message, Score, latest_scores, read_records, write_records
from sluice.infra.errors import IntegrityError
from sluice.provenance.canonical import Json
from tests.curation.traces import correct, make_record, thumb


def test_records_come_back_from_their_lines_as_they_were(tmp_path: Path) -> None:
    awkward = make_record(1, question='Får jag bygga?\u2028 "ja"\n\ttabs 🏠')
    full = replace(
        thumb(correct(awkward, "Better."), False), contexts=(Context("c1", "text"),), ttft_ms=12.5, input_tokens=3
    )
    half = replace(make_record(2), ended_ms=None)
    write_records([full, half], tmp_path / "records.jsonl")
    assert list(read_records(tmp_path / "records.jsonl")) == [full, half]
    assert (tmp_path / "records.jsonl").read_bytes().count(b"\n") == 2


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_records([make_record(1)], path)
    path.write_bytes(path.read_bytes() + b'{"id": "x"}\n')
    with pytest.raises(IntegrityError, match=r"Line 2 of .*records\.jsonl"):
        list(read_records(path))


def test_the_last_word_of_each_author_counts() -> None:
    flipped = thumb(thumb(thumb(make_record(1), True, user="a"), True, user="b"), False, user="a")
    assert [(s.author, s.value) for s in latest_scores(flipped.scores, THUMB)] == [("b", True), ("a", False)]
    same_moment = (Score("2", THUMB, False, "user", "a", 5), Score("1", THUMB, True, "user", "a", 5))
    assert latest_scores(same_moment, THUMB) == latest_scores(same_moment[::-1], THUMB)
    assert latest_scores(flipped.scores, "other") == ()


def span_attributes() -> dict[str, Json]:
    messages = [Message("system", "s"), Message("user", "Context:\n- é\n\nQuestion: 42")]
    return {
        names.OPERATION: "chat",
        names.REQUEST_MODEL: "assistant",
        names.RESPONSE_MODEL: "assistant-abc",
        names.SESSION: "s1",
        names.USER: "u1",
        names.INPUT_MESSAGES: format_messages(messages),
        names.OUTPUT_MESSAGES: format_messages([Message("assistant", "42 m\u00b2")], "stop"),
        names.REQUEST: format_request("42"),
        names.CONTEXTS: format_contexts([Context("c", "t")]),
        names.INPUT_TOKENS: 7,
        names.TTFT_MS: 1.5,
        names.RELEASE: "sha256:ab",
    }


def test_a_span_tells_the_same_parsed_or_as_text() -> None:
    as_text = span_attributes()
    parsed = {key: json.loads(v) if str(v).startswith(("[", "{")) else v for key, v in as_text.items()}
    one = record_of_span("1" * 32, 1, 2, "ok", as_text, ())
    assert one == record_of_span("1" * 32, 1, 2, "ok", parsed, ())
    assert one.question == "42"
    assert one.answer == "42 m²"
    assert one.finish_reason == "stop"
    assert one.messages[1].content == "Context:\n- é\n\nQuestion: 42"
    assert (one.model, one.input_tokens, one.output_tokens, one.ttft_ms) == ("assistant-abc", 7, None, 1.5)
    assert one.contexts == (Context("c", "t"),)


def test_what_others_send_does_not_break_the_reading() -> None:
    assert parse_messages([{"role": "user", "content": "plain"}]) == (Message("user", "plain"),)
    several = [{"role": "user", "parts": [{"type": "text", "content": "a"}, {"type": "blob"}, {"content": "b"}]}]
    assert parse_messages(several) == (Message("user", "ab"),)
    not_messages: list[Json] = [None, "", "not json", 5, {"a": 1}, [1, "x"], [{"parts": []}]]
    for broken in not_messages:
        assert parse_messages(broken) == ()
    strange = {names.INPUT_TOKENS: "many", names.TTFT_MS: float("nan"), names.USER: 17, names.CONTEXTS: "x"}
    record = record_of_span("1" * 32, 1, 2, "ok", strange, ())
    assert (record.input_tokens, record.ttft_ms, record.user, record.contexts) == (None, None, "17", ())
    foreign = {names.INPUT_MESSAGES: format_messages([Message("user", "Only this?")])}
    assert record_of_span("1" * 32, 1, 2, "ok", foreign, ()).question == "Only this?"


def test_half_a_character_does_not_stop_a_harvest(tmp_path: Path) -> None:
    attributes = span_attributes() | {names.REQUEST: '{"question": "broken \\ud800 text"}'}
    record = record_of_span("1" * 32, 1, 2, "ok", attributes, ())
    assert record.question == "broken ? text"
    write_records([record], tmp_path / "records.jsonl")
