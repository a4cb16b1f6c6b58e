"""Reading DCP's files without running code that somebody put into them. Only training processes import this.

DCP's index (`.metadata`) is a pickle, and so is whatever in a state is no tensor: `pickle.load` and
`torch.load(weights_only=False)` (torch 2.13, filesystem.py and default_planner.py). Our checkpoints hold
tensors only, so an index that lists anything else is refused as a whole.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta


class SafeReader(FileSystemReader):  # type: ignore[misc]
    """Reads DCP's index, a pickle, without running code that somebody put into it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("its index is no DCP metadata")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    _KNOWN: ClassVar = {
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    } | {
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"its index asks for {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)
