"""The sizes of a base model from its config.json: parameters, projections, arithmetic of one token.

Covers the dense decoders whose layers are attention with q, k, v, o and a gated MLP: llama, mistral, qwen2, qwen3 and
smollm3. Parameter counts are exact: those of published models (tests/training/test_model_shape.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sluice.infra.errors import InputError

# Whether the family has biases on q, k and v whatever its config says, and norms of query and key per head.
_FAMILIES = {
    "llama": (False, False),
    "mistral": (False, False),
    "smollm3": (False, False),
    "qwen2": (True, False),
    "qwen3": (False, True),
}


@dataclass(frozen=True)
class ModelShape:
    """Widths in units, `context` in tokens. `attention_bias`: on q, k, v; `output_bias`: on o."""

    name: str
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_width: int
    intermediate: int
    vocabulary: int
    context: int
    tied: bool
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False

    @property
    def query_width(self) -> int:
        return self.heads * self.head_width

    @property
    def key_value_width(self) -> int:
        return self.key_value_heads * self.head_width

    def projections(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each matrix of one layer."""
        hidden, query, key_value = self.hidden, self.query_width, self.key_value_width
        return {
            "q_proj": (hidden, query),
            "k_proj": (hidden, key_value),
            "v_proj": (hidden, key_value),
            "o_proj": (query, hidden),
            "gate_proj": (hidden, self.intermediate),
            "up_proj": (hidden, self.intermediate),
            "down_proj": (self.intermediate, hidden),
        }

    @property
    def layer_matrices(self) -> int:
        """Parameters of the seven matrices of one layer."""
        return sum(inputs * outputs for inputs, outputs in self.projections().values())

    @property
    def layer_parameters(self) -> int:
        """Those, the norms and the biases."""
        biases = self.attention_bias * (self.query_width + 2 * self.key_value_width) + self.output_bias * self.hidden
        biases += self.mlp_bias * (2 * self.intermediate + self.hidden)
        norms = 2 * self.hidden + self.query_key_norm * 2 * self.head_width
        return self.layer_matrices + biases + norms

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the output projection where it is a matrix of its own."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All of the model."""
        return self.layers * self.layer_parameters + self.hidden + self.embedding * (1 if self.tied else 2)

    def lora_parameters(self, rank: int, modules: Iterable[str], *, dora: bool = False) -> int:
        """Of the low-rank pairs in all layers: rank x (inputs + outputs) each, and DoRA's magnitude of each output."""
        sizes = [self.projections()[module] for module in modules]
        pairs = sum(rank * (inputs + outputs) for inputs, outputs in sizes)
        return self.layers * (pairs + (sum(outputs for _, outputs in sizes) if dora else 0))

    def forward_flops(self, attended: float) -> float:
        """Floating-point operations of one token forward, `attended` tokens long its example: 2 for each weight of a
        matrix product, and 2 x attended x query width a layer for causal attention (half of a full square).

        Source: Chowdhery et al. 2022 (PaLM), appendix B, causal; the same count as AutoModel's own
        (components/utils/flops_utils.py, llama3_flops), a third of it: forward without backward.
        """
        return 2 * (self.layers * self.layer_matrices + self.embedding) + 2 * self.layers * attended * self.query_width


def read_shape(source: Path) -> ModelShape:
    """From a model folder or a config.json. Raises `InputError` when it is none, or of a kind that is not covered."""
    file = source / "config.json" if source.is_dir() else source
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"The base {str(source)!r} holds no readable config.json: {error}.",
            hint=f"Give a model's folder or its config.json, or one of: {', '.join(KNOWN)}.",
        ) from error
    name = file.parent.name if file.name == "config.json" else file.stem
    return shape_of(config if isinstance(config, dict) else {}, name)


def shape_of(config: Mapping[str, Any], name: str) -> ModelShape:
    """From the values of a config.json. Raises `InputError` naming the key that is missing or not covered."""
    kind = config.get("model_type")
    if kind not in _FAMILIES:
        raise InputError(
            f"The base {name!r} has model_type {kind!r}; memory and time can be estimated for {', '.join(_FAMILIES)}.",
            hint="Training itself may well know it: this is about `sluice recipe check` alone.",
        )
    always_biased, query_key_norm = _FAMILIES[kind]
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        biased = bool(config.get("attention_bias", False))
        return ModelShape(
            name=name,
            hidden=hidden,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_width=int(config.get("head_dim") or hidden // heads),
            intermediate=int(config["intermediate_size"]),
            vocabulary=int(config["vocab_size"]),
            context=int(config.get("max_position_embeddings", 0)),
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_bias=always_biased or biased,
            output_bias=biased and not always_biased,
            mlp_bias=bool(config.get("mlp_bias", False)),
            query_key_norm=query_key_norm,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"The config.json of {name!r} lacks a size that was expected: {error}.") from error


def _llama_3_1(name: str, hidden: int, layers: int, heads: int, intermediate: int) -> ModelShape:
    return ModelShape(name, hidden, layers, heads, 8, 128, intermediate, 128_256, 131_072, tied=False)


KNOWN: Mapping[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape("smollm2-135m", 576, 30, 9, 3, 64, 1536, 49_152, 8192, tied=True),
        _llama_3_1("llama-3.1-8b", 4096, 32, 32, 14_336),
        _llama_3_1("llama-3.1-70b", 8192, 80, 64, 28_672),
    )
}
"""Shapes of published models, to check a recipe without having the model. From their config.json on Hugging Face."""
