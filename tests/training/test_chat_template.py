"""Which tokens carry the loss, token by token."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json
from sluice.training.base_model import build_tiny_llama
from sluice.training.chat_template import ChatTemplate

DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
HEADER = "<|im_start|>assistant\n"
END = 2  # <|im_end|>, which is also the model's eos and pad token


def chat(*contents: str, system: str | None = None) -> list[Json]:
    """Questions and answers in turn."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("base")).folder


@pytest.fixture(scope="module")
def template(base: Path) -> ChatTemplate:
    return ChatTemplate(base)


def with_template(base: Path, folder: Path, text: str) -> ChatTemplate:
    """The tiny model's tokenizer with another chat template."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder / name)
    (folder / "chat_template.jinja").write_text(text)
    return ChatTemplate(folder)


def runs(template: ChatTemplate, messages: list[Json]) -> list[list[int]]:
    """The tokens that carry the loss, one list for each unbroken stretch."""
    encoded = template.encode([messages])[0]
    found: list[list[int]] = []
    before = False
    for token, said in zip(encoded.tokens.tolist(), encoded.said.tolist(), strict=True):
        if said and not before:
            found.append([])
        if said:
            found[-1].append(token)
        before = said
    return found


@functools.cache
def plain_tokenizer(base: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(base / "tokenizer.json"))


def ids(base: Path, text: str) -> list[int]:
    return list(plain_tokenizer(base).encode(text).ids)


@pytest.mark.parametrize("system", [None, "You answer questions about building in Sweden, using the context."])
def test_the_mask_of_one_turn_token_by_token(base: Path, template: ChatTemplate, system: str | None) -> None:
    question, answer = "Context:\n- Use 45 x 145 mm studs.\n\nQuestion: Which studs?", "Use 45 x 145 mm studs."
    encoded = template.encode([chat(question, answer, system=system)])[0]
    prompt = (
        f"<|im_start|>system\n{system or DEFAULT_SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n{HEADER}"
    )
    before, said, after = ids(base, prompt), [*ids(base, answer), END], ids(base, "\n")
    assert encoded.tokens.tolist() == before + said + after
    assert encoded.said.tolist() == [False] * len(before) + [True] * len(said) + [False] * len(after)


def test_the_mask_of_several_turns_token_by_token(base: Path, template: ChatTemplate) -> None:
    encoded = template.encode([chat("Why?", "Because.", "Sure?", "Né 🎉 yes", system="Be kind.")])[0]
    pieces = [
        ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n" + HEADER, False),
        ("Because.<|im_end|>", True),
        ("\n<|im_start|>user\nSure?<|im_end|>\n" + HEADER, False),
        ("Né 🎉 yes<|im_end|>", True),
        ("\n", False),
    ]
    expected = [(token, said) for text, said in pieces for token in ids(base, text)]
    assert list(zip(encoded.tokens.tolist(), encoded.said.tolist(), strict=True)) == expected


@pytest.mark.parametrize("question", ["Why?", f"What is {HEADER}Because.<|im_end|>?", "<|im_end|>"])
@pytest.mark.parametrize("answer", ["Because.", f"Write {HEADER}Because.<|im_end|>\n{HEADER}", "<|im_end|>", " so "])
def test_the_templates_own_text_in_a_question_or_answer_moves_nothing(
    base: Path, template: ChatTemplate, question: str, answer: str
) -> None:
    assert runs(template, chat(question, answer)) == [[*ids(base, answer), END]]
    assert runs(template, chat("a", answer, question, "Sure.")) == [
        [*ids(base, answer), END],
        ids(base, "Sure.<|im_end|>"),
    ]


def test_a_token_of_header_and_answer_together_carries_no_loss(base: Path, template: ChatTemplate) -> None:
    encoded = template.encode([chat("Why?", "\n\nBecause.")])[0]
    assert encoded.tokens.tolist() == ids(base, template.text(chat("Why?", "\n\nBecause.")))
    (said,) = runs(template, chat("Why?", "\n\nBecause."))
    # "\n" of the header and the answer's first "\n" are one token; what is left of the answer is learned.
    header = ids(base, HEADER)
    assert said == ids(base, f"{HEADER}\n\nBecause.<|im_end|>")[len(header) :]
    assert said[-1] == END


def test_an_empty_answer_in_between_is_its_end(base: Path, template: ChatTemplate) -> None:
    assert runs(template, chat("Why?", "", "And?", "So.")) == [[END], ids(base, "So.<|im_end|>")]


MARKED = """{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
SPACED = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}
{{- '[INST] ' + message['content'] | trim + ' [/INST]' }}{% elif message['role'] == 'assistant' %}
{{- ' ' + message['content'] | trim + eos_token }}{% else %}{{ raise_exception('Only user and assistant roles') }}
{%- endif %}{% endfor %}"""
DATED = "{{ '<|im_start|>system\\nToday: ' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}" + MARKED
THINKING = """{%- set last = messages | length - 1 %}{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{%- set parts = message['content'].split('</think>') %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 == last %}{{- '<think>\\n' + (parts[0].split('<think>')[-1] | trim if parts | length > 1 else '') }}
{{- '\\n</think>\\n\\n' }}{%- endif %}
{{- parts[-1] | trim + '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""


@pytest.mark.parametrize("text", [MARKED, SPACED, DATED, THINKING])
def test_other_templates(base: Path, tmp_path: Path, text: str) -> None:
    other = with_template(base, tmp_path, text)
    whole, spans = other.spans(chat("Why?", "Because.", "Sure?", "Yes."))
    end = "<|im_end|>"
    said = [whole[begin:stop] for begin, stop in spans]
    # Mistral's header ends before the blank, so the model has to say " Because" by itself.
    assert said == ([f" Because.{end}", f" Yes.{end}"] if text == SPACED else [f"Because.{end}", f"Yes.{end}"])
    if text == DATED:
        assert whole.startswith("<|im_start|>system\nToday: 26 Jul 2024<|im_end|>")


def test_thoughts_are_said_and_an_empty_block_of_them_is_not(base: Path, tmp_path: Path) -> None:
    thinking = with_template(base, tmp_path, THINKING)
    whole, spans = thinking.spans(chat("Why?", "<think>Early.</think>Because.", "Sure?", "<think>Hm.</think>Yes."))
    assert [whole[begin:end] for begin, end in spans] == [
        "Because.<|im_end|>",
        "<think>\nHm.\n</think>\n\nYes.<|im_end|>",
    ]
    whole, spans = thinking.spans(chat("Why?", "Yes."))
    assert whole[: spans[0][0]].endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("text", "messages", "says"),
    [
        (SPACED, chat("a", "b", system="s"), "Only user and assistant roles"),
        ("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}", chat("a", "b"), "would not learn to stop"),
        ("{{ messages[0]['content'] }}", chat("a", "b"), "leaves out message 2"),
        ("{{ messages[0]['content'] + nothing['x'] }}", chat("a", "b"), "'nothing' is undefined"),
    ],
)
def test_a_chat_that_the_template_cannot_hold_is_named(
    base: Path, tmp_path: Path, text: str, messages: list[Json], says: str
) -> None:
    with pytest.raises(InputError) as caught:
        with_template(base, tmp_path, text).encode([messages], "train.jsonl")
    assert caught.value.message.startswith("Chat 1 of train.jsonl does not fit the base model's chat template: ")
    assert says in caught.value.message


def test_a_folder_without_template_or_tokenizer_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no tokenizer\.json"):
        ChatTemplate(tmp_path)
    shutil.copy(base / "tokenizer.json", tmp_path)
    with pytest.raises(InputError, match=r"holds no chat_template\.jinja"):
        ChatTemplate(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": MARKED, "eos_token": "<|im_end|>"}))
    assert runs(ChatTemplate(tmp_path), chat("Why?", "So.")) == [ids(base, "So.<|im_end|>")]
