"""Fixtures that every room's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sluice.provenance.artifacts import ArtifactStore
from tests.support.directory_store import DirectoryStore
from tests.support.installation import Installation


# First, as pytest-xdist reads the groups in the same hook.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What shares the installation runs in one process, first; everything else stays together by file."""
    shared = [item for item in items if "installation" in getattr(item, "fixturenames", ())]
    for item in items:
        item.add_marker(pytest.mark.xdist_group("installation" if item in shared else item.path.as_posix()))
    items.sort(key=lambda item: item not in shared)


@pytest.fixture
def object_store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "objects")


@pytest.fixture
def artifacts(object_store: DirectoryStore, tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(object_store, tmp_path / "artifact-cache")


@pytest.fixture(scope="session")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """One installation with all parts, on a random llama; stopped at the end, whatever happened."""
    made = Installation(tmp_path_factory.mktemp("installation") / "home")
    try:
        yield made
    finally:
        made.run("down")


@pytest.fixture(scope="session")
def loop(installation: Installation) -> Any:
    """The result of one whole loop in the installation."""
    return installation.json("demo", "--plan", "tiny", timeout_s=420)
