"""The items of a suite as they are asked: question, messages, contexts, and what a right answer is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sluice.evaluation.json_lines import json_lines
from sluice.infra.errors import InputError
from sluice.infra.field_mistakes import meant
from sluice.provenance.canonical import Json, canonical_json, digest_json

ITEMS_FILE = "items.jsonl"


@dataclass(frozen=True)
class Item:
    """One item. `messages` is what the model gets (role and content), `contexts` the passages among it.

    `slices` names the groups that it belongs to (`category`: `permits`). `json_schema` is what the answer has to
    satisfy, `tools` are OpenAI tool definitions that the model is offered, `expected_calls` the calls (name, arguments)
    that it should make.
    """

    id: str
    question: str
    reference: str
    messages: tuple[Mapping[str, Any], ...]
    contexts: tuple[str, ...] = ()
    slices: Mapping[str, str] = field(default_factory=dict)
    json_schema: Json | None = None
    tools: tuple[Json, ...] = ()
    expected_calls: tuple[Json, ...] = ()

    @property
    def digest(self) -> str:
        """Identity of the item: another wording, context, tool or reference is another item."""
        return digest_json(_fields(self))


def asking_order(item_ids: Iterable[str]) -> tuple[str, ...]:
    """The order in which items are asked and looked at: by the digest of their ids. It is the same however they come,
    and has nothing to do with what they ask, so the first n of it are a fair sample."""
    return tuple(sorted(item_ids, key=digest_json))


def write_items(path: Path, items: Iterable[Item]) -> None:
    """JSONL, one item a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(canonical_json(_fields(item)) + b"\n" for item in items))


def read_items(path: Path) -> tuple[Item, ...]:
    """Items of a JSONL file. `question` alone is enough to ask: it is then the one user message. Raises `InputError`
    naming file, line and field."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"The items {str(path)!r} cannot be read: {error}.") from error
    found: dict[str, Item] = {}
    for where, row in json_lines(data, str(path)):
        item = _item(row, where)
        if item.id in found:
            raise InputError(f"{where}: id = {item.id!r} is given twice.")
        found[item.id] = item
    if not found:
        raise InputError(f"{path} holds 0 items.")
    return tuple(found.values())


def _item(row: Json, where: str) -> Item:
    if not isinstance(row, dict):
        raise InputError(f"{where} must be an object with id, question and reference.")
    for name in row:
        if name not in Item.__dataclass_fields__:
            raise InputError(f"{where}: {name} is no field of an item{meant(name, Item.__dataclass_fields__)}.")
    for name in ("id", "question"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise InputError(f"{where}: {name} = {row.get(name)!r} must be a text that is not empty.")
    row = {"reference": "", "messages": [{"role": "user", "content": row["question"]}], **row}
    for name, (holds, must) in _SHAPES.items():
        if name in row and not holds(row[name]):
            raise InputError(f"{where}: {name} = {row[name]!r} must be {must}.")
    for name in ("messages", "contexts", "tools", "expected_calls"):
        row[name] = tuple(row.get(name, ()))
    return Item(**row)


def _is_text(value: Json) -> bool:
    return isinstance(value, str)


def _are(each: Callable[[Json], bool]) -> Callable[[Json], bool]:
    return lambda value: isinstance(value, list) and all(each(one) for one in value)


def _is_message(value: Json) -> bool:
    # Only the role is looked at: content may be parts, or be missing beside tool calls.
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def _is_call(value: Json) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"name", "arguments"}
        and isinstance(value["name"], str)
        and isinstance(value["arguments"], dict)
    )


def _is_slices(value: Json) -> bool:
    return isinstance(value, dict) and all(
        SLICE_NAME.match(name) and isinstance(one, str) and one.strip() and "=" not in one
        for name, one in value.items()
    )


SLICE_NAME = re.compile(r"^[a-z][a-z0-9_]*$")
_SHAPES: Mapping[str, tuple[Callable[[Json], bool], str]] = {
    "reference": (_is_text, "a text"),
    "messages": (
        lambda value: bool(value) and _are(_is_message)(value),
        "a list of messages, each with a role, that is not empty",
    ),
    "contexts": (_are(_is_text), "a list of texts"),
    "slices": (
        _is_slices,
        'an object of names (small letters, digits, _) and texts without "=", such as {"category": "permits"}',
    ),
    "json_schema": (lambda value: value is None or isinstance(value, dict), "a JSON schema (an object)"),
    "tools": (_are(lambda one: isinstance(one, dict)), "a list of tool definitions (objects)"),
    "expected_calls": (_are(_is_call), 'a list of objects with "name" and "arguments" (an object)'),
}


def _fields(item: Item) -> dict[str, Json]:
    return {**asdict(item), "slices": dict(item.slices)}
