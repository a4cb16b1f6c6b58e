"""The judge of a suite on items that people labelled: may its scores gate?"""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
import json
from pathlib import Path
from typing import TYPE_CHECKING

from kfp import dsl

from sluice.components.task import Task, component
from sluice.components.workspace import Workspace
from sluice.provenance.canonical import canonical_json
from sluice.provenance.steps import StepOutput

if TYPE_CHECKING:
    from sluice.evaluation.calibration import JudgeCalibration

CALIBRATION_FILE = "calibration.json"


@component
def calibrate(suite: str, calibration: dsl.Output[dsl.Artifact]) -> str:
    """Measure the judge against people, once for each labelled set. Returns the digest, empty without a judge."""
    from sluice.components.calibrate import calibrate_step
    from sluice.components.task import publish, task

    with task("calibrate") as running:
        digest = calibrate_step(running, suite=suite)
        publish(calibration, digest, kind="calibration")
    return digest


def calibrate_step(running: Task, *, suite: str, whole: bool = False) -> str:
    """Digest of the calibration of the suite's judge; empty when the suite asks for none, or names no labelled items.

    A metric that is certain to stay below the policy's floor is measured no further, unless `whole`.
    """
    from sluice.components.judge import judge_of
    from sluice.evaluation.labelled import labelled_digest, read_labelled
    from sluice.evaluation.suite import find_suite
    from sluice.rag.embed import MiniLmEmbedder

    chosen = find_suite(suite)
    judged = chosen.judged
    if judged is None or not judged.calibration:
        running.say("the suite has no judge" if judged is None else "the suite names no labelled items")
        return ""
    workspace = running.workspace
    judge = judge_of(workspace, judged)
    items = read_labelled(chosen.file(judged.calibration))
    floor = None if whole else chosen.policy.judge
    embed = MiniLmEmbedder()

    def work(_: Path) -> StepOutput:
        from sluice.evaluation.cache import open_cache
        from sluice.evaluation.calibration import calibrate as measure
        from sluice.evaluation.judge import reach

        reach(judge)
        with open_cache(workspace.evaluation_cache) as cache:
            found = measure(
                items,
                judged.metrics,
                judge,
                repeats=judged.repeats,
                floor=floor,
                cache=cache,
                embed=embed,
                report=running.report,
            )
        data = canonical_json(found.to_json())
        about = {"judge": judge.digest, "model": judge.model, "labels": found.labels}
        manifest = workspace.artifacts.put_files({CALIBRATION_FILE: data}, "calibration", about)
        return StepOutput({"calibration": manifest.digest}, {"metrics": len(found.metrics)})

    record = running.step(
        "calibrate",
        rooms=("evaluation", "statistics", "rag.embed", "components.calibrate", "components.judge"),
        parameters={
            "judge": judge.digest,
            "metrics": list(judged.metrics),
            "labels": labelled_digest(items),
            "repeats": judged.repeats,
            "floor": floor.model_dump(mode="json") if floor else None,
            "embedder": embed.digest,
        },
        inputs={},
        function=work,
    )
    digest = record.output.artifacts["calibration"]
    demoted = read_calibration(workspace, digest).demoted(chosen.policy.judge, judged.metrics)
    free = len(judged.metrics) - len(demoted)
    running.say(f"{judge.model}: {free} of {len(judged.metrics)} metrics may gate")
    return digest


def read_calibration(workspace: Workspace, digest: str) -> "JudgeCalibration":
    """The calibration that an artifact holds."""
    from sluice.evaluation.calibration import JudgeCalibration

    return JudgeCalibration.from_json(json.loads(workspace.file(digest, CALIBRATION_FILE)))
