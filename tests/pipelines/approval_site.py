"""An installation as far as approvals go: a ledger, artifacts, an MLflow in memory, and people who say something."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sluice.components.workspace import Workspace
from sluice.infra.settings import AccessSettings, MlflowSettings, ReleasePolicy, Settings
from sluice.pipelines.approvals import Decided
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.attestation import Signer
from sluice.provenance.canonical import digest_bytes
from sluice.provenance.ledger import Ledger
from sluice.provenance.releases import promote, read_state, record_approval, record_decision
from sluice.registry.versions import Version
from tests.registry.fake_versions import FakeVersions
from tests.support.directory_store import DirectoryStore

BASE, A = digest_bytes(b"base"), digest_bytes(b"a")


class ApprovalSite:
    """`home` holds everything; `mlflow` is what `registry_of` has to give. `started` are the releases asked for."""

    def __init__(
        self, home: Path, signer: Signer, mlflow: FakeVersions, *, uri: str = "http://mlflow.test", **access: Any
    ) -> None:
        self.home, self.mlflow = home, mlflow
        self.objects = DirectoryStore(home / "objects")
        settings = Settings(
            home=home,
            mlflow=MlflowSettings(tracking_uri=uri),
            access=AccessSettings(**access),
            release=ReleasePolicy(allow_override=False),
        )
        self.workspace = Workspace(settings)
        self.ledger = Ledger(self.objects, "assistant", signer)
        self.artifacts = ArtifactStore(self.objects, home / "cache")
        self.workspace.__dict__.update(objects=self.objects, artifacts=self.artifacts, ledger=self.ledger)
        self.started: list[Decided] = []

    def champion(self, release: str = BASE) -> None:
        before = read_state(self.ledger).champion()
        self.decide(release)
        record_approval(self.ledger, adapter=release, approver="setup")
        promote(self.ledger, release=release, expected_champion=before, actor="setup")

    def decide(
        self, release: str, verdict: Any = "pass", *, approvers: int = 1, valid_hours: float = 24, report: bytes = b"r"
    ) -> str:
        """The gate's decision in the ledger; the digest of its artifact, which a page shows as `release.decision`."""
        digest = digest_bytes(report)
        expires = datetime.now(UTC) + timedelta(hours=valid_hours)
        record_decision(
            self.ledger,
            adapter=release,
            verdict=verdict,
            report=digest,
            expires=expires.isoformat(),
            holdout=None,
            champion=read_state(self.ledger).champion(),
            approvers=approvers,
            actor="gate",
        )
        decided = json.dumps({"report": digest, "release": release}).encode()
        return self.artifacts.put_files({"decision.json": decided}, "decision").digest

    def candidate(self, release: str = A, verdict: Any = "pass", **decision: Any) -> Version:
        shown = self.decide(release, verdict, **decision)
        waiting = "pending" if verdict == "pass" else "blocked by gate"
        return self.mlflow.add(release, gate=verdict.upper(), approval=waiting, **{"release.decision": shown})

    def start(self, decided: Decided) -> None:
        self.started.append(decided)

    def kinds(self, release: str = A) -> list[str]:
        """What the ledger holds about a release after its decision."""
        about = [entry for entry in self.ledger.entries() if entry.body.get("adapter") == release]
        return [f"{entry.kind} by {entry.body['approver']}" for entry in about if entry.kind != "decision"]
