"""The safetensors file format, without torch: read a header, write a file.

Layout (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length, a JSON header with
dtype, shape and byte range of each tensor, then the bytes. There is nothing in it that can run code, and one set of
tensors has one set of bytes here: names in order, no machine-dependent metadata.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sluice.infra.errors import IntegrityError

_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a file: dtype as the format spells it (`F32`), shape, byte range after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """The checked header of a file. `data_start` is the file offset of byte 0 of the tensors."""

    tensors: Mapping[str, TensorHeader]
    metadata: Mapping[str, str]
    data_start: int


def read_header(path: Path) -> SafetensorsHeader:
    """Read and check a header: known dtypes, ranges that fit the shapes, follow each other and fill the file.

    Raises `IntegrityError` naming the tensor (or the file) that breaks a rule.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _LONGEST_HEADER + 1
        if length > min(_LONGEST_HEADER, max(size - 8, 0)):
            raise IntegrityError(f"{path} is not a safetensors file: its header does not fit.")
        try:
            raw = json.loads(stream.read(length))
            metadata = dict(raw.pop("__metadata__", {}))
            tensors = {
                name: TensorHeader(
                    str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), *(int(n) for n in entry["data_offsets"])
                )
                for name, entry in raw.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"{path} is not a safetensors file: its header is broken ({error!r}).") from error
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.dtype not in _SIZES:
            raise IntegrityError(f"{name} in {path} has the unknown dtype {tensor.dtype!r}.")
        expected = position + _SIZES[tensor.dtype] * math.prod(tensor.shape)
        if (tensor.start, tensor.end) != (position, expected):
            raise IntegrityError(
                f"{name} in {path} covers bytes {tensor.start} to {tensor.end}; {position} to {expected} fit."
            )
        position = expected
    if size != 8 + length + position:
        raise IntegrityError(f"{path} has {size} bytes; its header describes {8 + length + position}.")
    return SafetensorsHeader(tensors, metadata, 8 + length)


def read_bytes(path: Path, header: SafetensorsHeader, name: str) -> npt.NDArray[np.uint8]:
    """The raw little-endian bytes of one tensor."""
    tensor = header.tensors[name]
    with path.open("rb") as stream:
        stream.seek(header.data_start + tensor.start)
        return np.fromfile(stream, dtype=np.uint8, count=tensor.end - tensor.start)


def read_float32(path: Path, header: SafetensorsHeader, name: str) -> npt.NDArray[np.float32]:
    """One tensor of F32, F16 or BF16 as float32, in its shape. Raises `IntegrityError` for another dtype."""
    tensor = header.tensors[name]
    raw = read_bytes(path, header, name)
    if tensor.dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        values = (raw.view("<u2").astype("<u4") << 16).view("<f4")
    elif tensor.dtype in ("F32", "F16"):
        values = raw.view({"F32": "<f4", "F16": "<f2"}[tensor.dtype])
    else:
        raise IntegrityError(f"{name} in {path} is {tensor.dtype}; a floating type of 16 or 32 bits was expected.")
    return values.reshape(tensor.shape).astype(np.float32)


def write_tensors(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], read: Callable[[str], npt.NDArray[Any]]
) -> None:
    """Write tensors given as (dtype, shape) by name; `read(name)` gives one's values, or its raw bytes as uint8.

    In name order and one at a time, so that a large model needs the memory of one tensor. The file appears whole or
    not at all. Raises `IntegrityError` when the bytes of a tensor do not fill its shape.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in sorted(tensors):
        dtype, shape = tensors[name]
        end = position + _SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    staging = path.with_name(path.name + ".partial")
    with staging.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in sorted(tensors):
            values = np.ascontiguousarray(read(name))
            begin, end = header[name]["data_offsets"]
            if values.nbytes != end - begin:
                raise IntegrityError(f"{name} has {values.nbytes} bytes; {tensors[name]} takes {end - begin}.")
            stream.write(values.reshape(-1).view(np.uint8).data)
    staging.replace(path)
