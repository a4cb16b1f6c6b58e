"""Examples as the model will see them, and what `train` refuses before it starts any process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sluice.infra.errors import InputError
from sluice.training.base_model import build_tiny_llama
from sluice.training.examples import read_split
from sluice.training.recipe import load_recipe
from sluice.training.train import train


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("base")).folder


def example(answer: str) -> str:
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": answer}]
    return json.dumps({"id": "x", "trace_id": "t", "weight": 1.0, "messages": messages}) + "\n"


def test_too_long_examples_are_left_out_and_counted(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(example("short") + "\n" + example("word " * 200) + example("also short"))
    split = read_split(path, base, max_length=100)
    assert [messages[-1]["content"] for messages in split.messages] == ["short", "also short"]
    assert (split.too_long, all(length <= 100 for length in split.lengths)) == (1, True)
    split.write(tmp_path / "out.jsonl")
    assert [sorted(json.loads(line)) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        ["messages"]
    ] * 2
    assert len(read_split(path, base, max_length=100, limit=1).messages) == 1


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"messages": []}', '{"messages": [{"role": "user", "content": "Why?"}]}', example(" ")]
)
def test_a_line_that_is_no_answered_chat_is_named(base: Path, tmp_path: Path, line: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(example("fine") + line + "\n")
    with pytest.raises(InputError, match=r"train\.jsonl line 2"):
        read_split(path, base, max_length=100)


def test_train_refuses_a_dataset_that_cannot_fill_one_step(base: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(example("a") + example("word " * 500) * 9)
    with pytest.raises(InputError) as caught:
        train(base, tmp_path, load_recipe("tiny"), tmp_path / "work")
    assert "1 usable examples; 4 are needed. 9 are longer than data.max_length = 320" in caught.value.message
    with pytest.raises(InputError, match=r"holds no train\.jsonl"):
        train(base, tmp_path / "absent", load_recipe("tiny"), tmp_path / "work")
