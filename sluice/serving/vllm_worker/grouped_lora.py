"""LoRA for vLLM on a CPU, one matrix product an adapter instead of one gathered weight matrix a token.

vLLM's reference operators copy the adapter's weights once for every token of the batch (`weights[indices]`, then an
einsum), so a prompt of 300 tokens moves 300 copies through memory. Here the tokens of a step are grouped by adapter
and each group is one product with the adapter's own weights. The arithmetic is the same: products and sums in
float32 for the shrink, in the model's type for the expand.

It mends one more thing: the reference operators index with -1 for a token of the base model, which in Python is the
last slot. With every slot taken, answers of the base model would be mixed with the adapter in that slot.

This module runs inside vLLM's own environment and imports nothing of ours. The server is started with
`--worker-extension-cls grouped_lora.GroupedLora` and this folder in PYTHONPATH; a GPU server is started without it.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU  # type: ignore[import-not-found]

_update_metadata = PunicaWrapperCPU.update_metadata


def update_metadata(self: Any, *args: Any, **kwargs: Any) -> None:
    """Once a step: the tokens of each adapter, as (slot, row numbers or None for all rows)."""
    _update_metadata(self, *args, **kwargs)
    indices = self.token_lora_indices
    slots = torch.unique(indices).tolist()
    if len(slots) == 1:
        self.lora_groups = [(slots[0], None)] if slots[0] >= 0 else []
    else:
        self.lora_groups = [(slot, (indices == slot).nonzero().squeeze(1)) for slot in slots if slot >= 0]


def add_lora_linear(
    self: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: tuple[torch.Tensor, ...],
    lora_b_stacked: tuple[torch.Tensor, ...],
    scale: float,
    output_slices: tuple[int, ...],
    **kwargs: Any,
) -> None:
    """`y[:, slice] += (x @ A^T * scale) @ B^T` in place, for every adapter in the batch and every slice.

    Shapes: x [tokens, in], y [tokens, sum(output_slices)], A [slots, 1, rank, in], B [slots, 1, slice, rank].
    """
    x = x.view(-1, x.shape[-1])
    y = y.view(-1, y.shape[-1])
    for slot, rows in self.lora_groups:
        inputs = (x if rows is None else x.index_select(0, rows)).float()
        start = 0
        for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            low = torch.nn.functional.linear(inputs, a[slot, 0].float()).mul_(scale).to(y.dtype)
            out = torch.nn.functional.linear(low, b[slot, 0].to(y.dtype))
            if rows is None:
                y[:, start : start + out.shape[1]] += out
            else:
                y[:, start : start + out.shape[1]].index_add_(0, rows, out)
            start += width


class GroupedLora:
    """vLLM's worker takes this class as a base; it needs no attribute of it, only this module's import."""


PunicaWrapperCPU.update_metadata = update_metadata
PunicaWrapperCPU.add_lora_linear = add_lora_linear
