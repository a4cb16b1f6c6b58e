"""A chat as the tokens of its base model's chat template, and which of them the assistant says.

What the assistant says of a turn: from where the template's generation prompt ends (the header
`<|im_start|>assistant\\n`, which the server supplies) through the special token that ends the turn. Positions are found
by rendering, never by looking for a header's text, which a question or an answer may hold too:

- The text of a turn is what changes when its content is replaced; the end of the turn is the special token after it.
- The generation prompt counts where its rendering begins the whole chat's (it may supply more than a header, such as
  an empty block of thoughts). Where a template rewrites earlier turns it does not, and the turn begins with its text.

Jinja2 and tokenizers do it without transformers, whose import costs the launcher seconds, but with its settings; tests
hold the tokens equal to its `apply_chat_template`. One thing differs: `strftime_now` gives a fixed day, since a run
that goes on tomorrow must see today's tokens. AutoModel's ChatDataset is not used: it renders and tokenizes each chat
four times at every access, and puts a loss on the header of an answer that begins with an empty line.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sluice.infra.errors import InputError, IntegrityError
from sluice.provenance.canonical import Json

DAY = datetime.datetime(2024, 7, 26)
"""What a template that asks for today's date is told; Llama 3's templates have it as their default."""
_CHATS_AT_ONCE = 1000
_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token")
_MARK = re.compile(r"(\{%[-+]?\s*)(generation|endgeneration)(\s*[-+]?%\})")
_UNMARKED = {"generation": "if true", "endgeneration": "endif"}


@dataclass(frozen=True)
class EncodedChat:
    """Token numbers [n], and for each whether the assistant says it (so the loss is on it) [n]."""

    tokens: npt.NDArray[np.int32]
    said: npt.NDArray[np.bool_]


class ChatTemplate:
    """The template and tokenizer of a base model's folder. Raises `InputError` for a folder without them."""

    def __init__(self, base_dir: Path) -> None:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from tokenizers import Tokenizer

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        config = _read_json(base_dir / "tokenizer_config.json")
        tokenizer = _read_json(base_dir / "tokenizer.json")
        if not tokenizer:
            raise InputError(f"The base model {base_dir} holds no tokenizer.json.")
        # Templates write special tokens themselves; a post-processor would only blur the tokens' positions.
        tokenizer |= {"post_processor": None, "truncation": None, "padding": None}
        self._tokenizer = Tokenizer.from_str(json.dumps(tokenizer))
        self._special = tuple(one["content"] for one in tokenizer["added_tokens"] if one["special"])
        names = {name: config.get(name) for name in _SPECIAL_NAMES}
        self._names = {
            name: value["content"] if isinstance(value, dict) else value for name, value in names.items() if value
        }
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": raise_exception, "strftime_now": DAY.strftime}
        template = _template_text(base_dir, config)
        thinking = [{"enable_thinking": True}, {"enable_thinking": False}]
        self._prompt_modes: list[dict[str, bool]] = thinking if "enable_thinking" in template else [{}]
        # Some templates mark what the assistant says. Rendering finds it in all of them, so the marks may go.
        template = _MARK.sub(lambda tag: tag[1] + _UNMARKED[tag[2]] + tag[3], template)
        self._template = environment.from_string(template)

    def text(self, chat: Sequence[Json], **names: Any) -> str:
        """The chat as transformers renders it. Raises `jinja2.TemplateError`."""
        return str(self._template.render(messages=chat, **self._names, **names))

    def spans(self, chat: Sequence[Json], where: str = "A chat") -> tuple[str, list[tuple[int, int]]]:
        """The chat's text and what the assistant says in it: (begin, end) in characters, one for each of its turns.

        Raises `InputError`, naming `where`, if the template refuses the chat, leaves a turn out, or does not end it.
        """
        from jinja2 import TemplateError

        try:
            whole, found = self.text(chat), []
            for number, message in enumerate(chat):
                if message["role"] == "assistant":
                    begin, end = self._content(chat, number, whole)
                    found.append((self._begin(chat[:number], whole, begin), self._end(whole, end)))
        except (TemplateError, TypeError, ValueError) as error:
            raise InputError(f"{where} does not fit the base model's chat template: {error}") from error
        return whole, found

    def encode(self, chats: Sequence[Sequence[Json]], source: str = "") -> list[EncodedChat]:
        """Tokens of each chat. Raises `InputError` as `spans` does, naming the chat's number in `source`."""
        encoded = []
        for at in range(0, len(chats), _CHATS_AT_ONCE):
            some = chats[at : at + _CHATS_AT_ONCE]
            rendered = [self.spans(chat, f"Chat {at + n} of {source}") for n, chat in enumerate(some, start=1)]
            encodings = self._tokenizer.encode_batch([text for text, _ in rendered], add_special_tokens=False)
            for encoding, (_, spans) in zip(encodings, rendered, strict=True):
                said = np.zeros(len(encoding.ids), np.bool_)
                for begin, end in spans:
                    said[_token_from(encoding, begin) : int(encoding.char_to_token(end - 1) or 0) + 1] = True
                encoded.append(EncodedChat(np.array(encoding.ids, np.int32), said))
        return encoded

    def prompt(self, chat: Sequence[Json]) -> list[int]:
        """Tokens of a chat whose answer is to follow, as a server makes them. Raises `InputError`."""
        from jinja2 import TemplateError

        try:
            text = self.text(chat, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError) as error:
            raise InputError(f"A prompt does not fit the base model's chat template: {error}") from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def check_against(self, tokenizer: Any, chat: Sequence[Json]) -> None:
        """Raise `IntegrityError` unless a transformers tokenizer makes the same tokens of a chat."""
        theirs = tokenizer.apply_chat_template(list(chat), tokenize=True, return_dict=False, strftime_now=DAY.strftime)
        ours = self.encode([chat])[0].tokens.tolist()
        if list(theirs) != ours:
            raise IntegrityError(
                "The base model's tokenizer.json makes other tokens than transformers does for this model.",
                hint="Export the base model again with save_pretrained, so that tokenizer.json is complete.",
            )

    def _content(self, chat: Sequence[Json], number: int, whole: str) -> tuple[int, int]:
        """Where the content of a message stands: what changes in the text when another content takes its place."""
        content = str(chat[number]["content"])
        mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in content)
        replaced = [*chat[:number], {**chat[number], "content": mark}, *chat[number + 1 :]]
        before, found, after = self.text(replaced).partition(mark)
        if not found:
            raise ValueError(f"it leaves out message {number + 1}.")
        begin = _shared_start(before, whole)
        return begin, max(begin, len(whole) - _shared_start(after[::-1], whole[::-1]))

    def _begin(self, before: Sequence[Json], whole: str, content: int) -> int:
        """Where the generation prompt after the messages before ends, or else where the turn's content begins."""
        from jinja2 import TemplateError

        ends = []
        for mode in self._prompt_modes:
            try:
                prompt = self.text(before, add_generation_prompt=True, **mode)
            except TemplateError:
                continue  # Some templates refuse a chat without a question; then the content says where to begin.
            if whole.startswith(prompt) and len(prompt) <= content:
                ends.append(len(prompt))
        return max(ends, default=content)

    def _end(self, whole: str, content: int) -> int:
        """Where the special token after a turn's content ends."""
        after = whole[content:].lstrip()
        ending = max((token for token in self._special if after.startswith(token)), key=len, default="")
        if not ending:
            raise ValueError("no special token ends the assistant's turn, so the model would not learn to stop.")
        return len(whole) - len(after) + len(ending)


def _shared_start(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    if other.startswith(one):
        return len(one)
    return next((at for at, (mine, yours) in enumerate(zip(one, other, strict=False)) if mine != yours), len(other))


def _token_from(encoding: Any, character: int) -> int:
    """The first token that begins at this character or after it. One that begins before also holds the end of the
    header, and the model, which is given the header, could never say it."""
    token: int | None = None
    at = character
    while token is None:
        token = encoding.char_to_token(at)
        at += 1
    begin: int = encoding.token_to_chars(token)[0]
    return token + (begin < character)


def _template_text(base_dir: Path, config: dict[str, Any]) -> str:
    path = base_dir / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {one["name"]: one["template"] for one in template}.get("default")
    if not template:
        raise InputError(f"The base model {base_dir} holds no chat_template.jinja.")
    return str(template)


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _to_json(value: Json, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
