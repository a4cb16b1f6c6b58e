"""The scores that a judge gives: each item by itself, remembered, and patient with a judge that has a bad day."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sluice.evaluation.cache import Cache
from sluice.evaluation.items import Item
from sluice.evaluation.judge import Judge
from sluice.evaluation.outcomes import Answer
from sluice.evaluation.scores import Column
from sluice.infra.progress import Report, no_report

if TYPE_CHECKING:
    from collections.abc import Iterable


class Embedder(Protocol):
    """Texts to vectors of length 1 (`sluice.rag.embed` has one). Equal digests mean comparable vectors."""

    @property
    def digest(self) -> str: ...

    def embed(self, texts: Sequence[str]) -> Any:
        """float32 [len(texts), dimension]."""


@dataclass(frozen=True)
class Sample:
    """One answer to be judged. `failed` is the cause why there is no answer (the serving path lost it); `refused`
    that there is one which says nothing."""

    id: str
    question: str
    answer: str
    contexts: tuple[str, ...] = ()
    reference: str = ""
    failed: str = ""
    refused: bool = False


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
                answer is not None and answer.outcome == "refused",
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
    """One column for each of `metrics` (names that start with `judged.`), in their order."""
    raise NotImplementedError
