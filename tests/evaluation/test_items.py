"""Items: what people write is read or refused with its line, and every field is part of an item's identity."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.evaluation.items import Item, asking_order, read_items, write_items
from sluice.infra.errors import InputError

WHOLE = Item(
    "a",
    "What is it?",
    "A permit",
    ({"role": "system", "content": "Answer."}, {"role": "user", "content": "What is it?"}),
    ("A passage.",),
    {"category": "permits"},
    {"type": "object"},
    ({"type": "function", "function": {"name": "find"}},),
    ({"name": "find", "arguments": {"id": 1}},),
)


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_items_survive_their_file(tmp_path: Path) -> None:
    items = (WHOLE, Item("b\u2028", "å\u2028?", "", ({"role": "user", "content": "\u2028"},)))
    write_items(tmp_path / "new" / "items.jsonl", items)
    assert read_items(tmp_path / "new" / "items.jsonl") == items


def test_a_question_alone_is_asked_as_it_stands(tmp_path: Path) -> None:
    (item,) = read_items(written(tmp_path, {"id": "a", "question": "What is it?"}))
    assert item == Item("a", "What is it?", "", ({"role": "user", "content": "What is it?"},))


@pytest.mark.parametrize(
    "line",
    [
        '{"id": "a", "question": "\\ud800"}',
        '{"id": "a", "question": "x", "json_schema": {"minimum": NaN}}',
        '{"id": "a", "question": "x", "json_schema": ' + '{"a":' * 3000 + "1" + "}" * 3001,
    ],
)
def test_what_has_no_digest_is_told_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('{"id": "b", "question": "x"}\n' + line)
    with pytest.raises(InputError, match="line 2 is not JSON"):
        read_items(path)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (["a"], "must be an object"),
        ({"question": "x"}, "id = None must be a text that is not empty"),
        ({"id": 1, "question": "x"}, "id = 1 must be a text"),
        ({"id": "a", "question": " "}, "question = ' ' must be"),
        ({"id": "a", "question": "x", "refrence": "y"}, "refrence is no field of an item.*reference"),
        ({"id": "a", "question": "x", "reference": None}, "reference = None must be a text"),
        ({"id": "a", "question": "x", "messages": []}, r"messages = \[\] must be a list of messages"),
        ({"id": "a", "question": "x", "messages": [{"content": "x"}]}, "each with a role"),
        ({"id": "a", "question": "x", "contexts": "one"}, "contexts = 'one' must be a list of texts"),
        ({"id": "a", "question": "x", "contexts": [1]}, "must be a list of texts"),
        ({"id": "a", "question": "x", "slices": {"Category": "x"}}, "slices = .* must be an object of names"),
        ({"id": "a", "question": "x", "slices": {"category": "a=b"}}, "must be an object of names"),
        ({"id": "a", "question": "x", "slices": {"category": 3}}, "must be an object of names"),
        ({"id": "a", "question": "x", "json_schema": "{}"}, "json_schema = '{}' must be a JSON schema"),
        ({"id": "a", "question": "x", "tools": ["find"]}, "tools = .* must be a list of tool definitions"),
        ({"id": "a", "question": "x", "expected_calls": [{"name": "find"}]}, "expected_calls = .* must be a list"),
        ({"id": "a", "question": "x", "expected_calls": [{"name": "f", "arguments": "{}"}]}, "must be a list"),
    ],
)
def test_what_is_no_item_is_refused_with_its_line(tmp_path: Path, row: Any, says: str) -> None:
    with pytest.raises(InputError, match=f"items.jsonl line 2.*{says}"):
        read_items(written(tmp_path, {"id": "first", "question": "x"}, row))


def test_a_file_without_items_equal_ids_and_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds 0 items"):
        read_items(written(tmp_path))
    row = {"id": "a", "question": "x"}
    with pytest.raises(InputError, match="line 2: id = 'a' is given twice"):
        read_items(written(tmp_path, row, row))
    with pytest.raises(InputError, match="cannot be read"):
        read_items(tmp_path / "none.jsonl")
    (tmp_path / "items.jsonl").write_bytes(b'{"id": "a", "question": "\xff"}\n')
    with pytest.raises(InputError, match="line 1 is not JSON"):
        read_items(tmp_path / "items.jsonl")


def test_every_field_is_part_of_an_items_identity() -> None:
    changes: dict[str, Any] = {
        "id": "b",
        "question": "?",
        "reference": "",
        "messages": WHOLE.messages[1:],
        "contexts": (),
        "slices": {},
        "json_schema": None,
        "tools": (),
        "expected_calls": (),
    }
    others = [replace(WHOLE, **{name: value}) for name, value in changes.items()]
    assert len(others) == len(Item.__dataclass_fields__)
    assert len({one.digest for one in (WHOLE, *others)}) == len(others) + 1


@given(st.lists(st.text(max_size=5), unique=True), st.randoms(use_true_random=False))
def test_the_order_of_asking_is_the_same_however_items_come(ids: list[str], drawn: Any) -> None:
    order = asking_order(ids)
    assert sorted(order) == sorted(ids)
    drawn.shuffle(ids)
    assert asking_order(ids) == order
    # A suite that grows asks those that it had before in the same order.
    grown = asking_order([*ids, "one more item"])
    assert tuple(one for one in grown if one != "one more item") == order
