"""What the gate's report says besides scores: names, the data card's few lines, the training curve."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sluice.components.workspace import Workspace
from sluice.provenance.canonical import short

if TYPE_CHECKING:
    from sluice.evaluation.report import ReportContext


def report_context(
    workspace: Workspace, suite: str, candidate: str, champion: str, dataset: str, training: str
) -> ReportContext:
    """The context of a gate's report, read from the artifacts it rests on."""
    from sluice.evaluation.report import ReportContext, TrainingPoint

    card = json.loads(workspace.file(dataset, "card.json"))
    account = json.loads(workspace.file(training, "training.json"))
    shown: dict[str, str | int | float] = {
        "Dataset": short(dataset),
        "Examples": f"{account['examples']} trained on, {account['steps']} steps",
        "Selected by": ", ".join(f"{count} {rule}" for rule, count in card["rules"].items()),
    }
    if card["drill"]:
        shown["Labels"] = card["drill"]
    return ReportContext(
        application=workspace.settings.application,
        suite=suite,
        candidate=f"adapter {short(candidate)}",
        champion=release_title(workspace, champion),
        dataset=shown,
        training=[TrainingPoint(point["step"], point["loss"]) for point in account["curve"]],
    )


def release_title(workspace: Workspace, release: str) -> str:
    """A release as people name it: the base model, or the adapter with its short digest."""
    kind = workspace.artifacts.manifest(release).kind
    return f"base model {short(release)}" if kind == "base-model" else f"{kind} {short(release)}"
