"""A Llama of two layers with random weights, and LoRA adapters for it: files only, made in a second, no download."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HIDDEN, HEADS, KV_HEADS, HEAD, INNER, LAYERS, VOCABULARY = 128, 4, 2, 32, 256, 2, 256 + 3
RANK = 4
PRINTABLE = ord("~") - ord("!") + 1
"""Letters of ASCII that come first in the sorted alphabet of bytes."""


def write_tiny_llama(folder: Path) -> None:
    """A base model's folder with a byte-level tokenizer of its own."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        return generator.normal(0, 0.08, (rows, columns)).astype(np.float32)

    head = matrix(VOCABULARY, HIDDEN)
    head[PRINTABLE:] = 0  # only printable letters are ever the most likely: every greedy answer is a text
    tensors = {"model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN) * 4, "model.norm.weight": _ones()}
    tensors["lm_head.weight"] = head
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        for part, (rows, columns) in _shapes().items():
            tensors[f"{name}{part}.weight"] = matrix(rows, columns)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}{norm}.weight"] = _ones()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512, "tie_word_embeddings": False, "bos_token_id": 256, "eos_token_id": 257,
        "pad_token_id": 257, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(folder)


def write_adapter(folder: Path, *, scale: float, seed: int, hidden: int = HIDDEN) -> None:
    """A LoRA adapter in PEFT's layout; with `scale` 0 it changes nothing, with another `hidden` it fits no base."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for part, (rows, columns) in _shapes(hidden).items():
            name = f"base_model.model.model.layers.{layer}.{part}"
            tensors[f"{name}.lora_A.weight"] = generator.normal(0, 0.3, (RANK, columns)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = (scale * generator.normal(0, 0.3, (rows, RANK))).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "bias": "none",
        "base_model_name_or_path": "tiny", "target_modules": sorted(part.rpartition(".")[2] for part in _shapes()),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _shapes(hidden: int = HIDDEN) -> dict[str, tuple[int, int]]:
    return {
        "self_attn.q_proj": (HEADS * HEAD, hidden), "self_attn.k_proj": (KV_HEADS * HEAD, hidden),
        "self_attn.v_proj": (KV_HEADS * HEAD, hidden), "self_attn.o_proj": (hidden, HEADS * HEAD),
        "mlp.gate_proj": (INNER, hidden), "mlp.up_proj": (INNER, hidden), "mlp.down_proj": (hidden, INNER),
    }  # fmt: skip


def _ones() -> NDArray[np.float32]:
    return np.ones(HIDDEN, dtype=np.float32)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>", "<role>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<role>{{ m['content'] }}{% endfor %}<s>"
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>",
        "chat_template": template, "model_max_length": 512,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
