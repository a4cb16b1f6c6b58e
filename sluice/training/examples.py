"""The examples of a dataset as the model will see them: checked, measured in tokens, too long ones left out.

An example longer than `data.max_length` would lose the end of its answer, and with it the token that ends the turn: a
model trained on that does not stop, and one trained on prompts alone learns nothing while its loss reads 0.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json
from sluice.training.chat_template import ChatTemplate


@dataclass(frozen=True)
class Split:
    """The usable examples of one file, in its order: messages, tokens of each, how many of these carry the loss, and
    how many examples were too long."""

    messages: tuple[Json, ...]
    lengths: tuple[int, ...]
    label_counts: tuple[int, ...]
    too_long: int

    def write(self, path: Path) -> None:
        """One JSON line for each example."""
        lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in self.messages]
        path.write_text("".join(lines), encoding="utf-8")


def read_split(path: Path, base_dir: Path, max_length: int, limit: int | None = None) -> Split:
    """The first `limit` usable examples of `path`. Raises `InputError` naming the line that is no answered chat."""
    chats = read_chats(path)
    encoded = ChatTemplate(base_dir).encode(chats, path.name)
    usable = [(chat, one) for chat, one in zip(chats, encoded, strict=True) if len(one.tokens) <= max_length]
    kept = usable[: limit or len(usable)]
    return Split(
        messages=tuple(chat for chat, _ in kept),
        lengths=tuple(len(one.tokens) for _, one in kept),
        label_counts=tuple(int(one.said.sum()) for _, one in kept),
        too_long=len(chats) - len(usable),
    )


def read_chats(path: Path) -> list[Json]:
    """The messages of each line. Raises `InputError` naming the line that is no answered chat."""
    lines = enumerate(path.read_text(encoding="utf-8").split("\n"), start=1)
    return [_answered_chat(line, f"{path.name} line {number} of the dataset") for number, line in lines if line.strip()]


def count_tokens(chats: Sequence[Json], base_dir: Path, source: str = "the dataset") -> list[int]:
    """Tokens of each chat through the base model's chat template."""
    return [len(chat.tokens) for chat in ChatTemplate(base_dir).encode(chats, source)]


def _answered_chat(line: str, where: str) -> Any:
    try:
        messages = json.loads(line)["messages"]
        last = messages[-1]
        answered = last["role"] == "assistant" and bool(last["content"].strip())
        answered = answered and all(isinstance(message["content"], str) for message in messages)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        answered = False
    if not answered:
        raise InputError(f"{where} is not a chat that ends in an assistant's answer: {line[:80]!r}.")
    return messages
