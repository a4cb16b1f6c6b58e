"""Fixtures of the provenance tests: one signing key for the session, and a ledger and step runner that use it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.attestation import Signer
from sluice.provenance.ledger import Ledger
from sluice.provenance.steps import StepRunner
from tests.support.directory_store import DirectoryStore


@pytest.fixture(scope="session")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return Signer.load_or_create(tmp_path_factory.mktemp("keys") / "signer.pem")


@pytest.fixture
def ledger(object_store: DirectoryStore, signer: Signer) -> Ledger:
    return Ledger(object_store, "faq", signer)


@pytest.fixture
def runner(object_store: DirectoryStore, artifacts: ArtifactStore, signer: Signer, tmp_path: Path) -> StepRunner:
    return StepRunner(object_store, artifacts, signer, tmp_path / "work")
