"""An `Embedder` for tests: hashed words as a unit vector. Deterministic, instant, and near texts share words."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import digest_json


class WordEmbedder:
    dimension = 64

    def __init__(self, name: str = "words") -> None:
        self.name = name
        self.embedded: list[str] = []

    @property
    def digest(self) -> str:
        return digest_json(self.name)

    def embed(self, texts: Sequence[str], report: Report = no_report) -> npt.NDArray[np.float32]:
        self.embedded += texts
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                vectors[row, zlib.crc32(word.encode()) % self.dimension] += 1.0
        vectors[:, 0] += 0.1  # a text without words still has a direction
        unit: npt.NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit
