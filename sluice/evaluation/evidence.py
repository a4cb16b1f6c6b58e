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
    from sluice.evaluation.safety import Finding


@dataclass(frozen=True)
class JudgedAgreement:
    """One metric of a judge against people's labels on `n` items. None where there was too little to say.

    `confusion` is people's label x judge's label -> count. `demoted` says why the metric may not gate; empty: it may.
    """

    metric: str
    title: str
    n: int
    kappa: float | None = None
    low: float | None = None
    high: float | None = None
    self_agreement: float | None = None
    position_bias: float | None = None
    length_bias: float | None = None
    valid_share: float | None = None
    confusion: Mapping[tuple[str, str], int] = field(default_factory=dict)
    demoted: str = ""


@dataclass(frozen=True)
class JudgeStanding:
    """The judge of this evaluation (model's name for people, digest of model, prompts and sampling) and how it stands
    against people, metric by metric; no `agreements` when nobody labelled anything."""

    model: str
    digest: str
    agreements: tuple[JudgedAgreement, ...] = ()


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
    judges: Sequence[JudgeStanding] = ()
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
