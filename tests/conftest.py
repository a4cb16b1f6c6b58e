"""Fixtures that every room's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice.provenance.artifacts import ArtifactStore
from tests.support.directory_store import DirectoryStore


@pytest.fixture
def object_store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "objects")


@pytest.fixture
def artifacts(object_store: DirectoryStore, tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(object_store, tmp_path / "artifact-cache")
