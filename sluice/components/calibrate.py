"""The judge of a suite on items that people labelled: may its scores gate?"""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
import json
from pathlib import Path
from typing import TYPE_CHECKING

from kfp import dsl

from sluice.components.task import Task, component
from sluice.components.workspace import Workspace
from sluice.provenance.canonical import Json, canonical_json
from sluice.provenance.steps import StepOutput

if TYPE_CHECKING:
    from sluice.evaluation.calibration import JudgeCalibration
    from sluice.evaluation.suite import Suite
    from sluice.evaluation.suite_sections import Judged

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
    from sluice.evaluation.suite import find_suite

    chosen = find_suite(suite)
    judged = chosen.judged
    if judged is None or not judged.calibration:
        running.say("the suite has no judge" if judged is None else "the suite names no labelled items")
        return ""
    measuring = _Measuring(running, chosen, judged, whole)
    record = running.step(**measuring.key, function=measuring.work)
    digest = record.output.artifacts["calibration"]
    demoted = read_calibration(running.workspace, digest).demoted(chosen.policy.judge, judged.metrics)
    free = len(judged.metrics) - len(demoted)
    running.say(f"{measuring.judge.model}: {free} of {len(judged.metrics)} metrics may gate")
    return digest


def known_calibration(running: Task, *, suite: str) -> str:
    """Digest of the calibration that `calibrate_step` made, empty before it did; nothing is asked."""
    from sluice.evaluation.suite import find_suite

    chosen = find_suite(suite)
    if chosen.judged is None or not chosen.judged.calibration:
        return ""
    for whole in (True, False):
        key, _ = running.key(**_Measuring(running, chosen, chosen.judged, whole).key)
        if record := running.workspace.steps.find(key):
            return record.output.artifacts["calibration"]
    return ""


class _Measuring:
    """The judge of a suite before its labelled items; `key` is what the result depends on."""

    def __init__(self, running: Task, suite: "Suite", judged: "Judged", whole: bool) -> None:
        from sluice.components.judge import judge_of
        from sluice.evaluation.labelled import labelled_digest, read_labelled
        from sluice.rag.embed import MiniLmEmbedder

        self.running = running
        self.judged = judged
        self.judge = judge_of(running.workspace, judged)
        self.items = read_labelled(suite.file(judged.calibration))
        self.floor = None if whole else suite.policy.judge
        self.embed = MiniLmEmbedder()
        self.key: dict[str, Json] = {
            "name": "calibrate",
            "rooms": ("evaluation", "statistics", "rag.embed", "components.calibrate", "components.judge"),
            "parameters": {
                "judge": self.judge.digest,
                "metrics": list(judged.metrics),
                "labels": labelled_digest(self.items),
                "repeats": judged.repeats,
                "floor": self.floor.model_dump(mode="json") if self.floor else None,
                "embedder": self.embed.digest,
            },
            "inputs": {},
        }

    def work(self, _: Path) -> StepOutput:
        from sluice.evaluation.cache import open_cache
        from sluice.evaluation.calibration import calibrate as measure
        from sluice.evaluation.judge import reach

        reach(self.judge)
        workspace = self.running.workspace
        with open_cache(workspace.evaluation_cache) as cache:
            found = measure(
                self.items,
                self.judged.metrics,
                self.judge,
                repeats=self.judged.repeats,
                floor=self.floor,
                cache=cache,
                embed=self.embed,
                report=self.running.report,
            )
        about = {"judge": found.judge, "model": found.model, "labels": found.labels}
        files = {CALIBRATION_FILE: canonical_json(found.to_json())}
        manifest = workspace.artifacts.put_files(files, "calibration", about)
        return StepOutput({"calibration": manifest.digest}, {"metrics": len(found.metrics)})


def read_calibration(workspace: Workspace, digest: str) -> "JudgeCalibration":
    """The calibration that an artifact holds."""
    from sluice.evaluation.calibration import JudgeCalibration

    return JudgeCalibration.from_json(json.loads(workspace.file(digest, CALIBRATION_FILE)))
