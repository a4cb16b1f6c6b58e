"""Parameter counts are exact: those of published models, and of what transformers builds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.infra.errors import InputError
from sluice.training.base_model import build_tiny_llama
from sluice.training.model_shape import KNOWN, ModelShape, read_shape, shape_of
from sluice.training.recipe_sections import Module
from sluice.training.safetensors_file import read_header

QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14_336,
    "vocab_size": 32_768,
}


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        # As published with each model (the total of its safetensors files on Hugging Face).
        (KNOWN["llama-3.1-8b"], 8_030_261_248),
        (KNOWN["llama-3.1-70b"], 70_553_706_496),
        (KNOWN["smollm2-135m"], 134_515_008),
        (shape_of(QWEN2, "Qwen2.5-0.5B"), 494_032_768),
        (shape_of(QWEN3, "Qwen3-0.6B"), 596_049_920),
        (shape_of(MISTRAL, "Mistral-7B-v0.3"), 7_248_023_552),
    ],
    ids=lambda one: one.name if isinstance(one, ModelShape) else "",
)
def test_parameters_of_published_models(shape: ModelShape, parameters: int) -> None:
    assert shape.parameters == parameters


def test_a_model_folder_is_counted_as_its_file_holds(tmp_path: Path) -> None:
    made = build_tiny_llama(tmp_path / "tiny")
    shape = read_shape(made.folder)
    assert shape.parameters == made.metadata["parameters"]
    header = read_header(made.folder / "model.safetensors")
    assert len(header) == shape.layers * 9 + 2
    assert read_shape(made.folder / "config.json") == shape


@given(rank=st.integers(1, 256), modules=st.sets(st.sampled_from(get_args(Module)), min_size=1), dora=st.booleans())
def test_low_rank_pairs_are_counted_one_by_one(rank: int, modules: set[str], dora: bool) -> None:
    shape = KNOWN["llama-3.1-8b"]
    one_by_one = 0
    for _ in range(shape.layers):
        for module in modules:
            inputs, outputs = shape.projections()[module]
            one_by_one += rank * inputs + outputs * rank + (outputs if dora else 0)
    assert shape.lora_parameters(rank, modules, dora=dora) == one_by_one


def test_arithmetic_equals_what_nvidia_publishes_with() -> None:
    # AutoModel's LoRA of Llama-3.1-8B: 12,473 tokens/s and 402 TFLOP/s on one H100 at 4,096 tokens. Without gradients
    # of the frozen weights a token costs two forward passes.
    flops = 2 * KNOWN["llama-3.1-8b"].forward_flops(4096) * 12_473
    assert flops / 1e12 == pytest.approx(402, rel=0.01)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral'"),
        ({"hidden_size": "wide"}, "lacks a size"),
        ({"vocab_size": None}, "lacks a size"),
    ],
)
def test_what_is_not_covered_is_said(change: dict[str, Any], part: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3 | change))
    with pytest.raises(InputError, match=part):
        read_shape(tmp_path)


def test_a_folder_without_a_config_is_refused_with_the_names_there_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json") as caught:
        read_shape(tmp_path)
    assert "llama-3.1-8b" in caught.value.hint
