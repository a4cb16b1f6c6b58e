"""The estimate's model of memory, held against what torch itself keeps for a small llama."""

from __future__ import annotations

from typing import Any

import pytest

from sluice.training.estimate_memory import activation_elements
from sluice.training.model_shape import ModelShape, shape_of
from sluice.training.recipe import Recipe, parse_recipe

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
ALL = "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"


def recipe(method: str, targets: str) -> Recipe:
    lora = f"lora: {{rank: 4, target_modules: {targets}}}\n" if method == "lora" else ""
    return parse_recipe(f"name: small\nmethod: {method}\n{lora}schedule: {{max_steps: 2}}\n", "small")


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return shape_of(CONFIG, "small")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_parameters_equal_those_of_transformers(family: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = CONFIG | {"model_type": family, "head_dim": 32, "tie_word_embeddings": family != "mistral"}
    values["pad_token_id"] = None
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape_of(config.to_dict(), family).parameters == sum(one.numel() for one in model.parameters())


@pytest.mark.parametrize(("method", "targets"), [("full", ""), ("lora", ALL), ("lora", "[q_proj, v_proj]")])
def test_activations_are_what_autograd_keeps(method: str, targets: str, shape: ModelShape) -> None:
    """Numbers kept by two layers, less those kept by one: what a layer costs, without embedding and loss."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    chosen = recipe(method, targets)
    rows, tokens = 2, 64

    def kept(layers: int) -> int:
        config = LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"} | {"num_hidden_layers": layers})
        config._attn_implementation = "sdpa"
        model: Any = LlamaForCausalLM(config)
        if method == "lora":
            modules = list(chosen.lora.target_modules)
            model = get_peft_model(model, LoraConfig(r=4, target_modules=modules, lora_dropout=0.0))
        own = {one.untyped_storage().data_ptr() for one in model.parameters()}
        seen: dict[int, int] = {}

        def pack(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = max(seen.get(storage.data_ptr(), 0), storage.nbytes() // 4)
            return tensor

        ids = torch.zeros(rows, tokens, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(input_ids=ids, labels=ids).loss
        assert loss.requires_grad
        return sum(seen.values())

    measured = (kept(3) - kept(2)) / (rows * tokens)
    assert measured == pytest.approx(activation_elements(chosen, shape), rel=0.05)
