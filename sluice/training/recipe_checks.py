"""What no single section can know: fields that do not go together, found before a machine is rented.

Each check yields the dotted field to change and why; `recipe.py` adds line and value. What AutoModel 0.7.0 does is
from its sources; the place stands beside each such check.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, get_args

from sluice.training.recipe_sections import Module

if TYPE_CHECKING:
    from sluice.training.recipe import Recipe

Problem = tuple[str, str]
"""Dotted field, and what is wrong with it."""


def problems_of(recipe: Recipe) -> list[Problem]:
    """Everything that does not go together, in the order of the sections."""
    return [
        *_method(recipe),
        *_rows(recipe),
        *_schedule(recipe),
        *_parallelism(recipe),
        *_precision(recipe),
        *_end(recipe),
    ]


def _method(recipe: Recipe) -> Iterator[Problem]:
    parallelism, precision = recipe.parallelism, recipe.precision
    if recipe.method != "qlora":
        return
    if parallelism.backend != "nccl":
        yield "method", "needs accelerators (parallelism.backend: nccl): bitsandbytes' 4-bit kernels run nowhere else"
    if precision.compute != "bfloat16":
        yield "precision.compute", "must be bfloat16 with method qlora: 4-bit weights are unpacked to 16 bits"
    if parallelism.tp > 1 or parallelism.pp > 1:
        # _transformers/model_init.py:1010 quantizes whole layers onto each accelerator, before anything is cut.
        field = "parallelism.tp" if parallelism.tp > 1 else "parallelism.pp"
        yield field, "must be 1 with method qlora: 4-bit weights are made whole on each accelerator and cannot be cut"


def _rows(recipe: Recipe) -> Iterator[Problem]:
    data, parallelism = recipe.data, recipe.parallelism
    length = "data.pack_length" if data.pack_length else "data.max_length"
    # components/distributed/context_parallel/sharder.py:119: each process takes two pieces, one early, one late.
    if parallelism.cp > 1 and data.row_length % (2 * parallelism.cp):
        yield (
            length,
            f"must be a multiple of 2 x parallelism.cp = {2 * parallelism.cp}, the pieces that rows are cut into",
        )
    if parallelism.cp > 1 and data.packing:
        # _transformers/infrastructure.py:838: with cp the attention mask is dropped, so packed examples would mix.
        yield "data.packing", "must be false with parallelism.cp > 1: packed examples would see each other"
    if recipe.precision.fp8 and data.row_length % 16:
        yield length, "must be a multiple of 16 with precision.fp8, as float8 products need"


def _schedule(recipe: Recipe) -> Iterator[Problem]:
    schedule, parallelism = recipe.schedule, recipe.parallelism
    share = schedule.micro_batch_size * parallelism.dp
    if schedule.global_batch_size % share:
        yield (
            "schedule.global_batch_size",
            f"must be a multiple of schedule.micro_batch_size x the data-parallel size = {share}",
        )
    every = schedule.validate_every_steps
    if every is not None and every > schedule.max_steps:
        yield (
            "schedule.validate_every_steps",
            f"is never reached within schedule.max_steps = {schedule.max_steps}; leave it out to validate at the end",
        )
    if schedule.result == "best" and every is None:
        yield "schedule.result", "needs schedule.validate_every_steps: one validation at the end has no best"
    # A warm-up of one step is the default and does nothing, so that a drill of one step stays possible.
    if recipe.optimizer.warmup_steps >= max(schedule.max_steps, 2):
        yield (
            "optimizer.warmup_steps",
            f"must be below schedule.max_steps = {schedule.max_steps}, or the learning rate never gets there",
        )


def _parallelism(recipe: Recipe) -> Iterator[Problem]:
    parallelism, schedule = recipe.parallelism, recipe.schedule
    if parallelism.backend == "gloo":
        for name in ("tp", "pp", "cp"):
            if getattr(parallelism, name) > 1:
                yield f"parallelism.{name}", "must be 1 with backend gloo: only data is cut over processors"
        if recipe.precision.compile:
            yield "precision.compile", "needs accelerators (parallelism.backend: nccl): on processors it costs minutes"
        return
    if parallelism.tp > parallelism.processes:
        yield (
            "parallelism.tp",
            f"exceeds parallelism.processes = {parallelism.processes}: a layer cut over nodes waits for the network",
        )
    micro_batches = schedule.global_batch_size // max(1, schedule.micro_batch_size * parallelism.dp)
    if parallelism.pp > 1 and micro_batches < parallelism.pp:
        # recipes/llm/train_ft.py:674 asserts it after the model is loaded.
        yield (
            "parallelism.pp",
            f"needs at least as many micro-batches; a step has {micro_batches} (schedule.global_batch_size / "
            "(schedule.micro_batch_size x dp))",
        )


def _precision(recipe: Recipe) -> Iterator[Problem]:
    if not recipe.precision.fp8:
        return
    if recipe.parallelism.backend != "nccl":
        yield "precision.fp8", "needs accelerators (parallelism.backend: nccl), H100 or newer"
    if recipe.precision.compute != "bfloat16":
        yield "precision.compute", "must be bfloat16 with precision.fp8: float8 products are summed into it"
    if recipe.method == "qlora":
        yield "precision.fp8", "must be false with method qlora, whose weights are 4-bit"
    elif recipe.method != "full" and set(recipe.lora.target_modules) == set(get_args(Module)):
        # components/quantization/fp8.py:231: converting a projection to float8 silently drops its low-rank pair, so
        # projections with a pair keep their precision (automodel.py), and here none is left.
        yield "precision.fp8", "gains nothing here: projections with a low-rank pair stay as they are, and all have one"


def _end(recipe: Recipe) -> Iterator[Problem]:
    if recipe.output.merge and recipe.method == "full":
        yield "output.merge", "must be false with method full: its result is a whole model already"
