"""Safetensors files without torch: what the library checks, and a little more.

The library reads and writes the format, and refuses a header whose names, shapes and byte ranges do not fill the file
exactly. Added here: weights are floating, and the header carries no text of unknown meaning. One set of tensors has
one set of bytes: the library orders them by dtype and name, and writes a file whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sluice.infra.errors import IntegrityError

FloatArray = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_METADATA = {"format": "pt"}
"""What transformers and PEFT write, and vLLM expects."""
_LAYOUTS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""The dtypes of weights, as numpy reads their bytes; it has no bfloat16."""
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The same, as the library's writer spells them."""


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a file: dtype as the format spells it (`F32`), shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class RawTensor:
    """One tensor as its bytes lie in a file: little-endian, row by row. `data` may be a view of the file."""

    dtype: str
    shape: tuple[int, ...]
    data: Bytes

    def float32(self) -> FloatArray:
        """The values, which loses nothing."""
        return _widen(self.dtype, self.data).reshape(self.shape)


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The checked header by tensor name; no weight is read.

    Raises `IntegrityError` for what is no safetensors file, a dtype other than F32, F16 and BF16, or unknown metadata.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            views = {name: file.get_slice(name) for name in sorted(file.keys())}
            tensors = {
                name: TensorHeader(str(view.get_dtype()), tuple(view.get_shape())) for name, view in views.items()
            }
    except SafetensorError as error:
        raise IntegrityError(f"{path} is not a safetensors file: {error}.") from error
    for key, value in metadata.items():
        if _METADATA.get(key) != value:
            raise IntegrityError(f"{path} carries the metadata {key} = {value!r}; only {_METADATA} is known.")
    for name, tensor in tensors.items():
        if tensor.dtype not in _LAYOUTS:
            raise IntegrityError(f"{name} in {path} is {tensor.dtype}; weights are one of {', '.join(_LAYOUTS)}.")
    return tensors


def read_float32(path: Path) -> dict[str, FloatArray]:
    """All tensors of a small file (it is held in memory) as float32, which loses nothing. Raises as `read_header`."""
    return {name: tensor.float32() for name, tensor in open_tensors(path).items()}


def open_tensors(path: Path) -> dict[str, RawTensor]:
    """All tensors of a file in name order, read when they are used: views of the mapped file. Raises as `read_header`.

    Not through the library: for numpy it refuses bfloat16, and otherwise it reads the whole file into memory.
    """
    tensors = read_header(path)
    if not tensors:
        return {}
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        offsets = {
            name: entry["data_offsets"] for name, entry in json.loads(stream.read(size)).items() if name in tensors
        }
    data: Bytes = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + size)
    return {name: RawTensor(one.dtype, one.shape, data[slice(*offsets[name])]) for name, one in tensors.items()}


def _widen(dtype: str, data: Bytes) -> FloatArray:
    values = np.frombuffer(data, dtype=_LAYOUTS[dtype])
    if dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        values = (values.astype("<u4") << 16).view("<f4")
    return values.astype(np.float32)


def write_raw(path: Path, tensors: Mapping[str, RawTensor]) -> None:
    """Write tensors by name as they are, whatever their dtype."""
    from safetensors import TensorSpec, serialize_file

    # Kept until the file is written: the library gets addresses.
    held = {name: np.ascontiguousarray(tensor.data) for name, tensor in tensors.items()}
    specs = {
        name: TensorSpec(
            dtype=_NAMES[tensor.dtype],
            shape=tensor.shape,
            data_ptr=held[name].ctypes.data,
            data_len=held[name].nbytes,
        )
        for name, tensor in tensors.items()
    }
    serialize_file(specs, path, metadata=_METADATA)


def write_tensors(path: Path, tensors: Mapping[str, FloatArray]) -> None:
    """Write tensors by name."""
    from safetensors.numpy import save_file

    # The library writes an array's memory as it lies: rows that are not contiguous would come out wrong.
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, path, metadata=_METADATA)
