"""Llamas of any size with random weights, written as Hugging Face folders without a download: weights decide no speed.

Tokenizer and chat template are those of the product's tiny model; a larger vocabulary leaves its upper ids unused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sluice.training.base_model import LlamaShape, build_tiny_llama
from sluice.training.full_model import INDEX, SINGLE
from sluice.training.safetensors_file import Bytes, RawTensor, write_raw

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
SPREAD = 0.02
"""Standard deviation of the weights: llama's own initializer_range."""
BLOCK = 1 << 24
"""Values drawn once and repeated: drawing eight billion takes minutes."""
SHARD_BYTES = 2 * 2**30

LLAMA_8B = LlamaShape(
    hidden=4096,
    layers=32,
    heads=32,
    key_value_heads=8,
    intermediate=14336,
    vocabulary=128256,
    context=8192,
    rope_base=500_000.0,
    norm_epsilon=1e-5,
)
"""Llama 3.1 8B: 8,030,261,248 parameters with its own output head."""


def tensor_shapes(shape: LlamaShape, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights by name; an output head of its own unless it is tied to the embedding."""
    head: dict[str, tuple[int, ...]] = {} if tied else {"lm_head.weight": (shape.vocabulary, shape.hidden)}
    return shape.tensors() | head


def count_parameters(shape: LlamaShape, *, tied: bool) -> int:
    return sum(int(np.prod(size)) for size in tensor_shapes(shape, tied=tied).values())


def build_random_llama(folder: Path, shape: LlamaShape, *, tied: bool = True, dtype: str = "F32") -> Path:
    """Write the model (`dtype` F32 or BF16) and return its folder. Holds one file of 2 GiB in memory at a time."""
    tiny = build_tiny_llama(folder / "tiny").folder
    for name in TOKENIZER_FILES:
        shutil.move(tiny / name, folder / name)
    config = json.loads((tiny / "config.json").read_text()) | {
        "dtype": {"F32": "float32", "BF16": "bfloat16"}[dtype],
        "head_dim": shape.head_width,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.context,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.key_value_heads,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_parameters": {"rope_theta": shape.rope_base, "rope_type": "default"},
        "tie_word_embeddings": tied,
        "vocab_size": shape.vocabulary,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shutil.rmtree(tiny)
    groups = list(_groups(tensor_shapes(shape, tied=tied), 4 if dtype == "F32" else 2))
    places: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        write_raw(folder / file, {name: random_tensor(size, dtype, number) for name, size in names.items()})
        places |= dict.fromkeys(names, file)
    if len(groups) > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def random_tensor(size: tuple[int, ...], dtype: str, seed: int) -> RawTensor:
    """Norm weights (one axis) are ones, the others normal with `SPREAD`."""
    count = int(np.prod(size))
    drawn = np.random.Generator(np.random.PCG64([seed, count])).standard_normal(min(count, BLOCK), dtype=np.float32)
    values = np.ones(count, dtype=np.float32) if len(size) == 1 else np.resize(drawn * np.float32(SPREAD), count)
    data: Bytes = values.view(np.uint8)
    if dtype == "BF16":
        # The upper half of a float32: rounding does not matter here.
        data = (values.view("<u4") >> 16).astype("<u2").view(np.uint8)
    return RawTensor(dtype, size, data)


def _groups(shapes: dict[str, tuple[int, ...]], width: int) -> Iterator[dict[str, tuple[int, ...]]]:
    group: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, one in shapes.items():
        if group and size + width * int(np.prod(one)) > SHARD_BYTES:
            yield group
            group, size = {}, 0
        group[name] = one
        size += width * int(np.prod(one))
    yield group
