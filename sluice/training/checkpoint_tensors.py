"""Parts of a training state as a checkpoint writes them, and the sentences for what fails. Training processes only."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json
from sluice.training.checkpoint_files import CheckpointFailed, write_failure

# Wrappers that put their own name into a parameter's: activation checkpointing, torch.compile, DistributedDataParallel.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def clean_name(name: str) -> str:
    """A parameter's name without those of its wrappers."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def plain(value: Any, name: str) -> Json:
    """`value` as JSON keeps it exactly. Raises `InputError` naming what it cannot keep."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(one, name) for one in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: plain(one, key) for key, one in value.items()}
    raise InputError(f"{name} = {value!r} of an optimizer or schedule cannot be kept in a checkpoint as plain JSON.")


def merged_groups(reports: Sequence[list[dict[str, Json]]]) -> list[dict[str, Json]]:
    """Groups of all processes, each once: with pipeline stages each process has parameters of its own."""
    found: list[dict[str, Json]] = []
    for groups in reports:
        found.extend(group for group in groups if group not in found)
    return found


def written_bytes(tensor: Tensor) -> float:
    """This process' part of a tensor that several write together, in bytes."""
    if not isinstance(tensor, DTensor):
        return float(tensor.nbytes) / (dist.get_world_size() if dist.is_initialized() else 1)
    copies = math.prod(
        tensor.device_mesh.size(dimension)
        for dimension, placement in enumerate(tensor.placements)
        if placement.is_replicate()
    )
    return float(tensor.to_local().nbytes / copies)


def empty_like(parameter: Tensor, saved: TensorStorageMetadata) -> Tensor:
    """A tensor to read an optimizer's state into: cut as the parameter where it has its shape, else whole."""
    if saved.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=saved.properties.dtype, requires_grad=False)
    return torch.empty(saved.size, dtype=saved.properties.dtype)


def shape_in_words(size: torch.Size, dtype: torch.dtype) -> str:
    """`8 x 64 bfloat16`."""
    return f"{' x '.join(map(str, size)) or 'a number'} {str(dtype).removeprefix('torch.')}"


def explained(error: BaseException, folder: Path, needed: int) -> CheckpointFailed:
    """The sentence for whatever a save failed of, on this process or another one."""
    causes = [pair[0] for pair in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    free = shutil.disk_usage(folder.parent).free if folder.parent.is_dir() else 0
    for cause in causes:
        if isinstance(cause, CheckpointFailed):
            return cause
        # torch's writer hides what the system said behind an error of its own.
        for one in (cause, cause.__cause__, cause.__context__):
            if isinstance(one, OSError):
                return write_failure(one, folder, needed, free)
    return CheckpointFailed(
        f"{str(folder)!r} cannot be written: {causes[0]}.", path=str(folder), needed=needed, free=free
    )


def cause_of(error: BaseException) -> str:
    """What the first process that failed said."""
    return str(next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error)
