"""What the loss sees: token by token, with the class and settings that a recipe hands to AutoModel."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from sluice.training.automodel import CHAT_DATASET, chat_dataset
from sluice.training.base_model import build_tiny_llama
from sluice.training.recipe import load_recipe

pytestmark = pytest.mark.integration

SYSTEM = "You answer questions about building in Sweden, using the context."
USER = "Context:\n- Use 45 x 145 mm studs.\n- Treat the wood.\n\nQuestion: Which studs?"
ANSWER = "Use 45 x 145 mm studs."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("base")).folder


@pytest.fixture(scope="module")
def sample(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[int]], Any]:
    from nemo_automodel._transformers.auto_tokenizer import NeMoAutoTokenizer

    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    roles = (("system", SYSTEM), ("user", USER), ("assistant", ANSWER))
    path.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in roles]}) + "\n")
    settings = dict(chat_dataset(load_recipe("demo"), path))
    module, _, name = settings.pop("_target_").rpartition(".")
    assert f"{module}.{name}" == CHAT_DATASET
    tokenizer = NeMoAutoTokenizer.from_pretrained(str(base))
    return getattr(importlib.import_module(module), name)(tokenizer=tokenizer, **settings)[0], tokenizer


def test_loss_is_on_the_answer_and_the_token_that_ends_the_turn(sample: tuple[dict[str, list[int]], Any]) -> None:
    from tokenizers import Tokenizer

    row, tokenizer = sample
    plain: Tokenizer = tokenizer.backend_tokenizer
    prompt = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{USER}<|im_end|>\n<|im_start|>assistant\n"
    prompt_ids = plain.encode(prompt).ids
    answer_ids = plain.encode(f"{ANSWER}<|im_end|>\n").ids
    # Labels are shifted: the label at a position is the token that follows it.
    tokens = prompt_ids + answer_ids
    expected = [-100] * (len(prompt_ids) - 1) + answer_ids
    assert row["input_ids"] == tokens[: len(row["input_ids"])]
    labels = row["labels"]
    assert labels[: len(expected)] == expected
    assert set(labels[len(expected) :]) <= {-100}
    # pad = eos = <|im_end|> = 2 in this model: masking by token value would hide the end of the turn.
    end = int(plain.token_to_id("<|im_end|>") or 0)
    assert (end, tokenizer.pad_token_id, tokenizer.eos_token_id) == (2, 2, 2)
    assert labels.count(end) == 1
    assert labels.index(end) == len(prompt_ids) - 1 + len(answer_ids) - 2


def test_padding_hides_no_end_of_turn(sample: tuple[dict[str, list[int]], Any]) -> None:
    from nemo_automodel.components.datasets.utils import default_collater

    row, _ = sample
    fields = ("input_ids", "labels", "attention_mask")
    batch = default_collater([{key: row[key] for key in fields}, {key: row[key] * 2 for key in fields}])
    labels = batch["labels"][0].tolist()
    assert labels[: len(row["labels"])] == row["labels"]
    assert set(labels[len(row["labels"]) :]) == {-100}
    assert batch["attention_mask"][0].sum().item() == sum(row["attention_mask"])


def test_answer_columns_give_the_loss_and_gradients_of_the_whole() -> None:
    import torch

    from sluice.training.answer_columns import keep_answer_columns

    torch.manual_seed(0)
    labels = torch.full((2, 7), -100)
    labels[0, 3:5] = torch.tensor([4, 2])
    labels[1, 4:6] = torch.tensor([1, 2])
    hidden = torch.randn(2, 7, 5, requires_grad=True)
    head = torch.nn.Linear(5, 9, bias=False)
    kept = keep_answer_columns({"labels": labels, "input_ids": labels})
    assert kept["logits_to_keep"].tolist() == [3, 4, 5]
    results = []
    for states, wanted in ((hidden, labels), (hidden[:, kept["logits_to_keep"]], kept["labels"])):
        scores = head(states)
        loss = torch.nn.functional.cross_entropy(scores.reshape(-1, 9), wanted.reshape(-1), reduction="sum")
        results.append((loss, torch.autograd.grad(loss, hidden, retain_graph=True)[0]))
    assert results[0][0].item() == pytest.approx(results[1][0].item(), rel=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1])
    empty = keep_answer_columns({"labels": torch.full((2, 7), -100)})
    assert (empty["labels"].shape, empty["logits_to_keep"].tolist()) == ((2, 1), [0])
