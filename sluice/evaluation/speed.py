"""Speed and cost of two releases, side by side: what one costs by itself says little, the machine has its moods.

Both are asked the same prompts in turn, in the same minutes, over the same connections; who is asked first changes from
prompt to prompt. Nothing comes from a cache of ours, and nothing is asked again: a request that fails has a cause.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from sluice.evaluation.outcomes import Answer, Prompt, Sampling
from sluice.evaluation.scores import Scores, column, scores_of
from sluice.evaluation.speed_metrics import SPEED_METRICS
from sluice.evaluation.suite_sections import Speed
from sluice.infra.errors import InputError, UnavailableError
from sluice.infra.progress import Report, no_report

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletionMessageParam

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
        columns.append(column(metric, {item: answer.error or measure(answer) for item, answer in answers.items()}))
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
            queue = iter(range(self.section.requests))

            async def work() -> None:
                for number in queue:
                    lap, place = divmod(number, len(self.prompts))
                    prompt = self.prompts[place]
                    name = f"{prompt.item_id}#{lap + 1}" if lap else prompt.item_id
                    self.done[name] = await self._pair(client, number, prompt)
                    count = len(self.done)
                    self.report(count, self.section.requests, f"{count} of {self.section.requests} requests to each")

            workers = [asyncio.create_task(work()) for _ in range(min(self.section.concurrency, self.section.requests))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _pair(self, client: AsyncOpenAI, number: int, prompt: Prompt) -> tuple[Answer, Answer]:
        """Both releases' answers, one after the other; the candidate is first for even numbers."""
        if number % 2 == 0:
            mine = await self._ask(client, self.models[0], prompt)
            return mine, await self._ask(client, self.models[1], prompt)
        theirs = await self._ask(client, self.models[1], prompt)
        return await self._ask(client, self.models[0], prompt), theirs

    async def _ask(self, client: AsyncOpenAI, model: str, prompt: Prompt) -> Answer:
        started = time.perf_counter()
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self._attempt(client, model, prompt, started)
        except Exception as raised:  # noqa: BLE001 - sorted into causes; what is unknown is raised again
            cause = _cause(raised, model)
        return Answer(prompt.item_id, "", None, None, None, None, time.perf_counter() - started, cause)

    async def _attempt(self, client: AsyncOpenAI, model: str, prompt: Prompt, started: float) -> Answer:
        stream = await client.chat.completions.create(
            model=model,
            messages=cast("list[ChatCompletionMessageParam]", [dict(m) for m in prompt.messages]),
            max_tokens=self.sampling.max_tokens,
            temperature=self.sampling.temperature,
            seed=self.sampling.seed,
            stream=True,
            stream_options={"include_usage": True},
        )
        first: float | None = None
        finish: str | None = None
        usage: Any = None
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices[:1]:
                if choice.delta.content and first is None:
                    first = time.perf_counter() - started
                finish = choice.finish_reason or finish
        latency = time.perf_counter() - started
        tokens = usage.completion_tokens if usage else None
        return Answer(prompt.item_id, "", finish, None, tokens, first, latency, None if finish else "unfinished")


def _cause(raised: Exception, model: str) -> str:
    """Why a request has no times. Raises what concerns every request."""
    import httpx
    import openai

    if isinstance(raised, TimeoutError | openai.APITimeoutError):
        return "timeout"
    if isinstance(raised, openai.APIStatusError):
        if raised.status_code == 404:
            raise InputError(f"The server knows no model {model!r}.") from raised
        if raised.status_code in (401, 403):
            raise UnavailableError(f"The server refuses us (HTTP {raised.status_code}).") from raised
        return f"http {raised.status_code}"
    if isinstance(raised, openai.APIConnectionError | httpx.TransportError):
        return "connection"
    if isinstance(raised, openai.APIError):
        return "server"
    raise raised
