"""The judge of a suite, as people look at it: who it is, and what its calibration says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sluice.components.calibrate import calibrate_step, known_calibration, read_calibration
from sluice.components.judge import judge_of
from sluice.components.task import Task
from sluice.components.workspace import open_workspace
from sluice.infra.errors import InputError
from sluice.infra.progress import Report

if TYPE_CHECKING:
    from sluice.evaluation.calibration import JudgeCalibration
    from sluice.evaluation.judge import Judge
    from sluice.evaluation.policy import JudgeFloor
    from sluice.evaluation.suite import Suite
    from sluice.infra.settings import Settings


@dataclass(frozen=True)
class JudgeView:
    """A judge, the policy's floor, its calibration (digest and content; None before there is one), and the reason in
    words for each metric that may not gate."""

    suite: Suite
    judge: Judge
    floor: JudgeFloor
    digest: str
    calibration: JudgeCalibration | None
    demoted: dict[str, str]


def view_judge(settings: Settings, suite: str) -> JudgeView:
    """The judge as it is known now; nothing is asked. Raises `InputError` for a suite without a judge."""
    from sluice.evaluation.suite import find_suite

    chosen = find_suite(suite)
    if chosen.judged is None:
        raise InputError(
            f"The suite {chosen.name!r} has no judge.", hint="Its section `judged` would name metrics (docs/judge.md)."
        )
    running = Task("calibrate", open_workspace(settings))
    return _view(running, chosen, known_calibration(running, suite=suite))


def calibrate_judge(settings: Settings, suite: str, *, whole: bool, report: Report) -> JudgeView:
    """Calibrate the judge of a suite, or find that it was. Raises as `view_judge`, and `UnavailableError`."""
    from sluice.evaluation.suite import find_suite

    view = view_judge(settings, suite)
    if not (view.suite.judged and view.suite.judged.calibration):
        raise InputError(
            f"The suite {view.suite.name!r} names no labelled items.",
            hint="judged.calibration names a JSONL file beside the suite (docs/judge.md).",
        )
    running = Task("calibrate", open_workspace(settings))
    running.report = report
    return _view(running, find_suite(suite), calibrate_step(running, suite=suite, whole=whole))


def _view(running: Task, suite: Suite, digest: str) -> JudgeView:
    from sluice.evaluation.calibration import demoted_without_calibration

    judged = suite.judged
    if judged is None:
        raise InputError(f"The suite {suite.name!r} has no judge.")
    floor = suite.policy.judge
    found = read_calibration(running.workspace, digest) if digest else None
    demoted = found.demoted(floor, judged.metrics) if found else demoted_without_calibration(judged.metrics)
    return JudgeView(suite, judge_of(running.workspace, judged), floor, digest, found, demoted)
