"""Gate decisions as the chain keeps them: found by what people know of them, verified, and explained."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from sluice.components.workspace import Workspace
from sluice.infra.errors import InputError
from sluice.infra.object_store import ObjectMissing
from sluice.provenance.canonical import short
from sluice.provenance.releases import read_state
from sluice.provenance.step_records import StepRecord

if TYPE_CHECKING:
    from sluice.evaluation.decision import Decision
    from sluice.evaluation.explanation import Explanation, Standing

DECISION_FILE = "decision.json"


@dataclass(frozen=True)
class Found:
    """A decision with the digest of its artifact. `later`: there is a later one about the same candidate."""

    digest: str
    decision: Decision
    later: bool


def find_decision(workspace: Workspace, digest: str = "") -> Found:
    """The latest decision; with a digest (or the beginning of one) of a candidate, a report or a decision, the latest
    of those. Its signed statement is verified. Raises `InputError` when there is none, `IntegrityError` for a bad one.
    """
    from sluice.evaluation.decision import read_decision

    wanted = digest.removeprefix("sha256:")
    made = sorted((one for one in workspace.steps.records() if one.key.name == "gate"), key=lambda one: one.finished)
    chosen = [one for one in made if not wanted or any(name.startswith(wanted) for name in _names(one))]
    if not chosen:
        raise InputError(
            f"There is no gate decision{f' about {digest!r}' if digest else ' yet'}.",
            hint="`sluice run retrain` makes one; `sluice ledger` lists all decisions.",
        )
    record = chosen[-1]
    workspace.steps.verify(record)
    artifact = record.output.artifacts["decision"]
    try:
        document = json.loads(workspace.file(artifact, DECISION_FILE))
    except ObjectMissing as error:
        raise InputError(f"The decision {short(artifact)} is gone.", hint="Was it collected by `sluice gc`?") from error
    candidate = record.key.inputs["candidate"]
    same = [one for one in made if one.key.inputs["candidate"] == candidate]
    return Found(artifact, read_decision(document), same[-1] is not record)


def _names(record: StepRecord) -> list[str]:
    digests = (record.key.inputs["candidate"], *record.output.artifacts.values())
    return [digest.removeprefix("sha256:") for digest in digests]


def explanation_of(workspace: Workspace, found: Found, *, now: datetime, version: int | None = None) -> Explanation:
    """The decision in words, with what the chain holds around it: judge, saving, approvals."""
    from sluice.evaluation.calibration import JudgeCalibration
    from sluice.evaluation.explanation import explain
    from sluice.evaluation.stopping import read_stopping

    evidence = found.decision.subjects.evidence
    calibration = stopping = None
    if digest := evidence.get("calibration"):
        calibration = JudgeCalibration.from_json(json.loads(workspace.file(digest, "calibration.json")))
    if digest := evidence.get("evaluation"):
        stopping = read_stopping(workspace.folder(digest))
    standing = standing_of(workspace, found, version)
    return explain(found.decision, now=now, standing=standing, calibration=calibration, stopping=stopping)


def standing_of(workspace: Workspace, found: Found, version: int | None = None) -> Standing:
    """What became of the decision, by the ledger."""
    from sluice.evaluation.explanation import Standing

    state, candidate = read_state(workspace.ledger), found.decision.subjects.candidate
    recorded = state.decision_for(candidate)
    closed = ""
    if failure := state.failure_of(candidate):
        closed = f"the release failed ({failure.reason})"
    elif state.champion() == candidate:
        closed = "the candidate is the champion"
    elif rejection := state.rejection_of(candidate):
        closed = f"{rejection.body['approver']} rejected it"
    elif recorded is not None and recorded.verdict == "overridden":
        closed = f"{recorded.person} overrode the gate: {recorded.reason}"
    people = tuple(one.approver for one in state.approvals_for(candidate))
    return Standing(version, people, closed, found.later)
