"""The start of DoRA's magnitudes, which AutoModel 0.7 leaves to chance.

DoRA (arXiv 2402.09353, section 4) splits a weight into a direction and a magnitude per output row, and starts the
magnitude at the norm of the base's row, so that training starts from the base model. AutoModel takes that norm while
the model has no weights yet (it builds on the meta device and loads afterwards), and what stands in the parameter after
loading is uninitialised memory. Its own `_init_peft_adapters` starts A and B again, not the magnitude.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def start_magnitudes(model: torch.nn.Module) -> int:
    """Set every `lora_magnitude` [out] to the norms of its base weight's rows [out, in]; how many were set.

    Call it when the base's weights are loaded and before a checkpoint is. With sharded weights all processes take part.
    """
    import torch
    from torch.distributed.tensor import DTensor

    found = 0
    with torch.no_grad():
        for module in model.modules():
            magnitude = getattr(module, "lora_magnitude", None)
            if not isinstance(magnitude, torch.nn.Parameter):
                continue
            norms = torch.linalg.vector_norm(module.weight.detach().float(), dim=1)
            if isinstance(norms, DTensor) and isinstance(magnitude, DTensor):
                norms = norms.redistribute(placements=magnitude.placements)
            magnitude.copy_(norms)
            found += 1
    return found
