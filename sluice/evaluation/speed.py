"""Speed and cost of two releases, side by side: what one costs by itself says little, the machine has its moods.

Both are asked the same prompts in turn, in the same minutes, over the same connections; who is asked first changes from
prompt to prompt. Nothing comes from a cache of ours, and nothing is asked again: a request that fails has a cause.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sluice.evaluation.answers import cause_of, stream_answer
from sluice.evaluation.at_once import at_once
from sluice.evaluation.outcomes import Answer, Prompt, Sampling
from sluice.evaluation.scores import Scores, column, scores_of
from sluice.evaluation.speed_metrics import SPEED_METRICS
from sluice.evaluation.suite_sections import Speed
from sluice.infra.errors import InputError
from sluice.infra.progress import Report, no_report

if TYPE_CHECKING:
    from openai import AsyncOpenAI

TOO_SHORT = "fewer than two tokens"
NO_USAGE = "no token counts"


@dataclass(frozen=True)
class SpeedScores:
    """Columns of both releases over the same requests. Times in seconds, cost in the currency of the section."""

    candidate: Scores
    champion: Scores


def measure_speed(
    prompts: Sequence[Prompt],
    *,
    base_url: str,
    candidate: str,
    champion: str,
    section: Speed,
    sampling: Sampling = Sampling(),
    timeout_s: float = 60.0,
    api_key: str = "unused",
    report: Report = no_report,
) -> SpeedScores:
    """Ask the models `candidate` and `champion` at `base_url` (ends in `/v1`) `section.requests` requests each.

    Fewer prompts than requests are asked again from the first on. `section.concurrency` requests are under way at any
    time, of both together; as many to each go before that are not counted. Raises `InputError` for no prompts or an
    unknown model, `UnavailableError` when the server forbids us.
    """
    if not prompts:
        raise InputError("There are 0 prompts to measure speed with.")
    run = _Run(prompts, section, (candidate, champion), sampling, timeout_s, report)
    asyncio.run(run.measure(base_url, api_key))
    mine, theirs = ({item: pair[side] for item, pair in sorted(run.done.items())} for side in (0, 1))
    return SpeedScores(speed_scores(mine, section), speed_scores(theirs, section))


def speed_scores(answers: Mapping[str, Answer], section: Speed) -> Scores:
    """The columns of timed answers by request. Cost is left out while the section has no price."""
    definitions: Mapping[str, Callable[[Answer], float | str]] = {
        "speed.ttft_s": lambda answer: answer.ttft_s if answer.ttft_s is not None else "empty answer",
        "speed.latency_s": lambda answer: answer.latency_s,
        "speed.tokens_per_s": _tokens_per_s,
        # While `concurrency` requests share the server, each holds 1/concurrency of it for its latency. So the price
        # is that of a server kept as busy as here; one that waits for requests costs more for each.
        "speed.cost_per_1000": lambda answer: (
            section.price_per_hour / 3600 * answer.latency_s / section.concurrency * 1000
        ),
    }
    columns = []
    for metric in SPEED_METRICS:
        if metric.name == "speed.cost_per_1000":
            if section.price_per_hour == 0:
                continue
            metric = replace(metric, unit=section.currency)
        measure = definitions[metric.name]
        found = {
            item: answer.error.split(":", 1)[0] if answer.error else measure(answer) for item, answer in answers.items()
        }
        columns.append(column(metric, found))
    return scores_of(columns)


def _tokens_per_s(answer: Answer) -> float | str:
    """Tokens after the first over the time after the first: the reciprocal of the mean time between two tokens."""
    if answer.completion_tokens is None:
        return NO_USAGE
    if answer.completion_tokens < 2 or answer.ttft_s is None or answer.latency_s <= answer.ttft_s:
        return TOO_SHORT
    return (answer.completion_tokens - 1) / (answer.latency_s - answer.ttft_s)


class _Run:
    """One measurement: the pairs of answers by request."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        section: Speed,
        models: tuple[str, str],
        sampling: Sampling,
        timeout_s: float,
        report: Report,
    ) -> None:
        self.prompts, self.section, self.models = prompts, section, models
        self.sampling, self.timeout_s, self.report = sampling, timeout_s, report
        self.done: dict[str, tuple[Answer, Answer]] = {}

    async def measure(self, base_url: str, api_key: str) -> None:
        from openai import AsyncOpenAI

        async with AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0, timeout=self.timeout_s) as client:
            self.report(0, self.section.requests, "warming up")
            # Prompts that are not counted later, where there are more than enough.
            early = (self.prompts[self.section.requests :] or self.prompts)[: self.section.concurrency]
            await asyncio.gather(*(self._pair(client, number, prompt) for number, prompt in enumerate(early)))

            async def work(number: int) -> None:
                lap, place = divmod(number, len(self.prompts))
                prompt = self.prompts[place]
                name = f"{prompt.item_id}#{lap + 1}" if lap else prompt.item_id
                self.done[name] = await self._pair(client, number, prompt)
                count = len(self.done)
                self.report(count, self.section.requests, f"{count} of {self.section.requests} requests to each")

            await at_once(self.section.concurrency, range(self.section.requests), work)

    async def _pair(self, client: AsyncOpenAI, number: int, prompt: Prompt) -> tuple[Answer, Answer]:
        """Both releases' answers, one after the other; the candidate is first for even numbers."""
        if number % 2 == 0:
            mine = await self._ask(client, self.models[0], prompt)
            return mine, await self._ask(client, self.models[1], prompt)
        theirs = await self._ask(client, self.models[1], prompt)
        return await self._ask(client, self.models[0], prompt), theirs

    async def _ask(self, client: AsyncOpenAI, model: str, prompt: Prompt) -> Answer:
        """One attempt: a second one would hide how long the first took."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(self.timeout_s):
                return await stream_answer(client, model, prompt, self.sampling)
        except Exception as raised:  # noqa: BLE001 - sorted into causes; what is unknown is raised again
            error, _ = cause_of(raised, model, self.timeout_s)
        return Answer(prompt.item_id, "", None, None, None, None, time.monotonic() - started, error)
