"""The random generators of a process as bytes, and back. Only training processes import this."""

from __future__ import annotations

import json
import random
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor


def random_state() -> Tensor:
    """This process' generators as bytes of JSON: of Python, numpy, torch's CPU and, with one, its accelerator."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": bytes(torch.get_rng_state().numpy()).hex(),
        "cuda": bytes(torch.cuda.get_rng_state().numpy()).hex() if torch.cuda.is_available() else None,
    }
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def restore_random_state(saved: Tensor, rank: int, saved_world_size: int) -> None:
    """Go on as the process did whose state this is.

    A process beyond the saved ones (`rank` at least `saved_world_size`) gets generators seeded with the SHA-256 of
    the state, another process', and its own number.
    """
    data = bytes(saved.numpy())
    if rank >= saved_world_size:
        seed = int.from_bytes(sha256(data + str(rank).encode()).digest()[:8], "big")
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed % 2**63)
        return
    state = json.loads(data)
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_byte_tensor(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_byte_tensor(state["cuda"]))


def _byte_tensor(digits: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(digits), dtype=torch.uint8)
