"""Answers of a served model to the items of a suite: bounded, patient, cached, and resumable item by item.

Candidate and champion are asked through their real serving path, an OpenAI-compatible endpoint: nothing enforces a
schema or a tool call that production would not enforce. What can happen to an item is a value, not an exception:
answered, truncated, empty, refused, no answer, timeout, error. Only what would happen to every item (no server, no
such model, no permission) stops the run; what is finished then is kept.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from sluice.evaluation.at_once import at_once
from sluice.evaluation.cache import Cache
from sluice.evaluation.outcomes import Answer, Outcome, Patience, Prompt, Sampling, read_answers, write_answers
from sluice.infra.errors import InputError, UnavailableError
from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import Json, digest_json

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletionMessageParam

__all__ = [
    "Answer",
    "Outcome",
    "Patience",
    "Prompt",
    "Sampling",
    "cause_of",
    "generate_answers",
    "read_answers",
    "stream_answer",
    "write_answers",
]

_FINISHED = {"stop", "length", "content_filter", "tool_calls"}


def generate_answers(
    items: Sequence[Prompt],
    *,
    base_url: str,
    model: str,
    model_digest: str,
    cache: Cache,
    sampling: Sampling = Sampling(),
    concurrency: int = 32,
    patience: Patience = Patience(),
    api_key: str = "unused",
    report: Report = no_report,
) -> list[Answer]:
    """Ask `model` at `base_url` (ends in `/v1`) every item; the answers in the items' order.

    `model_digest` is the digest of all that answers: what was asked of it once is taken from the cache, whatever name
    it is served under. Only whole answers are kept there, each as it comes, so an interrupted call, started again, asks
    what is missing; an error is asked again. Raises `InputError` for no items, equal ids or an unknown model,
    `UnavailableError` when the server is dead or forbids us.
    """
    if not items:
        raise InputError("There are 0 items to ask.", hint="Does the holdout hold items, and the suite select any?")
    if len({item.item_id for item in items}) != len(items):
        raise InputError("Two items have the same id; a pair of scores could not be told from another.")
    run = _Run(cache, model, model_digest, sampling, patience, len(items), report)
    waiting = run.recall(items)
    if waiting:
        asyncio.run(run.ask_all(waiting, base_url, api_key, concurrency))
    return [run.done[item.item_id] for item in items]


def answer_key(model_digest: str, prompt: Prompt, sampling: Sampling) -> str:
    """Digest of all that an answer depends on."""
    return digest_json(
        {
            "kind": "answer",
            "model": model_digest,
            "messages": [dict(message) for message in prompt.messages],
            "tools": list(prompt.tools),
            "sampling": asdict(sampling),
        }
    )


@dataclass
class _Run:
    """One call of `generate_answers`, and what is done of it."""

    cache: Cache
    model: str
    model_digest: str
    sampling: Sampling
    patience: Patience
    total: int
    report: Report
    done: dict[str, Answer] = field(default_factory=dict)
    recalled: int = 0

    def recall(self, items: Iterable[Prompt]) -> list[Prompt]:
        """Take over the cached answers; the items that are still to be asked."""
        waiting = []
        for item in items:
            known = self._known(item)
            if known is None:
                waiting.append(item)
            else:
                self.done[item.item_id] = known
        self.recalled = len(self.done)
        self._tell()
        return waiting

    def _known(self, prompt: Prompt) -> Answer | None:
        found = self.cache.get(answer_key(self.model_digest, prompt, self.sampling))
        try:
            return replace(Answer.from_json(found), item_id=prompt.item_id) if found is not None else None
        except (TypeError, AttributeError):
            return None  # what no longer reads as an answer is asked again

    async def ask_all(self, waiting: list[Prompt], base_url: str, api_key: str, concurrency: int) -> None:
        from openai import AsyncOpenAI

        async with AsyncOpenAI(
            base_url=base_url, api_key=api_key, max_retries=0, timeout=self.patience.timeout_s
        ) as client:

            async def work(prompt: Prompt) -> None:
                answer = await self._ask(client, prompt)
                if answer.error is None:
                    self.cache.put(answer_key(self.model_digest, prompt, self.sampling), answer.to_json())
                self.done[prompt.item_id] = answer
                self._tell()

            await at_once(concurrency, waiting, work)

    async def _ask(self, client: AsyncOpenAI, prompt: Prompt) -> Answer:
        """One item, with its attempts."""
        started = time.monotonic()
        error = ""
        for attempt in range(self.patience.attempts):
            if attempt:
                await asyncio.sleep(self.patience.pause_s * 2 ** (attempt - 1))
            try:
                async with asyncio.timeout(self.patience.timeout_s):
                    return await stream_answer(client, self.model, prompt, self.sampling)
            except Exception as raised:  # noqa: BLE001 - sorted into causes; what is unknown is raised again
                error, again = cause_of(raised, self.model, self.patience.timeout_s)
                if not again:
                    break
        if error.startswith("connection"):
            await self._require_life(client)
        return Answer(prompt.item_id, "", None, None, None, None, round(time.monotonic() - started, 4), error)

    async def _require_life(self, client: AsyncOpenAI) -> None:
        """Raise unless the server answers anything at all: one that is gone is no property of the item."""
        import openai

        try:
            await client.models.list()
        except openai.APIStatusError:
            return
        except openai.APIConnectionError as error:
            raise UnavailableError(
                f"The model server at {client.base_url} stopped answering.",
                hint=f"{len(self.done) - self._failed} of {self.total} answers are kept; start again when the server "
                "is back.",
            ) from error

    @property
    def _failed(self) -> int:
        return sum(answer.error is not None for answer in self.done.values())

    def _tell(self) -> None:
        known = f", {self.recalled} known before" if self.recalled else ""
        self.report(
            len(self.done), self.total, f"{len(self.done)} of {self.total} answers{known}, {self._failed} failed"
        )


async def stream_answer(client: AsyncOpenAI, model: str, prompt: Prompt, sampling: Sampling) -> Answer:
    """One answer, timed as it comes. Raises what `cause_of` sorts."""
    from openai import omit

    started = time.monotonic()
    stream = await client.chat.completions.create(
        model=model,
        messages=cast("list[ChatCompletionMessageParam]", [dict(m) for m in prompt.messages]),
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        seed=sampling.seed,
        stream=True,
        stream_options={"include_usage": True},
        tools=list(prompt.tools) or omit,
    )
    parts: list[str] = []
    calls: dict[int, list[str]] = {}
    first: float | None = None
    finish: str | None = None
    usage: Any = None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices[:1]:
            if choice.delta.content or choice.delta.tool_calls:
                first = first if first is not None else time.monotonic() - started
            parts.append(choice.delta.content or "")
            for piece in choice.delta.tool_calls or ():
                call = calls.setdefault(piece.index, ["", ""])
                if piece.function:
                    call[0] += piece.function.name or ""
                    call[1] += piece.function.arguments or ""
            finish = choice.finish_reason or finish
    if finish not in _FINISHED:
        raise _Unfinished(f"unfinished: the stream ended with finish_reason {finish!r}")
    return Answer(
        prompt.item_id,
        _whole("".join(parts)),
        finish,
        usage.prompt_tokens if usage else None,
        usage.completion_tokens if usage else None,
        round(first, 4) if first is not None else None,
        round(time.monotonic() - started, 4),
        tool_calls=tuple(_call(*calls[index]) for index in sorted(calls)),
    )


def cause_of(raised: Exception, model: str, timeout_s: float) -> tuple[str, bool]:
    """`cause: detail` of a failed attempt and whether another may help. Raises what concerns every item."""
    import httpx2  # what openai sends with; its errors come as they are once a stream has begun
    import openai

    if isinstance(raised, TimeoutError | openai.APITimeoutError | httpx2.TimeoutException):
        return f"timeout: no whole answer within {timeout_s:g} s", True
    if isinstance(raised, openai.APIStatusError):
        detail = " ".join(str(raised.message).split())[:200]
        if raised.status_code == 404:
            raise InputError(f"The server knows no model {model!r}: {detail}.") from raised
        if raised.status_code in (401, 403):
            raise UnavailableError(f"The server refuses us (HTTP {raised.status_code}): {detail}.") from raised
        return f"http {raised.status_code}: {detail}", raised.status_code in (408, 409, 429) or (
            raised.status_code >= 500
        )
    if isinstance(raised, openai.APIConnectionError | httpx2.TransportError):
        return f"connection: {raised or type(raised).__name__}", True
    if isinstance(raised, openai.APIError):
        return f"server: {' '.join(str(raised.message).split())[:200]}", True
    if isinstance(raised, _Unfinished):
        return str(raised), True
    if isinstance(raised, ValueError):  # an event that is no JSON: a proxy's page, half an answer
        return f"not JSON: {' '.join(str(raised).split())[:200]}", True
    raise raised


class _Unfinished(Exception):
    """The stream ended, and the answer had not."""


def _whole(text: str) -> str:
    """Text that can be written: a character whose halves (surrogates) came in two events is put together again."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _call(name: str, arguments: str) -> dict[str, Json]:
    name, arguments = _whole(name), _whole(arguments)
    try:
        read = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        read = None
    return {"name": name, "arguments": read if isinstance(read, dict) else arguments}
