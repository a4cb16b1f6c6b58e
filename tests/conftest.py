"""Fixtures that every room's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler.loadscope import LoadScopeScheduling

from sluice.provenance.artifacts import ArtifactStore
from tests.support.directory_store import DirectoryStore
from tests.support.installation import Installation

ROOT = Path(__file__).parents[1]
SHARED = "installation"


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """Tests of one file stay in one process, and so do all files that share the installation.

    pytest-xdist's own groups do nothing with pytest 9.2: it names a test by an attribute that is no longer read.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return SHARED if _shares_installation(path) else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest queue first: what shares the installation."""
    items.sort(key=lambda item: not _shares_installation(item.nodeid.partition("::")[0]))


@cache
def _shares_installation(path: str) -> bool:
    return f"{SHARED}: Installation" in (ROOT / path).read_text()


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
    return installation.json("demo", "--plan", "tiny", timeout_s=1200)
