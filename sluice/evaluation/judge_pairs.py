"""Position bias: a judge is shown the same two answers in both orders, and should prefer the same one.

Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena" (arXiv:2306.05685), section 3.3: the share
of pairs where the preferred one follows the position.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel

from sluice.evaluation.cache import Cache
from sluice.evaluation.judge import Judge
from sluice.evaluation.judge_client import JudgeClient, JudgeFailure, open_client
from sluice.evaluation.judged_scores import Sample
from sluice.evaluation.labelled import LabelledItem
from sluice.provenance.canonical import digest_json

PAIRS_OF_A_QUESTION = 3
ENOUGH = 0.8
"""Share of what was asked again that must be answered: a judge that mostly fails there would look free of faults."""

_ASKED = {
    "judged.faithfulness": "Which of the two answers keeps to the passages, and adds nothing that is not in them?",
    "judged.answer_relevancy": "Which of the two answers speaks more to the point of the question?",
    "judged.context_precision": "Which of the two lists of passages has the useful passages further ahead?",
    "judged.context_recall": "Which of the two lists of passages supports more of the reference?",
    "judged.factual_correctness": "Which of the two answers says the same facts as the reference?",
}


class Preference(BaseModel):
    """What the judge says of a pair."""

    reason: str
    better: Literal[1, 2]


@dataclass(frozen=True)
class PositionBias:
    """`share` of `pairs` (those answered in both orders) whose preferred one follows the position; None of no pair, or
    of fewer than `ENOUGH` of those asked."""

    share: float | None
    pairs: int


def labelled_pairs(items: Sequence[LabelledItem], metric: str) -> list[tuple[Sample, Sample]]:
    """A good and a bad one of the same question, at most three pairs of each question, chosen by digest."""
    pairs = []
    for question in sorted({item.sample.question for item in items}):
        rated = [item for item in items if item.sample.question == question and metric in item.labels]
        both = [(a.sample, b.sample) for a in rated for b in rated if a.labels[metric] > b.labels[metric]]
        pairs += sorted(both, key=lambda pair: digest_json([pair[0].id, pair[1].id]))[:PAIRS_OF_A_QUESTION]
    return pairs


def position_bias(pairs: Sequence[tuple[Sample, Sample]], metric: str, judge: Judge, cache: Cache) -> PositionBias:
    """Ask the judge about each pair in both orders. Pairs that it fails on are left out."""
    if not pairs:
        return PositionBias(None, 0)
    places = asyncio.run(_ask_all(pairs, metric, judge, cache))
    told = [(first, second) for first, second in places if first is not None and second is not None]
    share = sum(first == second for first, second in told) / len(told) if len(told) >= ENOUGH * len(pairs) else None
    return PositionBias(share, len(told))


async def _ask_all(
    pairs: Sequence[tuple[Sample, Sample]], metric: str, judge: Judge, cache: Cache
) -> list[tuple[int | None, int | None]]:
    """The place of the preferred one, of each pair in both orders."""
    async with open_client(judge, cache, planned=2 * len(pairs)) as client:

        async def both(pair: tuple[Sample, Sample]) -> tuple[int | None, int | None]:
            a, b = pair
            return await _better(client, metric, a, b), await _better(client, metric, b, a)

        return await asyncio.gather(*(both(pair) for pair in pairs))


async def _better(client: JudgeClient, metric: str, first: Sample, second: Sample) -> int | None:
    try:
        return (await client.ask(pair_prompt(metric, first, second), Preference)).better
    except JudgeFailure:
        return None


def pair_prompt(metric: str, first: Sample, second: Sample) -> str:
    """The two in one prompt, with what the metric reads beside them."""
    shown: dict[str, object] = {"question": first.question}
    if metric == "judged.faithfulness":
        shown["passages"] = list(dict.fromkeys((*first.contexts, *second.contexts)))
    if metric in ("judged.factual_correctness", "judged.context_recall", "judged.context_precision"):
        shown["reference"] = first.reference
    lists = metric.startswith("judged.context_")
    for number, one in enumerate((first, second), start=1):
        shown[f"passages_{number}" if lists else f"answer_{number}"] = list(one.contexts) if lists else one.answer
    schema = json.dumps(Preference.model_json_schema())
    return (
        f"{_ASKED[metric]} Their order means nothing. Give the reason in one short sentence, then the number of the "
        f"better one, as JSON of this schema: {schema}\n\ninput: {json.dumps(shown, ensure_ascii=False, indent=4)}\n"
        "Output: "
    )
