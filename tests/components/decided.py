"""A workspace on disk in which a gate decided, for tests of what is told about it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path

from sluice.components.workspace import Workspace
from sluice.evaluation.comparison import Slices, compare
from sluice.evaluation.decision import Decision, Subjects
from sluice.evaluation.gate import decide
from sluice.evaluation.policy import ChangeKind, Policy
from sluice.evaluation.scores import Scores
from sluice.infra.settings import Settings
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import canonical_json, digest_json
from sluice.provenance.releases import read_state, record_decision
from sluice.provenance.steps import StepKey, StepOutput
from tests.provenance.release_actions import BASE, HOLDOUT, make_champion
from tests.support.directory_store import DirectoryStore


def workspace_in(home: Path, objects: DirectoryStore) -> Workspace:
    """A workspace whose objects are in a folder; a base model is its champion."""
    workspace = Workspace(Settings(home=home))
    workspace.__dict__.update(objects=objects, artifacts=ArtifactStore(objects, home / "artifacts"))
    make_champion(workspace.ledger, BASE)
    return workspace


def gated(
    workspace: Workspace,
    candidate: str,
    champion_scores: Scores,
    candidate_scores: Scores,
    rules: Policy,
    *,
    slices: Slices | None = None,
    demoted: Mapping[str, str] | None = None,
    changes: Collection[ChangeKind] = (),
    evidence: Mapping[str, str] | None = None,
    now: datetime | None = None,
) -> Decision:
    """A decision as the gate's step leaves it: artifact, signed record, ledger."""
    comparison = compare(champion_scores, candidate_scores, rules, slices=slices, demoted=demoted)
    subjects = Subjects(candidate, BASE, HOLDOUT, digest_json("suite"), None, evidence or {})
    made = decide(comparison, rules, subjects, now or datetime.now(UTC), changes=changes)

    def work(_: Path) -> StepOutput:
        report = workspace.artifacts.put_files({"report.md": made.summary.encode()}, "report")
        document = canonical_json(made.with_report(report.digest).to_json())
        decision = workspace.artifacts.put_files({"decision.json": document}, "decision")
        return StepOutput({"report": report.digest, "decision": decision.digest}, {"verdict": made.verdict})

    key = StepKey("gate", digest_json("code"), {"created": made.created}, {"candidate": candidate})
    record, _ = workspace.steps.run(key, work)
    record_decision(
        workspace.ledger,
        adapter=candidate,
        verdict=made.verdict,
        report=record.output.artifacts["report"],
        expires=made.expires,
        holdout=HOLDOUT,
        champion=read_state(workspace.ledger).champion(),
        actor="gate",
        approvers=made.approvers,
    )
    return made
