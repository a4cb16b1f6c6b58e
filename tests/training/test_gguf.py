"""GGUF blocks against numbers worked out by hand, and files that are none."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from sluice.infra.errors import IntegrityError
from sluice.training.gguf import GgufFile


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf(tensors: dict[str, tuple[tuple[int, ...], int, bytes]], metadata: bytes = b"", keys: int = 0) -> bytes:
    """A GGUF file of version 3; shapes in row-major order."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), keys) + metadata
    data = b""
    for name, (shape, kind, raw) in tensors.items():
        dimensions = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += string(name) + struct.pack("<I", len(shape)) + dimensions + struct.pack("<IQ", kind, len(data))
        data += raw + b"\0" * (-len(raw) % 32)
    return head + b"\0" * (-len(head) % 32) + data


def test_metadata_of_every_kind_used(tmp_path: Path) -> None:
    metadata = (
        string("a.text") + struct.pack("<I", 8) + string("blå")
        + string("a.number") + struct.pack("<II", 4, 49152)
        + string("a.truth") + struct.pack("<I?", 7, True)
        + string("a.words") + struct.pack("<IIQ", 9, 8, 2) + string("x") + string("yz")
        + string("a.kinds") + struct.pack("<IIQ", 9, 5, 3) + struct.pack("<3i", 1, -2, 3)
    )  # fmt: skip
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf({}, metadata, 5))
    assert GgufFile(path).metadata == {
        "a.text": "blå",
        "a.number": 49152,
        "a.truth": True,
        "a.words": ["x", "yz"],
        "a.kinds": [1, -2, 3],
    }


def test_blocks_are_dequantised(tmp_path: Path) -> None:
    nibbles = bytes((15 - i) << 4 | i for i in range(16))
    ramp = np.concatenate([np.arange(16), np.arange(15, -1, -1)]).astype(np.float32)
    half, three = struct.pack("<e", 0.5), struct.pack("<e", -3.0)
    path = tmp_path / "t.gguf"
    path.write_bytes(
        gguf(
            {
                "f32": ((2, 3), 0, np.arange(6, dtype="<f4").tobytes()),
                "f16": ((4,), 1, np.array([1, -2, 0.5, 8], dtype="<f2").tobytes()),
                "q4_0": ((32,), 2, half + nibbles),
                "q4_1": ((2, 32), 3, (half + three + nibbles) * 2),
                "q8_0": ((32,), 8, half + np.arange(-16, 16, dtype=np.int8).tobytes()),
            }
        )
    )
    source = GgufFile(path)
    np.testing.assert_array_equal(source.read("f32"), [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(source.read("f16"), [1, -2, 0.5, 8])
    np.testing.assert_array_equal(source.read("q4_0"), 0.5 * (ramp - 8))
    np.testing.assert_array_equal(source.read("q4_1"), np.stack([0.5 * ramp - 3] * 2))
    np.testing.assert_array_equal(source.read("q8_0"), 0.5 * np.arange(-16, 16))


def test_unknown_type_cut_file_and_missing_tensor_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(gguf({"k": ((32,), 12, b"\0" * 64), "short": ((64,), 0, b"\0" * 32)}))
    source = GgufFile(path)
    with pytest.raises(IntegrityError, match=r"k .*type 12"):
        source.read("k")
    with pytest.raises(IntegrityError, match=r"short .*cut off"):
        source.read("short")
    with pytest.raises(IntegrityError, match="no tensor 'gone'"):
        source.read("gone")


@pytest.mark.parametrize("data", [b"GGML" + b"\0" * 60, b"GGUF" + struct.pack("<IQQ", 9, 0, 0), b"GGUF\3\0\0\0"])
def test_other_bytes_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="not a GGUF file"):
        GgufFile(path)
