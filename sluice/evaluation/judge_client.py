"""Requests to a judge: bounded, patient within a budget, each answer checked and remembered.

The schema goes along with every request (`response_format`), so a server that enforces it, as vLLM does, cannot answer
in prose; whatever comes is checked here all the same. RAGAS hands us its prompt and the schema of the answer; we are
its language model (`InstructorBaseRagasLLM`). Its own one (`InstructorLLM`) knows no budget, hides why a request
failed, and reports each to its makers from within the event loop.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from sluice.evaluation.cache import Cache
from sluice.evaluation.judge import Judge
from sluice.evaluation.scores import NOT_FINITE
from sluice.provenance.canonical import Json, digest_json

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletion
    from pydantic import BaseModel

    Answered = TypeVar("Answered", bound=BaseModel)

UNREACHABLE = "judge unreachable"
BUDGET_SPENT = " (retry budget spent)"
NEVER_ANSWERED = {UNREACHABLE, "connection", "http 401", "http 403", "http 404"}
"""Causes that say nothing of the judge's answers."""

_LONGEST_PAUSE_S = 60.0
_TURNED_AWAY = 5
"""Times as many attempts in a row may be told to come again as may stay without any answer."""
_BINARY = {"verdict", "attributed", "noncommittal"}
"""Fields of RAGAS's schemas that it declares as whole numbers and reads as yes or no."""


class JudgeFailure(Exception):
    """A request without a usable answer. `cause` is a few words; `again` whether another attempt may help; `wait_s` how
    long the server asks to wait."""

    def __init__(self, cause: str, *, again: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(cause)
        self.cause = cause
        self.again = again
        self.wait_s = wait_s


@dataclass
class JudgeClient:
    """All requests of one run. `retries` is what is left of the budget, `asked` the attempts sent, `recalled` the
    answers that were known."""

    client: AsyncOpenAI
    judge: Judge
    cache: Cache
    retries: int
    asked: int = 0
    recalled: int = 0
    dead: bool = False
    _silent: int = 0
    _turned_away: int = 0
    _not_before: float = 0.0
    _slots: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.judge.limits.concurrency)

    async def ask(self, prompt: str, model: type[Answered], *, nth: int = 0, verdicts: int | None = None) -> Answered:
        """The judge's answer to a prompt, as `model`. Raises `JudgeFailure`.

        `nth` tells one of several answers to the same prompt from the others (they are the same at temperature 0, and
        asked once); `verdicts` is how many an answer must hold, where the prompt gave it so many claims.
        """
        nth = nth if self.judge.sampling.temperature else 0
        schema = strict_schema(model, verdicts)
        key = digest_json({"judge": self.judge.digest, "prompt": prompt, "schema": schema, "nth": nth})
        if (known := self.cache.get(key)) is not None:
            try:
                answer = _checked(known, model, verdicts)
            except JudgeFailure:
                pass  # what is kept cannot be read: asked again, and kept anew
            else:
                self.recalled += 1
                return answer
        for attempt in range(1, self.judge.limits.attempts + 1):
            try:
                content = await self._attempt(prompt, model.__name__, schema, nth)
                answer = _checked(content, model, verdicts)
            except JudgeFailure as failure:
                if not failure.again or attempt == self.judge.limits.attempts or self.dead:
                    raise
                if self.retries <= 0:
                    raise JudgeFailure(failure.cause + BUDGET_SPENT) from failure
                self.retries -= 1
                pause = self.judge.limits.pause_s * 2 ** (attempt - 1)
                await asyncio.sleep(min(max(pause, failure.wait_s), _LONGEST_PAUSE_S))
            else:
                self.cache.put(key, content)
                return answer
        raise AssertionError("attempts is at least 1")

    async def _attempt(self, prompt: str, name: str, schema: Json, nth: int) -> Json:
        """One request: the JSON value that came back. Raises `JudgeFailure`."""
        async with self._slots:
            # Who is told to wait is told for all: the others would only be refused as well.
            if (pause := self._not_before - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            if self.dead:
                raise JudgeFailure(UNREACHABLE)
            self.asked += 1
            sampling = self.judge.sampling
            try:
                async with asyncio.timeout(self.judge.limits.timeout_s):
                    response = await self.client.chat.completions.create(
                        model=self.judge.model,
                        messages=[{"role": "user", "content": prompt}],
                        response_format={
                            "type": "json_schema",
                            "json_schema": {"name": name, "schema": schema, "strict": True},
                        },
                        max_tokens=sampling.max_tokens,
                        temperature=sampling.temperature,
                        seed=sampling.seed + nth,
                    )
            except Exception as raised:
                failure = self._failure(raised)
                if failure.wait_s:
                    self._not_before = max(self._not_before, time.monotonic() + min(failure.wait_s, _LONGEST_PAUSE_S))
                raise failure from raised
            self._silent = self._turned_away = 0
        return _content(response)

    def _failure(self, raised: Exception) -> JudgeFailure:
        import openai

        if isinstance(raised, openai.APIStatusError):
            self._silent = 0
            status = raised.status_code
            if status in (401, 403, 404):
                self.dead = True  # what would happen to every request
                return JudgeFailure(f"http {status}")
            if status == 400 and "context length" in str(raised.message).lower():
                return JudgeFailure("prompt too long")
            again = status in (408, 409, 429) or status >= 500
            self._turned_away += again
            # Each may ask for a minute's patience: one that has nothing else to say is not waited for all night.
            if self._turned_away >= _TURNED_AWAY * self._sign_of_life_within:
                self.dead = True
            return JudgeFailure(f"http {status}", again=again, wait_s=_retry_after(raised.response.headers))
        if isinstance(raised, TimeoutError | openai.APITimeoutError):
            return self._no_sign_of_life("timeout")
        if isinstance(raised, openai.APIConnectionError):
            return self._no_sign_of_life("connection")
        if isinstance(raised, openai.APIError | ValueError):  # a 200 whose body is no completion
            return JudgeFailure("not JSON", again=True)
        raise raised

    def _no_sign_of_life(self, cause: str) -> JudgeFailure:
        self._silent += 1
        if self._silent >= self._sign_of_life_within:
            self.dead = True
        return JudgeFailure(UNREACHABLE if self.dead else cause, again=True)

    @property
    def _sign_of_life_within(self) -> int:
        """Attempts. Requests in flight together fail together: a full round of them says no more than one does."""
        return max(self.judge.limits.dead_after, self.judge.limits.concurrency + 1)


@asynccontextmanager
async def open_client(judge: Judge, cache: Cache, *, planned: int) -> AsyncIterator[JudgeClient]:
    """A client for a run of so many `planned` requests, of which the retry budget is a share."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(
        base_url=judge.base_url, api_key=judge.api_key, max_retries=0, timeout=judge.limits.timeout_s
    ) as client:
        yield JudgeClient(client, judge, cache, math.ceil(planned * judge.limits.retry_budget))


class SampleModel:
    """The language model that RAGAS asks while it scores one sample."""

    def __init__(self, client: JudgeClient) -> None:
        self._client = client
        self._times: dict[str, int] = {}
        self._claims: int | None = None

    def generate(self, prompt: str, response_model: type[Answered]) -> Answered:
        raise NotImplementedError("RAGAS's collections ask through agenerate")

    async def agenerate(self, prompt: str, response_model: type[Answered]) -> Answered:
        nth = self._times[prompt] = self._times.get(prompt, -1) + 1
        verdicts, self._claims = self._claims, None
        answer = await self._client.ask(prompt, response_model, nth=nth, verdicts=verdicts)
        # RAGAS has an answer taken apart into claims, then asks for a verdict on each. It does not count them: a judge
        # that leaves out the claims it doubts would be believed.
        for name in ("claims", "statements"):
            found = getattr(answer, name, None)
            if isinstance(found, list) and all(isinstance(one, str) for one in found):
                self._claims = len(found)
        return answer


@cache
def strict_schema(model: type[BaseModel], verdicts: int | None = None) -> Json:
    """The JSON schema of an answer as servers enforce it: nothing beside the fields, yes or no where that is meant
    (RAGAS's schemas allow any whole number there), and as many `verdicts` as there are claims.
    Shared by all requests: not to be changed."""
    schema = model.model_json_schema()
    for part in (schema, *schema.get("$defs", {}).values()):
        part["additionalProperties"] = False
        part["required"] = list(part["properties"])
        for name in _BINARY & set(part["properties"]):
            part["properties"][name]["enum"] = [0, 1]
    if verdicts is not None:
        for field in schema["properties"].values():
            field |= {"minItems": verdicts, "maxItems": verdicts}
    return schema


def _content(response: ChatCompletion) -> Json:
    """The JSON value in a completion. Raises `JudgeFailure`."""
    choices = getattr(response, "choices", None)
    if not choices:
        raise JudgeFailure("not JSON", again=True)
    choice = choices[0]
    if choice.finish_reason == "length":
        raise JudgeFailure("truncated")  # and would be again
    if choice.finish_reason == "content_filter" or choice.message.refusal:
        raise JudgeFailure("judge refused")
    try:
        return json.loads(choice.message.content or "", parse_constant=_not_finite)
    except (ValueError, RecursionError) as error:
        raise JudgeFailure("not JSON", again=True) from error


def _not_finite(constant: str) -> Any:
    raise JudgeFailure(NOT_FINITE, again=True)


def _checked(content: Json, model: type[Answered], verdicts: int | None) -> Answered:
    from pydantic import ValidationError

    try:
        answer = model.model_validate(content)
    except ValidationError as error:
        raise JudgeFailure("schema", again=True) from error
    given = [answer, *(one for value in vars(answer).values() if isinstance(value, list) for one in value)]
    for part in given:
        if any(getattr(part, name, 0) not in (0, 1) for name in _BINARY):
            raise JudgeFailure("out of range", again=True)
    if verdicts is not None and len(given) - 1 != verdicts:
        raise JudgeFailure("verdicts missing", again=True)
    return answer


def _retry_after(headers: Any) -> float:
    """Seconds of a Retry-After header; 0 without one, or with a date (which no inference server sends)."""
    try:
        return max(0.0, float(headers.get("retry-after", 0)))
    except ValueError:
        return 0.0
