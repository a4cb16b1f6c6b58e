"""Safetensors files: one set of bytes for one set of tensors, exact widening, and strict about everything else."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sluice.infra.errors import IntegrityError
from sluice.training.safetensors_file import TensorHeader, read_float32, read_header, write_tensors


def file_of(path: Path, header: dict[str, Any], data: bytes) -> Path:
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_order_and_memory_layout_of_the_arrays_do_not_matter(tmp_path: Path) -> None:
    ramp = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensors = {"b": ramp, "a": np.ones(3, dtype=np.float32)}
    write_tensors(tmp_path / "one", tensors)
    write_tensors(tmp_path / "two", {"a": tensors["a"], "b": np.asfortranarray(ramp)})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert read_header(tmp_path / "one") == {"a": TensorHeader("F32", (3,)), "b": TensorHeader("F32", (2, 3))}
    np.testing.assert_array_equal(read_float32(tmp_path / "two")["b"], ramp)


def test_sixteen_bits_widen_exactly(tmp_path: Path) -> None:
    header = {"brain": entry("BF16", [2, 2], 0, 8), "half": entry("F16", [2], 8, 12)}
    # bfloat16: 1, -2, infinity, and 2^-133, which is subnormal.
    data = struct.pack("<4H", 0x3F80, 0xC000, 0x7F80, 0x0001) + np.array([0.5, -3], dtype="<f2").tobytes()
    tensors = read_float32(file_of(tmp_path / "f", header, data))
    np.testing.assert_array_equal(tensors["brain"], [[1, -2], [np.inf, 2.0**-133]])
    np.testing.assert_array_equal(tensors["half"], [0.5, -3])
    assert {values.dtype for values in tensors.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"x": entry("F32", [1], 0, 4)}, b"1234x", "not a safetensors file"),
        ({"x": entry("F32", [1], 0, 4)}, b"123", "not a safetensors file"),
        ({"x": entry("F32", [2], 0, 4)}, b"1234", "not a safetensors file"),
        ({"x": entry("F32", [1], 4, 8)}, b"12345678", "not a safetensors file"),
        ({"x": entry("F32", [1], 0, 4), "y": entry("F32", [1], 0, 4)}, b"1234", "not a safetensors file"),
        ({"x": entry("I64", [1], 0, 8)}, b"12345678", "x in .* is I64"),
        ({"__metadata__": {"format": "pt", "note": "n"}, "x": entry("F32", [1], 0, 4)}, b"1234", "note = 'n'"),
        ({"__metadata__": {"format": "tf"}, "x": entry("F32", [1], 0, 4)}, b"1234", "format = 'tf'"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, header: dict[str, Any], data: bytes, says: str) -> None:
    path = file_of(tmp_path / "f", header, data)
    for read in (read_header, read_float32):
        with pytest.raises(IntegrityError, match=says):
            read(path)
