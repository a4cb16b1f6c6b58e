"""The distance of two adapters, against numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from sluice.infra.errors import IntegrityError
from sluice.training.adapter import WEIGHTS
from sluice.training.safetensors_file import write_tensors
from sluice.training.weights import compare_weights


def adapter(folder: Path, **tensors: list[float]) -> Path:
    folder.mkdir()
    write_tensors(folder / WEIGHTS, {name: np.array(values, dtype=np.float32) for name, values in tensors.items()})
    return folder


def test_differences_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", a=[3.0, 4.0], b=[0.0, 0.0], c=[1.0, 0.0])
    other = adapter(tmp_path / "other", a=[3.0, 4.0], b=[0.0, 0.0], c=[0.0, 2.0])
    a, b, c = compare_weights(one, other)
    assert (a.largest, a.mean, a.relative_norm) == (0, 0, 0)
    assert a.cosine == pytest.approx(1)
    assert (b.relative_norm, b.cosine) == (0, 1)
    assert (c.largest, c.mean, c.cosine) == (2, 1.5, 0)
    assert c.relative_norm == pytest.approx(math.sqrt(5))


def test_other_tensors_are_named(tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", a=[1.0])
    with pytest.raises(IntegrityError, match="'b'"):
        compare_weights(one, adapter(tmp_path / "more", a=[1.0], b=[1.0]))
    with pytest.raises(IntegrityError, match="shapes"):
        compare_weights(one, adapter(tmp_path / "wide", a=[1.0, 2.0]))
