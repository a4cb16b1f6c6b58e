"""What a gate's report shows beside the decision: every part is optional, since a suite may lack its section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from sluice.evaluation.comparison import Slices
from sluice.evaluation.figures import TrainingPoint
from sluice.evaluation.items import Item
from sluice.evaluation.outcomes import Answer
from sluice.evaluation.scores import Scores


@dataclass(frozen=True)
class Look:
    """One look of a sequential evaluation: after `items` items, metric -> (difference, low, high) as far as known."""

    items: int
    intervals: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Stopping:
    """How far a sequential evaluation went: `asked` of `total` items; requests that were not sent, judge's included."""

    asked: int
    total: int
    looks: tuple[Look, ...] = ()
    saved_requests: int = 0
    reason: str = ""

    @property
    def saved_share(self) -> float:
        """Share of the items that nobody had to answer."""
        return (self.total - self.asked) / self.total if self.total else 0.0


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
class Finding:
    """One thing that a safety probe found. `text` is masked already: the report is read by many."""

    probe: str
    release: Literal["candidate", "champion"]
    item: str
    text: str
    detail: str = ""


@dataclass(frozen=True)
class Price:
    """What the cost figures are counted in; 0: nobody gave a price."""

    per_hour: float
    currency: str


@dataclass(frozen=True)
class Evidence:
    """All that the report shows. `candidate`, `champion`: names for people; `dataset`: the data card's few lines;
    `changes`: what differs from the champion besides the weights, a sentence each, None when nobody looked;
    `findings`: None without safety probes."""

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
    findings: Sequence[Finding] | None = None
    price: Price | None = None

    @cached_property
    def champion_by_item(self) -> Mapping[str, Answer]:
        return {answer.item_id: answer for answer in self.champion_answers}

    @cached_property
    def candidate_by_item(self) -> Mapping[str, Answer]:
        return {answer.item_id: answer for answer in self.candidate_answers}

    @property
    def slices(self) -> Slices:
        """Item id -> its slices."""
        return {item.id: item.slices for item in self.items}
