"""Answers of a served model to the items of a suite: bounded, patient, and resumable item by item.

Both candidate and champion are asked through their real serving path, an OpenAI-compatible endpoint. What can happen
to an item is a value, not an exception: answered, truncated, empty, refused, timeout, error. Only what would happen to
every item (no server, no such model, no permission) stops the run; what is finished then is kept.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sluice.evaluation.outcomes import Answer, Journal, Outcome, Patience, Prompt, Sampling, read_answers, write_answers
from sluice.infra.errors import InputError, UnavailableError
from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import digest_json

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletionMessageParam

__all__ = [
    "Answer",
    "Outcome",
    "Patience",
    "Prompt",
    "Sampling",
    "generate_answers",
    "read_answers",
    "write_answers",
]

_FINISHED = {"stop", "length", "content_filter"}


def generate_answers(
    items: Sequence[Prompt],
    *,
    base_url: str,
    model: str,
    work_dir: Path,
    sampling: Sampling = Sampling(),
    concurrency: int = 32,
    patience: Patience = Patience(),
    api_key: str = "unused",
    report: Report = no_report,
) -> list[Answer]:
    """Ask `model` at `base_url` (ends in `/v1`) every item; the answers in the items' order.

    A finished item is appended to `work_dir/answers.work.jsonl` under the digest of (model, sampling, messages), so
    `model` must name one immutable release. An interrupted call, started again with the same folder, asks only what
    is missing; items that ended in an error are asked again. Raises `InputError` for no items, equal ids or an unknown
    model, `UnavailableError` when the server is dead or forbids us.
    """
    if not items:
        raise InputError("There are 0 items to ask.", hint="Does the holdout hold items, and the suite select any?")
    if len({item.item_id for item in items}) != len(items):
        raise InputError("Two items have the same id; a pair of scores could not be told from another.")
    work_dir.mkdir(parents=True, exist_ok=True)
    run = _Run(Journal(work_dir / "answers.work.jsonl"), model, sampling, patience, len(items), report)
    try:
        waiting = run.recall(items)
        if waiting:
            asyncio.run(run.ask_all(waiting, base_url, api_key, concurrency))
    finally:
        run.journal.close()
    return [run.done[item.item_id] for item in items]


@dataclass
class _Run:
    """One call of `generate_answers`: what is done, and how often in a row the server gave no sign of life."""

    journal: Journal
    model: str
    sampling: Sampling
    patience: Patience
    total: int
    report: Report
    done: dict[str, Answer] = field(default_factory=dict)
    silent: int = 0

    def key(self, prompt: Prompt) -> str:
        asked = {"model": self.model, "sampling": asdict(self.sampling), "messages": [dict(m) for m in prompt.messages]}
        return digest_json(asked)

    def recall(self, items: Iterable[Prompt]) -> list[Prompt]:
        """Take over the journal's answers; the items that are still to be asked."""
        waiting = []
        for item in items:
            known = self.journal.known.get(self.key(item))
            if known is None or known.error is not None:
                waiting.append(item)
            else:
                self.done[item.item_id] = replace(known, item_id=item.item_id)
        self._tell()
        return waiting

    async def ask_all(self, waiting: list[Prompt], base_url: str, api_key: str, concurrency: int) -> None:
        from openai import AsyncOpenAI

        queue = iter(waiting)
        async with AsyncOpenAI(
            base_url=base_url, api_key=api_key, max_retries=0, timeout=self.patience.timeout_s
        ) as client:

            async def work() -> None:
                # One iterator for all workers: the event loop runs one of them at a time.
                for prompt in queue:
                    answer = await self._ask(client, prompt)
                    self.journal.append(self.key(prompt), answer)
                    self.done[prompt.item_id] = answer
                    self._tell()

            workers = [asyncio.create_task(work()) for _ in range(min(concurrency, len(waiting)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _ask(self, client: AsyncOpenAI, prompt: Prompt) -> Answer:
        """One item, with its attempts."""
        started = time.monotonic()
        error = ""
        for attempt in range(self.patience.attempts):
            if attempt:
                await asyncio.sleep(self.patience.pause_s * 2 ** (attempt - 1))
            try:
                async with asyncio.timeout(self.patience.timeout_s):
                    return await self._attempt(client, prompt)
            except Exception as raised:  # noqa: BLE001 - sorted into causes; what is unknown is raised again
                error, again = self._cause(raised)
                if not again:
                    break
        return Answer(prompt.item_id, "", None, None, None, None, round(time.monotonic() - started, 4), error)

    async def _attempt(self, client: AsyncOpenAI, prompt: Prompt) -> Answer:
        started = time.monotonic()
        stream = await client.chat.completions.create(
            model=self.model,
            messages=cast("list[ChatCompletionMessageParam]", [dict(m) for m in prompt.messages]),
            max_tokens=self.sampling.max_tokens,
            temperature=self.sampling.temperature,
            seed=self.sampling.seed,
            stream=True,
            stream_options={"include_usage": True},
        )
        parts: list[str] = []
        first: float | None = None
        finish: str | None = None
        usage: Any = None
        async for chunk in stream:
            self.silent = 0
            usage = chunk.usage or usage
            for choice in chunk.choices[:1]:
                if choice.delta.content:
                    first = first if first is not None else time.monotonic() - started
                    parts.append(choice.delta.content)
                finish = choice.finish_reason or finish
        if finish not in _FINISHED:
            raise _Unfinished(f"unfinished: the stream ended with finish_reason {finish!r}")
        return Answer(
            prompt.item_id,
            "".join(parts),
            finish,
            usage.prompt_tokens if usage else None,
            usage.completion_tokens if usage else None,
            round(first, 4) if first is not None else None,
            round(time.monotonic() - started, 4),
        )

    def _cause(self, raised: Exception) -> tuple[str, bool]:
        """`cause: detail` of a failed attempt and whether another may help. Raises what concerns every item."""
        import httpx
        import openai

        if isinstance(raised, TimeoutError | openai.APITimeoutError):
            return f"timeout: no whole answer within {self.patience.timeout_s:g} s", True
        if isinstance(raised, openai.APIStatusError):
            self.silent = 0
            detail = " ".join(str(raised.message).split())[:200]
            if raised.status_code == 404:
                raise InputError(f"The server knows no model {self.model!r}: {detail}.") from raised
            if raised.status_code in (401, 403):
                raise UnavailableError(f"The server refuses us (HTTP {raised.status_code}): {detail}.") from raised
            return f"http {raised.status_code}: {detail}", raised.status_code in (408, 409, 429) or (
                raised.status_code >= 500
            )
        if isinstance(raised, openai.APIConnectionError | httpx.TransportError):
            self.silent += 1
            if self.silent >= self.patience.dead_after:
                raise UnavailableError(
                    f"The model server stopped answering: {self.silent} attempts in a row got no connection.",
                    hint=f"{len(self.done)} of {self.total} answers are kept; start again when the server is back.",
                ) from raised
            return f"connection: {raised or type(raised).__name__}", True
        if isinstance(raised, openai.APIError):
            return f"server: {' '.join(str(raised.message).split())[:200]}", True
        if isinstance(raised, _Unfinished):
            return str(raised), True
        raise raised

    def _tell(self) -> None:
        failed = sum(answer.error is not None for answer in self.done.values())
        self.report(len(self.done), self.total, f"{len(self.done)} of {self.total} answers, {failed} failed")


class _Unfinished(Exception):
    """The stream ended, and the answer had not."""
