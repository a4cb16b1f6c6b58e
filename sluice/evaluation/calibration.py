"""The judge is measured too: how far it agrees with people, with itself, and what it lets itself be led by.

Before its scores may gate, a judge scores answers that people have labelled. A score is a number and a label is yes or
no, so the score is cut at a threshold: chosen on one half of the items and applied to the other, and the other way
round, so that no label has a part in its own prediction.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sluice.evaluation.cache import Cache
from sluice.evaluation.calibration_figures import best_kappa, halves, length_bias, predicted_labels
from sluice.evaluation.judge import Judge
from sluice.evaluation.judge_client import BUDGET_SPENT, NEVER_ANSWERED, UNREACHABLE
from sluice.evaluation.judge_pairs import ENOUGH, labelled_pairs, position_bias
from sluice.evaluation.judged import Embedder, judge_samples
from sluice.evaluation.judged_metrics import JUDGED
from sluice.evaluation.labelled import LabelledItem, labelled_digest
from sluice.evaluation.policy import JudgeFloor
from sluice.evaluation.scores import Column
from sluice.infra.errors import InputError, UnavailableError
from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import Json, digest_json
from sluice.statistics.agreement import cohens_kappa, self_agreement

NOT_CALIBRATED = "the judge was not calibrated: the suite names no labelled items"

_PORTION = 8
_SEEDS_APART = 100
"""Between two repeats: RAGAS asks up to three times with seeds that follow each other."""


@dataclass(frozen=True)
class LabelledScore:
    """One labelled item: what people say, the judge's score (None: it gave none), and that score cut at a threshold."""

    item: str
    label: int
    score: float | None
    predicted: int | None


@dataclass(frozen=True)
class MetricCalibration:
    """What a judge's scores of one metric are worth.

    `labelled` items there are, of which `asked` were asked and `valid` got a score; `kappa` with people and its
    interval; `thresholds` of the two halves. What was not measured, because the judge was below the floor by then, is
    None: `self_agreement` (share of equal labels when asked again), `position_bias` (share of `pairs` judged by the
    order they are shown in), `length_bias` (rank correlation of score and length within equal labels).
    """

    metric: str
    judge: str
    labelled: int
    asked: int
    valid: int
    kappa: float
    kappa_low: float
    kappa_high: float
    thresholds: tuple[float, float]
    length_bias: float | None
    self_agreement: float | None = None
    position_bias: float | None = None
    pairs: int = 0
    causes: Mapping[str, int] = field(default_factory=dict)
    scores: tuple[LabelledScore, ...] = ()

    @property
    def valid_share(self) -> float:
        """Share of the items asked that got a score."""
        return self.valid / self.asked if self.asked else 0.0

    def below(self, floor: JudgeFloor) -> list[str]:
        """What keeps the metric from gating, in words; empty when nothing does."""
        unmeasured = [
            name for name in ("self_agreement", "position_bias", "length_bias") if getattr(self, name) is None
        ]
        return self.failing(floor) or [f"its {name.replace('_', ' ')} was not measured" for name in unmeasured]

    def failing(self, floor: JudgeFloor) -> list[str]:
        """What was measured and is below the floor, in words."""
        reasons = []
        if self.labelled < floor.minimum_n:
            reasons.append(f"{self.labelled} labelled items, {floor.minimum_n} are needed")
        if self.valid_share < floor.valid_share:
            most = max(self.causes, key=lambda cause: self.causes[cause], default="")
            reasons.append(
                f"the judge scored {self.valid} of {self.asked} items ({floor.valid_share:.0%} are needed)"
                + (f", mostly because: {most}" if most else "")
            )
        if self.kappa_low < floor.kappa:
            reasons.append(
                f"its agreement with people may be as low as kappa {self.kappa_low:.2f} ({floor.kappa:.2f} is needed)"
            )
        if self.self_agreement is not None and self.self_agreement < floor.self_agreement:
            reasons.append(
                f"asked again it says the same in {self.self_agreement:.0%} ({floor.self_agreement:.0%} are needed)"
            )
        if self.position_bias is not None and self.position_bias > floor.position_bias:
            reasons.append(
                f"the order decides {self.position_bias:.0%} of the pairs ({floor.position_bias:.0%} are tolerated)"
            )
        if self.length_bias is not None and abs(self.length_bias) > floor.length_bias:
            liked = "longer" if self.length_bias > 0 else "shorter"
            reasons.append(
                f"it likes {liked} answers: rank correlation {self.length_bias:+.2f} "
                f"({floor.length_bias:.2f} is tolerated)"
            )
        return reasons


@dataclass(frozen=True)
class JudgeCalibration:
    """One judge on one labelled set. `judge` and `labels` are digests, `model` the name people know the judge by."""

    judge: str
    model: str
    labels: str
    labelled_by: tuple[str, ...]
    repeats: int
    metrics: tuple[MetricCalibration, ...]

    def demoted(self, floor: JudgeFloor, metrics: Iterable[str]) -> dict[str, str]:
        """The judged ones among `metrics` that may not gate, each with the reason in words."""
        known = {one.metric: one for one in self.metrics}
        found: dict[str, str] = {}
        for name in metrics:
            if name not in JUDGED:
                continue
            reasons = known[name].below(floor) if name in known else ["no labelled items for this metric"]
            if reasons:
                found[name] = "; ".join(reasons)
        return found

    def to_json(self) -> Json:
        return asdict(self)

    @staticmethod
    def from_json(content: Any) -> JudgeCalibration:
        """What `to_json` gave. Raises `InputError` when it is not that."""
        try:
            metrics = tuple(
                MetricCalibration(
                    **{
                        **one,
                        "thresholds": tuple(one["thresholds"]),
                        "scores": tuple(LabelledScore(**score) for score in one["scores"]),
                    }
                )
                for one in content["metrics"]
            )
            return JudgeCalibration(**{**content, "labelled_by": tuple(content["labelled_by"]), "metrics": metrics})
        except (KeyError, TypeError) as error:
            raise InputError(f"This is no calibration of a judge: {error}.") from error


def demoted_without_calibration(metrics: Iterable[str]) -> dict[str, str]:
    """The judged ones among `metrics`, when no calibration says anything about the judge."""
    return {name: NOT_CALIBRATED for name in metrics if name in JUDGED}


def calibrate(
    items: Sequence[LabelledItem],
    metrics: Sequence[str],
    judge: Judge,
    *,
    repeats: int,
    floor: JudgeFloor | None,
    cache: Cache,
    embed: Embedder,
    report: Report = no_report,
) -> JudgeCalibration:
    """Measure a judge on labelled items, for each of `metrics` that has labels.

    With a `floor` a metric is measured no further once it is certain to stay below it: a judge that cannot answer is
    found out after a few items. Without, all is measured. Each of `repeats` asks with seeds of its own, so the cache
    hides nothing. Raises `UnavailableError` when the judge is gone; what it said is kept.
    """
    chosen = {
        name: tuple(item for item in items if name in item.labels)
        for name in metrics
        if any(name in item.labels for item in items)
    }
    run = _Run(judge, repeats, floor, cache, embed, report, sum(len(rated) for rated in chosen.values()))
    return JudgeCalibration(
        judge=judge.digest,
        model=judge.model,
        labels=labelled_digest(tuple(items)),
        labelled_by=tuple(sorted({item.labelled_by for item in items})),
        repeats=repeats,
        metrics=tuple(run.measure(name, rated) for name, rated in chosen.items()),
    )


@dataclass
class _Run:
    judge: Judge
    repeats: int
    floor: JudgeFloor | None
    cache: Cache
    embed: Embedder
    report: Report
    planned: int
    done: int = 0

    def measure(self, metric: str, items: tuple[LabelledItem, ...]) -> MetricCalibration:
        ordered = sorted(items, key=lambda item: digest_json(item.sample.id))
        column = self._scores(metric, ordered)
        values = column.values
        labels = {item.sample.id: item.labels[metric] for item in ordered}
        valid = {item: score for item, score in values.items() if score is not None}
        predicted, thresholds = predicted_labels(valid, labels)
        kappa = cohens_kappa([labels[item] for item in valid], [predicted[item] for item in valid])
        reads_answer = "answer" in JUDGED[metric].reads
        words = {
            one.id: len((one.answer if reads_answer else " ".join(one.contexts)).split())
            for one in (item.sample for item in ordered)
        }
        found = MetricCalibration(
            metric=metric,
            judge=column.judge or "",
            labelled=len(items),
            asked=len(values),
            valid=len(valid),
            kappa=round(kappa.value, 6),
            kappa_low=round(kappa.low, 6),
            kappa_high=round(kappa.high, 6),
            thresholds=thresholds,
            length_bias=length_bias(valid, labels, words),
            causes=_counted(column),
            scores=tuple(LabelledScore(one, labels[one], values[one], predicted.get(one)) for one in sorted(values)),
        )
        if self.floor is not None and found.failing(self.floor):
            return found
        found = replace(found, self_agreement=self._self_agreement(metric, ordered, found.scores, thresholds))
        if self.floor is not None and found.failing(self.floor):
            return found
        self._tell(f"{metric}: pairs in both orders")
        bias = position_bias(labelled_pairs(ordered, metric), metric, self.judge, self.cache)
        return replace(found, position_bias=bias.share, pairs=bias.pairs)

    def _scores(self, metric: str, items: Sequence[LabelledItem]) -> Column:
        """The judge's own scores, in portions: after each it may be certain that too few items get one, or that too
        few agree, whatever the others say."""
        portion = max(_PORTION, self.judge.limits.concurrency)
        labels = {item.sample.id: item.labels[metric] for item in items}
        values: dict[str, float | None] = {}
        causes: dict[str, str] = {}
        for start in range(0, len(items), portion):
            part = self._asked(metric, items[start : start + portion], self.judge)
            values |= part.values
            causes |= part.causes
            self._tell(f"{metric}: {len(values)} of {len(items)} labelled items, {len(causes)} without a score")
            if self.floor is not None and len(causes) > (1 - self.floor.valid_share) * len(items):
                break
            scored = {item: score for item, score in values.items() if score is not None}
            if self.floor is not None and best_kappa(scored, labels).low < self.floor.kappa:
                break
        return replace(part, values=values, causes=causes)

    def _self_agreement(
        self,
        metric: str,
        items: Sequence[LabelledItem],
        scores: Sequence[LabelledScore],
        thresholds: tuple[float, float],
    ) -> float | None:
        """Share of equal labels over all repeats; None when fewer than `ENOUGH` of the scored items got a score again
        each time."""
        given = {one.item: [one.predicted] for one in scores if one.predicted is not None}
        wanted, scored_again = len(given), 0
        half = halves({item.sample.id: item.labels[metric] for item in items})
        for repeat in range(1, self.repeats):
            sampling = replace(self.judge.sampling, seed=self.judge.sampling.seed + _SEEDS_APART * repeat)
            again = self._asked(metric, items, replace(self.judge, sampling=sampling))
            for item, score in again.values.items():
                if score is not None and item in given:
                    given[item].append(int(score >= thresholds[half[item]]))
                    scored_again += 1
            self._tell(f"{metric}: asked again, {repeat} of {self.repeats - 1}")
        if scored_again < ENOUGH * wanted * (self.repeats - 1):
            return None
        share = self_agreement(list(given.values()))
        return None if math.isnan(share) else round(share, 6)

    def _asked(self, metric: str, items: Sequence[LabelledItem], judge: Judge) -> Column:
        samples = [item.sample for item in items]
        [found] = judge_samples(samples, [metric], judge, cache=self.cache, embed=self.embed)
        causes = _counted(found)
        if UNREACHABLE in causes or (len(found.causes) == len(samples) and set(causes) <= NEVER_ANSWERED):
            told = ", ".join(f"{count} times {cause!r}" for cause, count in causes.items())
            raise UnavailableError(
                f"The judge {judge.model!r} at {judge.base_url} is gone: {told}.",
                hint="What it said is kept; calibrate again when it is back.",
            )
        self.done += len(samples)
        return found

    def _tell(self, message: str) -> None:
        # Repeats and pairs may be needless: only the first round is planned.
        self.report(min(self.done, self.planned), self.planned, message)


def _counted(found: Column) -> dict[str, int]:
    """How often each cause came; whether there was a budget to ask again says nothing of the judge."""
    return dict(sorted(Counter(cause.removesuffix(BUDGET_SPENT) for cause in found.causes.values()).items()))
