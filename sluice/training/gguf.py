"""Reading a GGUF file with numpy alone: its metadata, and its tensors as float32.

transformers reads GGUF too, but imports torch, builds the model and wraps every vocabulary entry in an array: half a
minute. This reader takes about a second and covers what a small llama needs: the types F32, F16, Q4_0, Q4_1 and Q8_0.
Layout and block formats: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and ggml-common.h.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sluice.infra.errors import IntegrityError

FloatArray = npt.NDArray[np.float32]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_BLOCK = 32


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: shape in row-major (numpy) order, GGML type number, byte offset in the file."""

    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int


class GgufFile:
    """A GGUF file mapped into memory. `metadata` by key, `tensors` by name. Raises `IntegrityError` for other bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        try:
            self.metadata, self.tensors = _parse(self._bytes)
        except (struct.error, IndexError, KeyError, ValueError, UnicodeDecodeError) as error:
            raise IntegrityError(f"{path} is not a GGUF file that can be read: {error}.") from error

    def read(self, name: str) -> FloatArray:
        """One tensor, dequantised to float32. Raises `IntegrityError` when it is absent or of an unknown type."""
        entry = self.tensors.get(name)
        if entry is None:
            raise IntegrityError(f"{self.path} holds no tensor {name!r}.")
        known = _FORMATS.get(entry.type_number)
        if known is None:
            raise IntegrityError(f"{name} in {self.path} has GGML type {entry.type_number}, which is not read here.")
        values_each, bytes_each, decode = known
        count = int(np.prod(entry.shape, dtype=np.int64))
        blocks = count // values_each
        raw = np.asarray(self._bytes[entry.offset : entry.offset + blocks * bytes_each])
        if raw.size != blocks * bytes_each or count % values_each:
            raise IntegrityError(f"{name} in {self.path} is cut off: {raw.size} of {blocks * bytes_each} bytes.")
        return decode(raw.reshape(blocks, bytes_each)).reshape(entry.shape)


def _f32(blocks: npt.NDArray[np.uint8]) -> FloatArray:
    return blocks.view("<f4").astype(np.float32)


def _f16(blocks: npt.NDArray[np.uint8]) -> FloatArray:
    return blocks.view("<f2").astype(np.float32)


def _nibbles(packed: npt.NDArray[np.uint8]) -> FloatArray:
    """The 32 four-bit values of each block: the low halves of 16 bytes first, then the high halves."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=1).astype(np.float32)


def _q4_0(blocks: npt.NDArray[np.uint8]) -> FloatArray:
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    return scale * (_nibbles(blocks[:, 2:]) - np.float32(8))


def _q4_1(blocks: npt.NDArray[np.uint8]) -> FloatArray:
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    least = np.ascontiguousarray(blocks[:, 2:4]).view("<f2").astype(np.float32)
    return scale * _nibbles(blocks[:, 4:]) + least


def _q8_0(blocks: npt.NDArray[np.uint8]) -> FloatArray:
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    return scale * np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32)


_FORMATS: dict[int, tuple[int, int, Callable[[npt.NDArray[np.uint8]], FloatArray]]] = {
    0: (1, 4, _f32),
    1: (1, 2, _f16),
    2: (_BLOCK, 18, _q4_0),
    3: (_BLOCK, 20, _q4_1),
    8: (_BLOCK, 34, _q8_0),
}
"""GGML type number: values in a block, bytes in a block, decoder from [blocks, bytes] to [blocks, values]."""


def _parse(data: npt.NDArray[np.uint8]) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    # The metadata and the tensor list precede the aligned tensor data; memoryview slices of the map copy only these.
    view: memoryview = data.data
    if bytes(view[:4]) != b"GGUF":
        raise ValueError("the magic number is missing")
    version, tensor_count, key_count = struct.unpack_from("<IQQ", view, 4)
    if version not in (2, 3):
        raise ValueError(f"version {version} is unknown")
    position = 24
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key, position = _string(view, position)
        (kind,) = struct.unpack_from("<I", view, position)
        metadata[key], position = _value(view, position + 4, kind)
    listed: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(tensor_count):
        name, position = _string(view, position)
        (dimensions,) = struct.unpack_from("<I", view, position)
        shape = struct.unpack_from(f"<{dimensions}Q", view, position + 4)
        kind, offset = struct.unpack_from("<IQ", view, position + 4 + 8 * dimensions)
        position += 16 + 8 * dimensions
        listed.append((name, tuple(int(n) for n in reversed(shape)), int(kind), int(offset)))
    alignment = int(metadata.get("general.alignment", 32))
    start = -(-position // alignment) * alignment
    return metadata, {name: TensorEntry(name, shape, kind, start + at) for name, shape, kind, at in listed}


def _string(view: memoryview, position: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", view, position)
    end = position + 8 + length
    return bytes(view[position + 8 : end]).decode("utf-8"), end


def _value(view: memoryview, position: int, kind: int) -> tuple[Any, int]:
    if kind == _STRING:
        return _string(view, position)
    if kind == _ARRAY:
        item_kind, count = struct.unpack_from("<IQ", view, position)
        position += 12
        if item_kind in _SCALARS:
            layout = f"<{count}{_SCALARS[item_kind]}"
            return list(struct.unpack_from(layout, view, position)), position + struct.calcsize(layout)
        items = []
        for _ in range(count):
            item, position = _value(view, position, item_kind)
            items.append(item)
        return items, position
    layout = "<" + _SCALARS[kind]
    return struct.unpack_from(layout, view, position)[0], position + struct.calcsize(layout)
