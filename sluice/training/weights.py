"""How far two adapters, or two models, lie apart: per tensor, in measures that mean the same for every model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sluice.infra.errors import IntegrityError
from sluice.training.full_model import open_model


@dataclass(frozen=True)
class TensorDifference:
    """One tensor of both: largest and mean absolute difference, the difference's norm relative to the first one's
    norm (Frobenius), and the cosine of the two as vectors. Cosine is 1 for two zero tensors."""

    name: str
    largest: float
    mean: float
    relative_norm: float
    cosine: float


def compare_weights(one: Path, other: Path) -> tuple[TensorDifference, ...]:
    """The differences of two folders of weights, tensor by tensor in name order, one pair in memory at a time.

    Raises `IntegrityError` naming a tensor that only one of them has, or that has another shape.
    """
    first, second = open_model(one), open_model(other)
    for name in sorted({*first, *second}):
        if name not in first or name not in second:
            raise IntegrityError(f"The tensor {name!r} is in {one if name in first else other} only.")
        if first[name].shape != second[name].shape:
            raise IntegrityError(f"The tensor {name!r} has shapes {first[name].shape} and {second[name].shape}.")
    found = []
    for name in sorted(first):
        a, b = (side[name].float32().astype(np.float64).ravel() for side in (first, second))
        apart = np.abs(a - b)
        length, other_length = float(np.linalg.norm(a)), float(np.linalg.norm(b))
        distance = float(np.linalg.norm(a - b))
        found.append(
            TensorDifference(
                name,
                float(apart.max(initial=0.0)),
                float(apart.mean()) if apart.size else 0.0,
                distance / length if length else float(distance > 0),
                float(a @ b) / (length * other_length) if length and other_length else float(length == other_length),
            )
        )
    return tuple(found)
