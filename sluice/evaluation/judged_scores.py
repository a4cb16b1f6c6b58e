"""How a judge's answers become one score: RAGAS's metrics, with our language model and embedding model in them."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from sluice.evaluation.judge_client import JudgeClient, SampleModel
from sluice.evaluation.judged_metrics import NO_ANSWER, JudgedMetric
from sluice.evaluation.scores import NOT_FINITE

RELEVANCY_QUESTIONS = 3
"""Questions that RAGAS has made of an answer; at temperature 0 they are one."""

_ROUNDING = 1e-6


class Embedder(Protocol):
    """Texts to vectors of length 1 (`sluice.rag.embed` has one). Equal digests mean comparable vectors."""

    @property
    def digest(self) -> str:
        """Identity of the model."""

    def embed(self, texts: Sequence[str]) -> Any:
        """float32 [len(texts), dimension]."""


@dataclass(frozen=True)
class Sample:
    """One answer to be judged. `failed` is the cause why there is no answer (the serving path lost it); `refused`
    that there is one which declines, or says that it does not know."""

    id: str
    question: str
    answer: str
    contexts: tuple[str, ...] = ()
    reference: str = ""
    failed: str = ""
    refused: bool = False


async def ragas_score(metric: JudgedMetric, sample: Sample, client: JudgeClient, embed: Embedder) -> float:
    """RAGAS's score of a sample, whatever number it is. Raises `JudgeFailure`, and what RAGAS raises."""
    collections = _ragas()
    model = SampleModel(client)
    parts: dict[str, Any] = {"llm": model}
    if metric.embeds:
        parts |= {"embeddings": _Embeddings(embed), "strictness": RELEVANCY_QUESTIONS}
    given = {
        "question": ("user_input", sample.question),
        "answer": ("response", sample.answer),
        "contexts": ("retrieved_contexts", list(sample.contexts)),
        "reference": ("reference", sample.reference),
    }
    scorer = getattr(collections, metric.ragas)(**parts)
    result = await scorer.ascore(**dict(given[name] for name in metric.reads))
    return float(result.value)


def checked_score(metric: JudgedMetric, value: float) -> float | str:
    """A score as it counts, or the cause why it does not.

    RAGAS's NaN means of faithfulness that the judge found no claim in the answer. A cosine below 0 counts as 0: such
    an answer is about something else, and leaving it out would make the release look better than it is.
    """
    if math.isnan(value) and metric.without_answer is None:
        return NO_ANSWER
    if not math.isfinite(value):
        return NOT_FINITE
    lowest = -1.0 if metric.embeds else 0.0
    if not lowest - _ROUNDING <= value <= 1.0 + _ROUNDING:
        return "out of range"
    return min(max(value, 0.0), 1.0)


class _Embeddings:
    """The embedding model as RAGAS calls it."""

    def __init__(self, embed: Embedder) -> None:
        self._embed = embed

    async def aembed_text(self, text: str) -> Any:
        return (await self.aembed_texts([text]))[0]

    async def aembed_texts(self, texts: list[str]) -> Any:
        return await asyncio.to_thread(self._embed.embed, texts)


@cache
def _ragas() -> Any:
    """`ragas.metrics.collections`, which takes seconds to import, and takes our parts for its own."""
    # RAGAS reports each use to its makers unless this is set before.
    os.environ["RAGAS_DO_NOT_TRACK"] = "true"
    from ragas.embeddings.base import BaseRagasEmbedding
    from ragas.llms.base import InstructorBaseRagasLLM
    from ragas.metrics import collections

    InstructorBaseRagasLLM.register(SampleModel)
    BaseRagasEmbedding.register(_Embeddings)
    return collections
