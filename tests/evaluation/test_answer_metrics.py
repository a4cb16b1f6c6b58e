"""Metrics against values worked out by hand, and against their own laws."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.evaluation import answer_metrics
from sluice.evaluation.answer_metrics import bleu, chrf, exact_match, rouge_l, score_answers, token_f1
from sluice.evaluation.items import Item
from sluice.evaluation.json_answers import json_schema, json_valid
from sluice.evaluation.outcomes import Answer
from sluice.evaluation.tool_calls import calls_of, tool_call, tool_call_name
from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json

TOOLS = ({"type": "function", "function": {"name": "weather"}},)


def answer(item: str, text: str = "", finish: str = "stop", error: str | None = None, calls: Any = ()) -> Answer:
    return Answer(item, text, finish, 5, 5, 0.1, 0.2, error, calls)


def item(name: str, reference: str = "x", **more: Any) -> Item:
    return Item(name, "?", reference, ({"role": "user", "content": "?"},), **more)


def test_token_f1_counts_repeated_words() -> None:
    # Shared words: a, permit (once); 2 * 2 / (4 + 3).
    assert token_f1("A permit, a permit!", "need a permit") == pytest.approx(4 / 7)
    assert token_f1("Före bygget", "före BYGGET.") == 1.0
    assert token_f1("", "something") == 0.0
    assert token_f1("", "?!") == 1.0


def test_rouge_l_is_about_order() -> None:
    # Lin 2004, section 3.1: "police killed the gunman" against "police kill the gunman" and "the gunman kill police":
    # longest common subsequences of 3 and 2 words of 4.
    reference = "police killed the gunman"
    assert rouge_l("police kill the gunman", reference) == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", reference) == pytest.approx(2 / 4)
    assert exact_match("Police killed, the gunman", reference) == 1.0
    assert exact_match("the gunman killed police", reference) == 0.0


@given(st.text(alphabet="ab c", max_size=30), st.text(alphabet="ab c", max_size=30))
def test_overlap_metrics_are_symmetric_bounded_and_ordered(left: str, right: str) -> None:
    for function in (token_f1, rouge_l):
        assert function(left, right) == function(right, left)
        assert 0 <= function(left, right) <= 1
        assert function(left, left) == 1
    assert exact_match(left, right) <= rouge_l(left, right) <= token_f1(left, right) + 1e-12


def test_what_has_no_value_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    known = answer_metrics._BY_NAME
    broken = {**known, "rouge_l": replace(known["rouge_l"], value=lambda *_: math.nan)}
    items = [item("d"), item("a", "one two"), item("b"), item("c")]
    answers = [answer("a", "one two"), answer("b", error="timeout: 5 s"), answer("c", "x y", finish="length")]
    scores = score_answers(answers, items, ["token_f1", "answer_rate", "answer_words", "judged.faithfulness"])
    assert set(scores.columns) == {"token_f1", "answer_rate", "answer_words"}
    assert scores.columns["token_f1"].values == {"a": 1.0, "b": None, "c": 2 / 3, "d": None}
    assert scores.columns["answer_rate"].values == {"a": 1.0, "b": None, "c": 0.0, "d": None}
    assert scores.columns["answer_words"].values == {"a": 2.0, "b": None, "c": 2.0, "d": None}
    assert scores.columns["token_f1"].causes == {"b": "timeout", "d": "missing"}
    assert scores.outcomes == {"a": "answered", "b": "timeout", "c": "truncated", "d": "missing"}
    monkeypatch.setattr(answer_metrics, "_BY_NAME", broken)
    (column,) = score_answers(answers, items, ["rouge_l"]).columns.values()
    assert set(column.values.values()) == {None}
    assert column.causes["a"] == "not a finite number"


def test_answers_that_do_not_belong_are_refused() -> None:
    with pytest.raises(InputError, match="'a' has two answers"):
        score_answers([answer("a"), answer("a")], [item("a")], ["token_f1"])
    with pytest.raises(InputError, match="'z' has an answer but was not asked"):
        score_answers([answer("z")], [item("a")], ["token_f1"])


def test_outcomes_have_rates_of_their_own() -> None:
    texts = {"a": "I'm sorry, but I won't do that.", "b": "The context does not say.", "c": "Green.", "d": ""}
    answers = [answer(name, text) for name, text in texts.items()]
    scores = score_answers(answers, [item(name) for name in texts], ["refusal_rate", "no_answer_rate", "answer_rate"])
    assert scores.columns["refusal_rate"].values == {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0}
    assert scores.columns["no_answer_rate"].values == {"a": 0.0, "b": 1.0, "c": 0.0, "d": 0.0}
    assert scores.columns["answer_rate"].values == {"a": 0.0, "b": 0.0, "c": 1.0, "d": 0.0}


PERMIT = {
    "type": "object",
    "properties": {"permit": {"type": "boolean"}, "days": {"type": "integer", "minimum": 0}},
    "required": ["permit"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "valid", "right"),
    [
        ('{"permit": true, "days": 3}', 1, 1),
        ('  {"permit": false}\n', 1, 1),
        ('```json\n{"permit": true}\n```', 1, 1),
        ('```\n{"permit": true}\n```', 1, 1),
        ('{"permit": "true"}', 1, 0),
        ('{"permit": true, "days": 3.0}', 1, 1),
        ('{"permit": true, "days": 3.5}', 1, 0),
        ('{"permit": true, "days": -1}', 1, 0),
        ('{"permit": true, "more": 1}', 1, 0),
        ("{}", 1, 0),
        ("null", 1, 0),
        ("7", 1, 0),
        ('{"permit": true', 0, 0),
        ('Here it is: {"permit": true}', 0, 0),
        ('```json\n{"permit": true}\n```\nI hope this helps!', 0, 0),
        ("{'permit': True}", 0, 0),
        ('{"permit": NaN}', 0, 0),
        ("", 0, 0),
        ("[" * 100_000, 0, 0),
    ],
)
def test_json_is_the_whole_answer_and_satisfies_the_schema(text: str, valid: float, right: float) -> None:
    assert json_valid(text) == valid
    assert json_schema(text, PERMIT) == right


@pytest.mark.parametrize(
    ("text", "schema"),
    [
        ("[" * 400 + "]" * 400, {"type": "array", "items": {"$ref": "#"}}),
        ("1" * 400, {"multipleOf": 0.1}),
        ("1e999", {"multipleOf": 0.1}),
    ],
)
def test_an_answer_that_no_program_can_use_is_wrong_and_stops_nothing(text: str, schema: dict[str, object]) -> None:
    assert json_schema(text, schema) == 0.0


@pytest.mark.parametrize("deep", ["[" * 100_000, "[" * 900 + "]" * 900])
def test_a_call_without_end_is_a_wrong_call_and_stops_nothing(deep: str) -> None:
    text = f'<tool_call>{{"name": "x", "arguments": {{"a": {deep}}}}}</tool_call>'
    calls = calls_of(Answer("i", text, "stop", 1, 1, 0.1, 0.1))
    assert len(calls) == 1
    assert tool_call(calls, [{"name": "x", "arguments": {}}]) == tool_call(calls, []) == 0.0


def test_a_schema_is_checked_and_leads_nowhere_else() -> None:
    assert json_schema('{"a": 1}', {"$ref": "#/$defs/x", "$defs": {"x": {"type": "object"}}}) == 1.0
    assert json_schema("7", True) == 1.0
    for bad in (
        {"type": "nonsense"},
        {"$ref": "http://127.0.0.1:9/schema.json"},
        {"$ref": "#/$defs/gone"},
        {"$schema": 5},
    ):
        with pytest.raises(InputError, match="is no JSON schema"):
            json_schema('{"a": 1}', bad)


def call(name: str, **arguments: Json) -> dict[str, Json]:
    return {"name": name, "arguments": arguments}


@pytest.mark.parametrize(
    ("made", "expected", "right", "names"),
    [
        ([call("weather", city="Oslo", days=2)], [call("weather", days=2, city="Oslo")], 1, 1),
        ([call("weather", days=2.0)], [call("weather", days=2)], 1, 1),
        ([call("weather", days="2")], [call("weather", days=2)], 0, 1),
        ([call("weather", days=True)], [call("weather", days=1)], 0, 1),
        ([call("weather", days=None)], [call("weather")], 0, 1),
        ([call("weather", at=[1, 2])], [call("weather", at=[2, 1])], 0, 1),
        ([call("weather", at={"a": 1.0, "b": 2})], [call("weather", at={"b": 2, "a": 1})], 1, 1),
        ([call("b"), call("a")], [call("a"), call("b")], 1, 1),
        ([call("a"), call("a")], [call("a")], 0, 0),
        ([call("a")], [call("a"), call("a")], 0, 0),
        ([call("clock")], [call("weather")], 0, 0),
        ([{"name": "weather", "arguments": "{city"}], [call("weather", city="Oslo")], 0, 1),
        ([{"name": "weather"}], [call("weather")], 1, 1),
        ([], [], 1, 1),
        ([call("weather")], [], 0, 0),
        ([], [call("weather")], 0, 0),
    ],
)
def test_calls_are_compared_as_json(
    made: list[Mapping[str, Json]], expected: list[Mapping[str, Json]], right: float, names: float
) -> None:
    assert tool_call(made, expected) == right
    assert tool_call_name(made, expected) == names


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.dictionaries(st.sampled_from("xy"), st.integers(0, 2) | st.booleans())),
        max_size=4,
    ),
    st.randoms(),
)
def test_the_order_of_calls_does_not_matter_and_their_number_does(pairs: list[Any], random: Any) -> None:
    calls = [call(name, **arguments) for name, arguments in pairs]
    shuffled = random.sample(calls, len(calls))
    assert tool_call(shuffled, calls) == 1.0
    assert tool_call([*calls, call("a")], calls) == 0.0


def test_calls_come_from_the_server_or_from_the_text() -> None:
    written = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    assert calls_of(answer("a", written)) == (call("weather", city="Oslo"),)
    assert calls_of(answer("a", f"Sure.\n{written}\n{written}")) == (call("weather", city="Oslo"),) * 2
    assert calls_of(answer("a", written, calls=(call("clock"),))) == (call("clock"),)
    assert calls_of(answer("a", "No call is needed.")) == ()
    # What cannot be read is a call all the same, and a wrong one.
    for broken in ("<tool_call>weather(Oslo)</tool_call>", '<tool_call>{"name": "wea', "<tool_call>[]</tool_call>"):
        assert tool_call(calls_of(answer("a", broken)), ()) == 0.0
    text = json.dumps({"name": "weather", "arguments": '{"city": "Oslo"}'})
    assert tool_call(calls_of(answer("a", f"<tool_call>{text}</tool_call>")), [call("weather", city="Oslo")]) == 0.0


def test_a_metric_leaves_out_the_items_that_it_does_not_apply_to() -> None:
    items = [
        item("text"),
        item("json", "", json_schema=PERMIT),
        item("tool", "", tools=TOOLS, expected_calls=(call("weather"),)),
        item("none", "No tool is needed.", tools=TOOLS),
    ]
    answers = [
        answer("text", "x"),
        answer("json", '{"permit": true}'),
        answer("tool", calls=(call("weather"),)),
        answer("none", "No tool is needed."),
    ]
    names = ["exact_match", "json_valid", "json_schema", "tool_call", "tool_call_name"]
    columns = score_answers(answers, items, names).columns
    assert columns["exact_match"].values == {"text": 1.0, "none": 1.0}
    assert columns["json_valid"].values == columns["json_schema"].values == {"json": 1.0}
    assert columns["tool_call"].values == columns["tool_call_name"].values == {"tool": 1.0, "none": 1.0}
    # What was lost is lost for the metrics that would have applied, and for no other.
    lost = [answer(one.id, error="http 500: x") for one in items]
    assert score_answers(lost, items, ["json_valid"]).columns["json_valid"].causes == {"json": "http 500"}


def test_bleu_reads_the_whole_text_and_chrf_forgives_an_ending() -> None:
    right, half = (
        "The fee is 45 euros. It is due with the application.",
        "The fee is 45 euros. Dogs may not enter here.",
    )
    assert bleu(right, right) == 1.0
    assert 0.2 < bleu(half, right) < 0.7  # the second sentence counts
    assert chrf(right, right) == 1.0
    assert chrf("the fees were paid", "the fee was paid") > bleu("the fees were paid", "the fee was paid")
    assert bleu("", right) == chrf("", right) == 0.0


def test_semantic_similarity_is_the_cosine_of_the_embeddings() -> None:
    class Directions:
        digest = "sha256:" + "0" * 64

        def embed(self, texts: Sequence[str]) -> np.ndarray:
            return np.array(
                [{"right": [1.0, 0.0], "near": [0.6, 0.8], "": [1.0, 0.0]}.get(t, [-1.0, 0.0]) for t in texts]
            )

    said = {"a": "right", "b": "near", "c": "contrary", "d": ""}
    items = [Item(name, "What?", "right", ()) for name in said]
    answers = [Answer(name, text, "stop", 1, 1, 0.1, 0.1) for name, text in said.items()]
    found = score_answers(answers, items, ["semantic_similarity"], embed=Directions()).columns["semantic_similarity"]
    assert found.values == {"a": 1.0, "b": pytest.approx(0.6), "c": 0.0, "d": 0.0}
    with pytest.raises(InputError, match="needs an embedding model"):
        score_answers(answers, items, ["semantic_similarity"])
