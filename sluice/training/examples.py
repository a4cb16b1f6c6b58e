"""The examples of a dataset as the model will see them: checked, measured in tokens, too long ones left out.

An example longer than `data.max_length` would lose the end of its answer, and with it the token that ends the turn: a
model trained on that does not stop, and one trained on prompts alone learns nothing while its loss reads 0.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json


@dataclass(frozen=True)
class Split:
    """The usable examples of one file, in its order: messages, tokens of each, and how many were too long."""

    messages: tuple[Json, ...]
    lengths: tuple[int, ...]
    too_long: int

    def write(self, path: Path) -> None:
        """One JSON line for each example, as AutoModel reads them."""
        lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in self.messages]
        path.write_text("".join(lines), encoding="utf-8")


def read_split(path: Path, base_dir: Path, max_length: int, limit: int | None = None) -> Split:
    """The first `limit` usable examples of `path`. Raises `InputError` naming the line that is no answered chat."""
    chats = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            chats.append(_answered_chat(line, f"{path.name} line {number} of the dataset"))
    lengths = count_tokens(chats, base_dir)
    usable = [(chat, length) for chat, length in zip(chats, lengths, strict=True) if length <= max_length]
    kept = usable[: limit or len(usable)]
    return Split(tuple(chat for chat, _ in kept), tuple(length for _, length in kept), len(chats) - len(usable))


def count_tokens(chats: list[Json], base_dir: Path) -> list[int]:
    """Tokens of each chat through the base model's chat template (rendered as transformers does, without torch)."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from tokenizers import Tokenizer

    template_file, tokenizer_file = base_dir / "chat_template.jinja", base_dir / "tokenizer.json"
    for needed in (template_file, tokenizer_file):
        if not needed.is_file():
            raise InputError(f"The base model {base_dir} holds no {needed.name}.")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(template_file.read_text(encoding="utf-8"))
    texts = [template.render(messages=chat, add_generation_prompt=False) for chat in chats]
    encoded = Tokenizer.from_file(str(tokenizer_file)).encode_batch(texts, add_special_tokens=False)
    return [len(encoding.ids) for encoding in encoded]


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
