"""The installation that tests of approvals share."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice.pipelines import approvals
from sluice.provenance.attestation import Signer
from tests.pipelines.approval_site import ApprovalSite
from tests.registry.fake_versions import FakeVersions


@pytest.fixture(scope="session")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return Signer.load_or_create(tmp_path_factory.mktemp("keys") / "signer.pem")


@pytest.fixture
def site(tmp_path: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch) -> ApprovalSite:
    mlflow = FakeVersions()
    monkeypatch.setattr(approvals, "registry_of", lambda _: mlflow)
    monkeypatch.setattr("sluice.registry.mlflow_registry.MlflowRegistry", lambda _: mlflow)
    monkeypatch.setattr(approvals, "SETTLE_S", 0.0)
    return ApprovalSite(tmp_path / "home", signer, mlflow)
