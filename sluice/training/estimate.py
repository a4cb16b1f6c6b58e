"""What a recipe will need on a kind of machine, before anything starts: memory, time, cost, and whether it fits.

    found = estimate(load_recipe("llama-8b-lora-h100"), KNOWN["llama-3.1-8b"], find_node_type("p5.48xlarge"))
    found.verdict                       # one sentence; `found.fits` says the same

Pure arithmetic from shapes, published figures and assumptions; each part says its own. Time is right within a third or
so where its assumed utilisation holds, and memory errs on the high side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json
from sluice.training.dataset_facts import DatasetFacts
from sluice.training.estimate_memory import USABLE, MemoryPart, bytes_of, memory_parts, trainable_parameters
from sluice.training.model_shape import ModelShape
from sluice.training.node_types import GIB, NodeType
from sluice.training.recipe import Recipe

_WRITE_BYTES_PER_S = 1e9
_VALIDATION_ROWS = 64
_PACK_FILL = 0.95
_PADDING = 1.1


@dataclass(frozen=True)
class TimePart:
    """One line of the table: seconds of the whole run, and how they come about."""

    name: str
    seconds: float
    formula: str


@dataclass(frozen=True)
class Estimate:
    """Memory is of the fullest process, in bytes. `dollars` is None where the price is unknown, `epochs` where the
    dataset is. `problems` keep the recipe from running, `changes` would mend the memory, `notes` are worth knowing."""

    recipe: str
    node: NodeType
    nodes: int
    processes: int
    base: str
    parameters: int
    trainable: int
    memory: tuple[MemoryPart, ...]
    limit: float
    time: tuple[TimePart, ...]
    utilisation: str
    tokens_per_second: float
    dollars: float | None
    steps: int
    epochs: float | None
    problems: tuple[str, ...]
    changes: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def needed(self) -> float:
        return sum(part.bytes for part in self.memory)

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.time)

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def verdict(self) -> str:
        """One sentence: it fits, with how much of what; or why not."""
        if self.problems:
            return f"Does not fit: {'; '.join(self.problems)}."
        cost = "" if self.dollars is None else f", about ${self.dollars:,.2f}" if self.dollars else ", no extra cost"
        share = self.needed / self.limit
        return (
            f"Fits: {self.needed / GIB:.1f} of {self.limit / GIB:.1f} GiB usable on each {self.node.device} "
            f"({share:.0%}), {duration(self.seconds)}{cost}."
        )

    def to_json(self) -> Json:
        return asdict(self) | {
            "node": self.node.model_dump(mode="json"),
            "needed": self.needed,
            "seconds": self.seconds,
            "fits": self.fits,
            "verdict": self.verdict,
        }


def duration(seconds: float) -> str:
    """As people say it: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def estimate(
    recipe: Recipe,
    shape: ModelShape,
    node: NodeType,
    *,
    price: float | None = None,
    data: DatasetFacts | None = None,
) -> Estimate:
    """Of the whole run. `price` in dollars an hour of one node replaces the table's."""
    memory = memory_parts(recipe, shape, node)
    limit = _limit(recipe, node)
    time, utilisation, tokens_per_second = _time(recipe, shape, node, data)
    hourly = node.dollars_per_hour if price is None else price
    seconds = sum(part.seconds for part in time)
    dollars = None if hourly is None else seconds / 3600 * hourly * recipe.parallelism.nodes
    problems = list(_problems(recipe, shape, node, data))
    needed = sum(part.bytes for part in memory)
    changes: tuple[str, ...] = ()
    if needed > limit:
        largest = max(memory, key=lambda part: part.bytes)
        problems.append(
            f"{needed / GIB:.1f} GiB are needed of {limit / GIB:.1f} GiB usable on each {node.device}, "
            f"most of it {largest.name} ({largest.bytes / GIB:.1f} GiB)"
        )
        changes = tuple(_changes(recipe, shape, node))
    if dollars is not None and recipe.budget.dollars is not None and dollars > recipe.budget.dollars:
        problems.append(f"it would cost ${dollars:,.2f} of budget.dollars = ${recipe.budget.dollars:,.2f}")
    return Estimate(
        recipe=recipe.name,
        node=node,
        nodes=recipe.parallelism.nodes,
        processes=recipe.parallelism.processes,
        base=shape.name,
        parameters=shape.parameters,
        trainable=trainable_parameters(recipe, shape),
        memory=memory,
        limit=limit,
        time=time,
        utilisation=utilisation,
        tokens_per_second=tokens_per_second,
        dollars=dollars,
        steps=recipe.schedule.max_steps,
        epochs=_epochs(recipe, data),
        problems=tuple(problems),
        changes=changes,
        notes=tuple(_notes(recipe, node, data, seconds)),
    )


def _limit(recipe: Recipe, node: NodeType) -> float:
    """Usable bytes of one process: an accelerator of its own, or a share of the machine's memory."""
    if node.accelerators:
        return node.memory_gib * GIB * USABLE
    return node.ram_gib * GIB * USABLE / recipe.parallelism.processes


def _problems(recipe: Recipe, shape: ModelShape, node: NodeType, data: DatasetFacts | None) -> Iterator[str]:
    parallelism = recipe.parallelism
    if parallelism.backend == "nccl" and not node.accelerators:
        yield f"parallelism.backend nccl needs accelerators and {node.name} has none"
    if parallelism.backend == "gloo" and node.accelerators:
        yield f"parallelism.backend gloo would leave the {node.accelerators} {node.accelerator} of {node.name} unused"
    if node.accelerators and parallelism.processes > node.accelerators:
        yield f"parallelism.processes {parallelism.processes} exceed the {node.accelerators} accelerators there"
    if recipe.precision.fp8 and node.accelerators and node.fp8_tflops is None:
        yield f"precision.fp8 is not in the hardware of {node.accelerator}"
    if shape.context and recipe.data.max_length > shape.context:
        yield f"data.max_length {recipe.data.max_length} exceeds the base's context of {shape.context} tokens"
    if shape.heads % parallelism.tp or shape.key_value_heads % parallelism.tp:
        yield (
            f"parallelism.tp {parallelism.tp} does not divide the base's {shape.heads} heads "
            f"and {shape.key_value_heads} key-value heads"
        )
    if parallelism.pp > shape.layers:
        yield f"parallelism.pp {parallelism.pp} exceeds the base's {shape.layers} layers"
    if data is not None and data.examples < recipe.schedule.global_batch_size and not recipe.data.packing:
        yield (
            f"the dataset has {data.examples} usable examples and one step takes schedule.global_batch_size = "
            f"{recipe.schedule.global_batch_size}"
        )


def _notes(recipe: Recipe, node: NodeType, data: DatasetFacts | None, seconds: float) -> Iterator[str]:
    limit = recipe.budget.timeout_minutes
    if seconds > limit * 60:
        attempts = math.ceil(seconds / 60 / limit)
        yield f"budget.timeout_minutes = {limit:g} ends an attempt; about {attempts} of them will do"
    if node.accelerators > recipe.parallelism.processes:
        idle = node.accelerators - recipe.parallelism.processes
        yield f"{idle} of {node.accelerators} accelerators stay idle and are paid for"
    if data is None:
        yield "no dataset given (--dataset): rows are taken as full, so time is an upper bound"
    elif data.too_long:
        yield f"{data.too_long} examples are longer than data.max_length and are left out"
    if data is not None and not data.measured:
        yield "the base's tokenizer is not at hand: 4 characters are taken as a token"


def _row_tokens(recipe: Recipe, data: DatasetFacts | None) -> tuple[float, float]:
    """Tokens computed of one row, and tokens of the example that each of them sees."""
    if data is None:
        return float(recipe.data.row_length), float(recipe.data.max_length)
    if recipe.data.packing:
        return float(recipe.data.row_length), data.mean_tokens
    return min(float(recipe.data.row_length), data.mean_tokens * _PADDING), data.mean_tokens


def _epochs(recipe: Recipe, data: DatasetFacts | None) -> float | None:
    if data is None or not data.examples:
        return None
    rows = float(data.examples)
    if recipe.data.packing:
        rows = max(1.0, data.examples * data.mean_tokens / (recipe.data.row_length * _PACK_FILL))
    return recipe.schedule.max_steps * recipe.schedule.global_batch_size / rows


def _utilisation(recipe: Recipe, node: NodeType) -> tuple[float, str]:
    """Share of the dense peak that useful arithmetic reaches, and where that figure comes from."""
    if not node.accelerators:
        return 0.50, "50% of float32 peak: `demo` on 2 cores, 174 to 194 tokens/s measured"
    if recipe.method == "full":
        share, words = 0.30, "30%: torchtitan, Llama-3 8B, FSDP2 on H100"
        if recipe.precision.compile:
            share, words = 0.35, "35%: torchtitan, Llama-3 8B, FSDP2 and compile on H100 (6,667 tokens/s)"
    else:
        share, words = 0.40, "40%: NVIDIA, AutoModel LoRA of Llama-3.1-8B on H100 (12,473 tokens/s)"
    if recipe.parallelism.nodes > 1:
        share, words = share * 0.9, words + "; x 0.9 over nodes: NVIDIA, AutoModel LoRA of 70B on 16 against 8"
    if recipe.precision.fp8:
        share, words = share * 1.28, words + "; x 1.28 in float8: torchtitan (8,532 against 6,667 tokens/s)"
    if recipe.method == "qlora":
        share, words = share * 0.75, words + "; x 0.75 to unpack 4-bit weights (assumption)"
    if recipe.parallelism.tp > 1:
        share, words = share * 0.9, words + "; x 0.9 for tp (assumption)"
    if recipe.parallelism.pp > 1:
        micro = recipe.schedule.global_batch_size // (recipe.schedule.micro_batch_size * recipe.parallelism.dp)
        busy = micro / (micro + recipe.parallelism.pp - 1)
        share, words = share * busy, words + f"; x {busy:.2f} for the pipeline's bubble"
    return share, words


def _time(
    recipe: Recipe, shape: ModelShape, node: NodeType, data: DatasetFacts | None
) -> tuple[tuple[TimePart, ...], str, float]:
    schedule, parallelism = recipe.schedule, recipe.parallelism
    row, attended = _row_tokens(recipe, data)
    forward = shape.forward_flops(attended)
    # Backward costs a forward for the activations' gradients, and another for the weights' where they are trained.
    passes = 3 if recipe.method == "full" else 2
    passes_done = passes + (1 if parallelism.activation_checkpointing else 0)
    trained = trainable_parameters(recipe, shape) if recipe.method != "full" else 0
    per_token = passes_done * forward + 6 * trained
    share, words = _utilisation(recipe, node)
    devices = parallelism.world_size if node.accelerators else parallelism.nodes
    rate = node.bf16_tflops * 1e12 * share * devices
    tokens = schedule.global_batch_size * row
    step = tokens * per_token / rate
    rounds = math.ceil(schedule.max_steps / (schedule.validate_every_steps or schedule.max_steps))
    rows = recipe.data.validation_limit or (data.validation if data else None) or _VALIDATION_ROWS
    peak = node.bf16_tflops * devices
    parts = [
        _start(recipe, shape, node),
        TimePart(
            "steps",
            schedule.max_steps * step,
            f"{schedule.max_steps} steps x {tokens:,.0f} tokens x {per_token / 1e9:,.2f} GFLOP "
            f"({passes_done} x forward) / ({share:.0%} of {peak:{',.0f' if peak >= 10 else '.2f'}} TFLOP/s)",
        ),
        TimePart(
            "validation",
            rounds * rows * row * forward / rate,
            f"{rounds} x {rows} rows x {row:,.0f} tokens, forward only",
        ),
        _checkpoints(recipe, shape, step),
    ]
    if recipe.method == "full":
        size = shape.parameters * bytes_of(recipe.precision.parameters)
        parts.append(TimePart("export", size / _WRITE_BYTES_PER_S, f"{size / 1e9:,.1f} GB at 1 GB/s (assumption)"))
    return tuple(parts), words, tokens / step


def _start(recipe: Recipe, shape: ModelShape, node: NodeType) -> TimePart:
    size = shape.parameters * bytes_of(recipe.precision.compute)
    load = size / _WRITE_BYTES_PER_S
    if not node.accelerators:
        return TimePart("start", 30 + load, f"30 s of imports (measured), {size / 1e9:.1f} GB at 1 GB/s (assumption)")
    compiled = 120 if recipe.precision.compile else 0
    return TimePart(
        "start",
        90 + load + compiled,
        f"90 s of imports and rendezvous, {size / 1e9:,.1f} GB at 1 GB/s"
        f"{', 120 s of compilation' if compiled else ''} (assumptions)",
    )


def _checkpoints(recipe: Recipe, shape: ModelShape, step_s: float) -> TimePart:
    section = recipe.checkpoints
    count = recipe.schedule.max_steps // section.every_steps
    size = 3 * trainable_parameters(recipe, shape) * bytes_of(recipe.precision.parameters)
    write = size / (_WRITE_BYTES_PER_S * recipe.parallelism.nodes)
    # Beside training only what outlasts the steps in between costs time.
    waits = max(0.0, write - section.every_steps * step_s) if section.asynchronous else write
    how = "beside training" if section.asynchronous else "training waits"
    return TimePart(
        "checkpoints", count * waits, f"{count} x {size / 1e9:,.2f} GB at 1 GB/s a node (assumption), {how}"
    )


def _changes(recipe: Recipe, shape: ModelShape, node: NodeType) -> Iterator[str]:
    """Changes of the recipe that fit this node type: up to three of the least kind that has any."""
    limit = _limit(recipe, node)
    for kind in _candidates(recipe):
        found = []
        for overrides in kind:
            try:
                changed = recipe.with_overrides(overrides)
            except InputError:
                continue
            needed = sum(part.bytes for part in memory_parts(changed, shape, node))
            if needed <= limit:
                words = " with ".join(f"{field}: {str(value).lower()}" for field, value in overrides.items())
                found.append(f"{words} ({needed / GIB:.1f} GiB)")
        if found:
            yield from found[:3]
            return


def _candidates(recipe: Recipe) -> Iterator[list[dict[str, Json]]]:
    """What could be changed, the least first: one field, two, more machines, another method."""
    micro, parallelism = recipe.schedule.micro_batch_size, recipe.parallelism
    accelerators = parallelism.backend == "nccl"
    smaller: list[dict[str, Json]] = [
        {"schedule.micro_batch_size": size} for size in range(micro - 1, 0, -1) if micro % size == 0
    ]
    checkpointing: dict[str, Json] = {"parallelism.activation_checkpointing": True}
    single = smaller[:1] + smaller[-1:] if len(smaller) > 1 else list(smaller)
    if not parallelism.reshard_after_forward:
        single.append({"parallelism.reshard_after_forward": True})
    if not parallelism.activation_checkpointing:
        single.append(checkpointing)
    if recipe.data.packing and recipe.data.row_length > recipe.data.max_length:
        single.append({"data.pack_length": recipe.data.max_length})
    if recipe.precision.compute == "float32" and accelerators:
        single.append({"precision.compute": "bfloat16"})
    if recipe.method == "lora" and accelerators:
        single.append({"method": "qlora", "precision.compute": "bfloat16"})
    yield single
    yield [size | checkpointing for size in smaller]
    least = {"schedule.micro_batch_size": 1} | checkpointing
    more: list[dict[str, Json]] = [{"parallelism.nodes": parallelism.nodes * factor} for factor in (2, 4, 8)]
    yield more
    yield [least | nodes for nodes in more]
    if recipe.method == "full":
        yield [{"method": "lora"}, least | {"method": "lora"}]
    elif recipe.method == "lora" and accelerators:
        yield [least | {"method": "qlora", "precision.compute": "bfloat16"}]
