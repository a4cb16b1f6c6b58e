"""What the gate's report shows, read from the artifacts that the decision rests on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sluice.components.evidence import Measurements
from sluice.components.workspace import Workspace
from sluice.provenance.canonical import short

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sluice.evaluation.evidence import Evidence
    from sluice.evaluation.safety import Finding
    from sluice.evaluation.scores import Scores
    from sluice.evaluation.suite import Suite


def report_evidence(
    workspace: Workspace,
    suite: Suite,
    measured: Measurements,
    *,
    candidate: str,
    champion: str,
    candidate_scores: Scores,
    champion_scores: Scores,
    prompts: str,
    dataset: str,
    training: str,
    changes: Sequence[str],
) -> Evidence:
    """The report's evidence. `prompts`, `dataset`, `training`: digests of the items asked, of the candidate's dataset
    and of the account of its training; `changes`: what differs from the champion, in words (`compare_origins`)."""
    from sluice.components.calibrate import read_calibration
    from sluice.evaluation.answers import read_answers
    from sluice.evaluation.evidence import Evidence
    from sluice.evaluation.figures import TrainingPoint
    from sluice.evaluation.items import ITEMS_FILE, read_items
    from sluice.evaluation.stopping import read_stopping

    card = json.loads(workspace.file(dataset, "card.json"))
    account = json.loads(workspace.file(training, "training.json"))
    evaluation = workspace.folder(measured.evaluation)
    answers = {side: read_answers(evaluation / side / "answers.jsonl") for side in ("candidate", "champion")}
    asked = {answer.item_id for found in answers.values() for answer in found}
    shown: dict[str, str | int | float] = {
        "Dataset": short(dataset),
        "Examples": f"{account['examples']} trained on, {account['steps']} steps",
        "Selected by": ", ".join(f"{count} {rule}" for rule, count in card["rules"].items()),
    }
    if card["drill"]:
        shown["Labels"] = card["drill"]
    return Evidence(
        application=workspace.settings.application,
        suite=suite.name,
        candidate=f"adapter {short(candidate)}",
        champion=release_title(workspace, champion),
        candidate_scores=candidate_scores,
        champion_scores=champion_scores,
        items=[item for item in read_items(workspace.folder(prompts) / ITEMS_FILE) if item.id in asked],
        candidate_answers=answers["candidate"],
        champion_answers=answers["champion"],
        dataset=shown,
        training=[TrainingPoint(point["step"], point["loss"]) for point in account["curve"]],
        changes=tuple(changes),
        stopping=read_stopping(evaluation),
        calibration=read_calibration(workspace, measured.calibration) if measured.calibration else None,
        candidate_findings=_findings(workspace, suite, measured.safety_candidate),
        champion_findings=_findings(workspace, suite, measured.safety_champion),
    )


def release_title(workspace: Workspace, release: str) -> str:
    """A release as people name it: the base model, or the adapter with its short digest."""
    kind = workspace.artifacts.manifest(release).kind
    return f"base model {short(release)}" if kind == "base-model" else f"{kind} {short(release)}"


def _findings(workspace: Workspace, suite: Suite, safety: str) -> tuple[Finding, ...] | None:
    """None for a suite that asks for no probes."""
    from sluice.evaluation.safety import FINDINGS_FILE, read_findings

    return read_findings(workspace.file(safety, FINDINGS_FILE)) if suite.safety else None
