"""What a gate's report shows beside the decision: every part is optional, since a suite may lack its section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from sluice.evaluation.figures import TrainingPoint
from sluice.evaluation.items import Item
from sluice.evaluation.outcomes import Answer
from sluice.evaluation.scores import Scores
from sluice.evaluation.stopping import Stopping

if TYPE_CHECKING:
    from sluice.evaluation.calibration import JudgeCalibration
    from sluice.evaluation.safety import Finding


@dataclass(frozen=True)
class Evidence:
    """All that the report shows. `candidate`, `champion`: names for people; `dataset`: the data card's few lines;
    `changes`: what differs from the champion besides the weights, a sentence each, None when nobody looked;
    findings: of the safety probes and scans, masked, None without any."""

    application: str
    suite: str
    candidate: str
    champion: str
    candidate_scores: Scores
    champion_scores: Scores
    items: Sequence[Item] = ()
    candidate_answers: Sequence[Answer] = ()
    champion_answers: Sequence[Answer] = ()
    dataset: Mapping[str, str | int | float] = field(default_factory=dict)
    training: Sequence[TrainingPoint] = ()
    changes: Sequence[str] | None = None
    stopping: Stopping | None = None
    calibration: JudgeCalibration | None = None
    candidate_findings: Sequence[Finding] | None = None
    champion_findings: Sequence[Finding] | None = None

    @cached_property
    def champion_by_item(self) -> Mapping[str, Answer]:
        return {answer.item_id: answer for answer in self.champion_answers}

    @cached_property
    def candidate_by_item(self) -> Mapping[str, Answer]:
        return {answer.item_id: answer for answer in self.candidate_answers}

    @property
    def stopped_early(self) -> Stopping | None:
        """The account of a sequential evaluation that did not ask every item."""
        return self.stopping if self.stopping is not None and self.stopping.asked < self.stopping.total else None
