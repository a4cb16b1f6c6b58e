"""Peak memory of one process of a training, part by part, from shapes alone.

The parts are added up as if all peaks fell together, so the sum errs on the high side. What shards what: FSDP2 cuts
weights, gradients and optimizer over dp x cp, tensor parallelism cuts matrices, pipeline parallelism cuts layers,
context parallelism cuts rows. Bytes: 4 for float32, 2 for bfloat16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sluice.training.model_shape import ModelShape
from sluice.training.node_types import GIB, NodeType
from sluice.training.recipe import Recipe
from sluice.training.recipe_sections import Floating

USABLE = 0.94
"""Share of the memory that can be planned with: the allocator's blocks do not fill the rest (assumption)."""
_LOSS_CHUNK = 512
# AutoModel's default for FSDP2 (components/distributed/config.py:352): a layer in use and two gathered ahead of it.
_LAYERS_GATHERED = 3
# 4 bits, and 8-bit scales of 64 weights with 32-bit scales of 256 of those: 0.127 bits (Dettmers et al. 2023, QLoRA).
_NF4_BYTES = (4 + 0.127) / 8


@dataclass(frozen=True)
class MemoryPart:
    """One line of the table: bytes of one process, and how they come about."""

    name: str
    bytes: float
    formula: str


def bytes_of(kind: Floating) -> int:
    return 4 if kind == "float32" else 2


def trainable_parameters(recipe: Recipe, shape: ModelShape) -> int:
    """All of the model for `full`, the low-rank pairs for the others."""
    if recipe.method == "full":
        return shape.parameters
    return shape.lora_parameters(recipe.lora.rank, recipe.lora.target_modules, dora=recipe.method == "dora")


def memory_parts(recipe: Recipe, shape: ModelShape, node: NodeType) -> tuple[MemoryPart, ...]:
    """Of the fullest process: the first pipeline stage, or the last one's loss where that is more."""
    parallelism, precision, method = recipe.parallelism, recipe.precision, recipe.method
    shards = parallelism.dp * parallelism.cp
    held = bytes_of(precision.parameters)
    computed = bytes_of(precision.compute)
    layers = math.ceil(shape.layers / parallelism.pp)
    ends = _embeddings_of_a_stage(recipe, shape)
    stage = layers * shape.layer_parameters + ends
    cut = f" / ({shards} shards{f' x tp {parallelism.tp}' if parallelism.tp > 1 else ''})"
    trained = trainable_parameters(recipe, shape) / parallelism.pp

    weights = _weights(recipe, shape, layers, ends, cut)
    gradients = trained * held / shards
    gradient_formula = f"{_count(trained)} trained x {held} bytes / {shards} shards"
    micro_batches = recipe.schedule.global_batch_size // (recipe.schedule.micro_batch_size * parallelism.dp)
    if method != "full" and micro_batches > 1 and shards > 1:
        gradients += trained * bytes_of(precision.reduce)
        gradient_formula += ", and whole until the last micro-batch"
    parts = [
        weights,
        MemoryPart("gradients", gradients, gradient_formula),
        MemoryPart("optimizer", 2 * trained * held / shards, f"AdamW: 2 x {_count(trained)} x {held} bytes / {shards}"),
        _gathered(recipe, shape, stage, ends, shards, computed),
        _activations(recipe, shape, layers, computed),
        _loss(recipe, shape, computed),
    ]
    if node.accelerators:
        parts.append(MemoryPart("context", 2.0 * GIB, "CUDA context, kernels and NCCL's buffers (assumption)"))
    else:
        parts.append(MemoryPart("program", 0.7 * GIB, "Python, torch and AutoModel (measured)"))
    return tuple(parts)


def _embeddings_of_a_stage(recipe: Recipe, shape: ModelShape) -> int:
    """Parameters beside the layers of the fullest stage."""
    if recipe.parallelism.pp == 1:
        return shape.parameters - shape.layers * shape.layer_parameters
    return shape.embedding + shape.hidden


def _weights(recipe: Recipe, shape: ModelShape, layers: int, ends: int, cut: str) -> MemoryPart:
    parallelism, precision = recipe.parallelism, recipe.precision
    divisor = parallelism.dp * parallelism.cp * parallelism.tp
    stage = layers * shape.layer_parameters + ends
    if recipe.method == "full":
        each = bytes_of(precision.parameters)
        return MemoryPart("weights", stage * each / divisor, f"{_count(stage)} x {each} bytes{cut}")
    pairs = trainable_parameters(recipe, shape) / parallelism.pp * bytes_of(precision.parameters) / divisor
    # AutoModel stores frozen weights in the compute type (prepare_frozen_parameters_for_sharding).
    each = bytes_of(precision.compute)
    if recipe.method == "qlora":
        matrices = layers * shape.layer_matrices
        size = matrices * _NF4_BYTES + (stage - matrices) * each
        formula = f"{_count(matrices)} x 4.127 bits + {_count(stage - matrices)} x {each} bytes{cut}, and the pairs"
        return MemoryPart("weights", size / divisor + pairs, formula)
    return MemoryPart("weights", stage * each / divisor + pairs, f"{_count(stage)} x {each} bytes{cut}, and the pairs")


def _gathered(recipe: Recipe, shape: ModelShape, stage: int, ends: int, shards: int, computed: int) -> MemoryPart:
    """Whole weights that FSDP2 puts together for use, and one layer's gradient before it is summed and cut."""
    if shards == 1:
        return MemoryPart("gathered weights", 0.0, "nothing is sharded")
    tp = recipe.parallelism.tp
    whole = stage
    words = "all of the stage stays gathered (reshard_after_forward false)"
    if recipe.parallelism.reshard_after_forward:
        whole = min(stage, _LAYERS_GATHERED * shape.layer_parameters + ends)
        words = f"{_LAYERS_GATHERED} layers and embeddings"
    size: float = whole * (_NF4_BYTES if recipe.method == "qlora" else computed) / tp
    if recipe.method == "full":
        size += (shape.layer_parameters + ends) * (computed + bytes_of(recipe.precision.reduce)) / tp
        words += ", and a layer's gradient"
    return MemoryPart("gathered weights", size, f"{words}: {_count(whole)} x {computed} bytes")


def activation_elements(recipe: Recipe, shape: ModelShape) -> float:
    """Numbers that one layer keeps of one token for its backward pass, with an attention that keeps no square.

    After Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4, for
    layers with RMSNorm and a gated MLP: input of both norms (2h), query, key, value and the attention's output, gate,
    up and its activation (3i). A matrix product keeps its input only to make a gradient of its weight: frozen ones
    without a low-rank pair keep none, so the normed inputs (2h) and the MLP's product (i) count only where something is
    trained; norms that are trained keep their normalised input (2h). Equal to what torch keeps within 5%
    (tests/integration/test_training_memory.py).
    """
    hidden, query, key_value = shape.hidden, shape.query_width, shape.key_value_width
    modules = set(recipe.lora.target_modules) if recipe.method != "full" else set(shape.projections())
    kept = 3.0 * shape.intermediate + 2 * query + 2 * key_value
    kept += hidden * bool(modules & {"q_proj", "k_proj", "v_proj"}) + hidden * bool(modules & {"gate_proj", "up_proj"})
    kept += shape.intermediate * ("down_proj" in modules)
    whole = (4.0 if recipe.method == "full" else 2.0) * hidden
    # Tensor parallelism cuts heads and the MLP's width, not the layer's own width.
    return whole + kept / recipe.parallelism.tp


def _activations(recipe: Recipe, shape: ModelShape, layers: int, computed: int) -> MemoryPart:
    parallelism = recipe.parallelism
    rows = recipe.schedule.micro_batch_size
    tokens = rows * recipe.data.row_length / parallelism.cp
    elements = activation_elements(recipe, shape)
    micro = recipe.schedule.global_batch_size // (rows * parallelism.dp)
    in_flight = min(parallelism.pp, micro)
    about = f"{rows} rows x {recipe.data.row_length}{f' / cp {parallelism.cp}' if parallelism.cp > 1 else ''} tokens"
    flight = f" x {in_flight} micro-batches in flight" if in_flight > 1 else ""
    if parallelism.activation_checkpointing:
        # AutoModel wraps both norms, attention and MLP, each of which keeps its input.
        kept = tokens * layers * 4 * shape.hidden * in_flight * computed
        again = tokens * elements * computed
        return MemoryPart(
            "activations",
            kept + again,
            f"{about} x {layers} layers x 4 x {shape.hidden} x {computed} bytes{flight}, one layer computed again",
        )
    return MemoryPart(
        "activations",
        tokens * layers * elements * computed * in_flight,
        f"{about} x {layers} layers x {elements:,.0f} numbers x {computed} bytes{flight}",
    )


def _loss(recipe: Recipe, shape: ModelShape, computed: int) -> MemoryPart:
    """Scores over the vocabulary, their float32 copy, its log-softmax and the gradients, at every token: an upper
    bound, since only tokens of answers need them."""
    parallelism = recipe.parallelism
    tokens = recipe.schedule.micro_batch_size * recipe.data.row_length / parallelism.cp
    if parallelism.backend == "nccl" and parallelism.tp == parallelism.pp == 1:
        size = _LOSS_CHUNK * shape.vocabulary * 3 * 4 + 3 * tokens * shape.hidden * 4 + shape.embedding * computed
        words = f"{_LOSS_CHUNK} tokens at a time x {shape.vocabulary} scores x 12 bytes, and the projection gathered"
        return MemoryPart("loss", size, words)
    each = 12 if computed == 4 else 2 + 4 + 4 + 4 + 2
    cut = f" / tp {parallelism.tp}" if parallelism.tp > 1 else ""
    words = f"{tokens:,.0f} tokens x {shape.vocabulary} scores x {each} bytes{cut}, at most"
    return MemoryPart("loss", tokens * shape.vocabulary * each / parallelism.tp, words)


def _count(number: float) -> str:
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:,.0f}"
