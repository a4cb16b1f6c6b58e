"""The scores that a judge gives: each item by itself, remembered, and patient with a judge that has a bad day."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sluice.evaluation.at_once import at_once
from sluice.evaluation.cache import Cache
from sluice.evaluation.items import Item
from sluice.evaluation.judge import Judge
from sluice.evaluation.judge_client import JudgeClient, JudgeFailure, open_client
from sluice.evaluation.judged_metrics import JUDGED, NO_ANSWER, JudgedMetric
from sluice.evaluation.judged_scores import RELEVANCY_QUESTIONS, Embedder, Sample, checked_score, ragas_score
from sluice.evaluation.outcomes import Answer
from sluice.evaluation.scores import Column, column
from sluice.infra.errors import InputError, SluiceError
from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import digest_json

__all__ = ["Embedder", "Sample", "judge_samples", "planned_requests", "samples_of"]


def samples_of(items: Iterable[Item], answers: Iterable[Answer]) -> list[Sample]:
    """The samples of a release's answers, in the items' order; an item without an answer has the cause `missing`."""
    given = {answer.item_id: answer for answer in answers}
    found = []
    for item in items:
        answer = given.get(item.id)
        failed = "missing" if answer is None else (answer.error or "").split(":", 1)[0]
        found.append(
            Sample(
                item.id,
                item.question,
                answer.answer if answer else "",
                item.contexts,
                item.reference,
                failed,
                answer is not None and answer.outcome in ("refused", "no_answer"),
            )
        )
    return found


def judge_samples(
    samples: Sequence[Sample],
    metrics: Sequence[str],
    judge: Judge,
    *,
    cache: Cache,
    embed: Embedder,
    report: Report = no_report,
) -> list[Column]:
    """One column for each of `metrics` (names that start with `judged.`), in their order.

    A score is kept under the digest of (judge, metric, the fields that the metric reads), an answer of the judge under
    that of (judge, prompt): what was judged before is not asked again, whichever release it was for, and neither is
    what a killed run had finished. An item that a metric does not apply to (no contexts, no reference) is not in its
    column. Whatever the judge does ends in a cause, never in an exception; the rest after its death has the cause
    `judge unreachable`. Raises `InputError` for a metric that is no judge's, or two samples with one id.
    """
    if unknown := [name for name in metrics if name not in JUDGED]:
        raise InputError(f"Metric {unknown[0]!r} is none that a judge gives; there are {', '.join(JUDGED)}.")
    if len({sample.id for sample in samples}) != len(samples):
        raise InputError("Two samples have the same id; a pair of scores could not be told from another.")
    run = _Run(judge, cache, embed, report)
    for name in metrics:
        run.plan(JUDGED[name], samples)
    if run.waiting:
        asyncio.run(run.judge_all())
    return [
        column(JUDGED[name].metric, run.found[name], judge=judge_of_column(judge, JUDGED[name], embed))
        for name in metrics
    ]


def planned_requests(samples: Sequence[Sample], metrics: Iterable[str], judge: Judge) -> int:
    """Requests that judging an answer to each of these samples takes, when nothing is known yet."""
    return sum(
        _requests(JUDGED[name], sample, judge)
        for name in metrics
        for sample in samples
        if all(getattr(sample, field) for field in JUDGED[name].reads if field != "answer")
    )


def judge_of_column(judge: Judge, metric: JudgedMetric, embed: Embedder) -> str:
    """Who gave a column's scores: the judge, and the embedding model where one has its part in them."""
    return digest_json([judge.digest, embed.digest]) if metric.embeds else judge.digest


@dataclass
class _Task:
    """One score to be asked for, and the samples that it is for."""

    metric: JudgedMetric
    sample: Sample
    ids: list[str]


@dataclass
class _Run:
    """One call of `judge_samples`: scores and causes found, by metric and sample, and what is still to be asked."""

    judge: Judge
    cache: Cache
    embed: Embedder
    report: Report
    found: dict[str, dict[str, float | str]] = field(default_factory=dict)
    waiting: dict[str, _Task] = field(default_factory=dict)
    total: int = 0
    done: int = 0
    failed: int = 0

    def plan(self, metric: JudgedMetric, samples: Sequence[Sample]) -> None:
        """Fill in what needs no judge, and note down the rest."""
        self.found.setdefault(metric.metric.name, {})
        for sample in samples:
            if any(not getattr(sample, name) for name in metric.reads if name != "answer"):
                continue
            self.total += 1
            known = _without_judge(metric, sample)
            key = self._key(metric, sample)
            if known is None and isinstance(score := self.cache.get(key), float | int):
                known = float(score)
            if known is not None:
                self._note(metric, sample.id, known)
            elif key in self.waiting:
                self.waiting[key].ids.append(sample.id)
            else:
                self.waiting[key] = _Task(metric, sample, [sample.id])
        self._tell()

    async def judge_all(self) -> None:
        planned = sum(_requests(task.metric, task.sample, self.judge) for task in self.waiting.values())
        async with open_client(self.judge, self.cache, planned=planned) as client:

            async def work(waiting: tuple[str, _Task]) -> None:
                key, task = waiting
                outcome = await self._judge(client, task)
                if isinstance(outcome, float):
                    self.cache.put(key, outcome)
                for item in task.ids:
                    self._note(task.metric, item, outcome)
                self._tell()

            # Twice the slots: while some embed, parse or wait before another attempt, the judge has work all the same.
            await at_once(2 * self.judge.limits.concurrency, list(self.waiting.items()), work)

    async def _judge(self, client: JudgeClient, task: _Task) -> float | str:
        """One score, or the cause why there is none."""
        try:
            value = await ragas_score(task.metric, task.sample, client, self.embed)
        except JudgeFailure as failure:
            return failure.cause
        except SluiceError:
            raise  # the cache's disk is full: that concerns every item
        except Exception as error:  # noqa: BLE001 - one item that RAGAS cannot bear must not cost the others
            return f"ragas {type(error).__name__}"
        return checked_score(task.metric, value)

    def _key(self, metric: JudgedMetric, sample: Sample) -> str:
        read = {name: getattr(sample, name) for name in metric.reads}
        judge = judge_of_column(self.judge, metric, self.embed)
        return digest_json({"judge": judge, "metric": metric.metric.name, "read": read})

    def _note(self, metric: JudgedMetric, item: str, outcome: float | str) -> None:
        self.found[metric.metric.name][item] = outcome
        self.done += 1
        self.failed += isinstance(outcome, str)

    def _tell(self) -> None:
        self.report(self.done, self.total, f"{self.done} of {self.total} scores of the judge, {self.failed} failed")


def _without_judge(metric: JudgedMetric, sample: Sample) -> float | str | None:
    """What is known without asking: a lost answer has no score, one that says nothing has what the metric says."""
    if "answer" not in metric.reads:
        return None
    if sample.failed:
        return sample.failed
    # Whether it is right to say nothing only the reference can tell.
    if not sample.answer.strip() or (sample.refused and "reference" not in metric.reads):
        return NO_ANSWER if metric.without_answer is None else metric.without_answer
    return None


def _requests(metric: JudgedMetric, sample: Sample, judge: Judge) -> int:
    planned = metric.requests(len(sample.contexts))
    return planned * RELEVANCY_QUESTIONS if metric.embeds and judge.sampling.temperature else planned
