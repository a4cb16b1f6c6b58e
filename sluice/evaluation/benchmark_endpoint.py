"""Requests of a benchmark to the served model: bounded, patient, and never asked twice.

lm-evaluation-harness gives up a whole task when one request fails three times. Here what happens to a request is a
value, so that it concerns its own item alone; only what would happen to every item stops the run.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from sluice.evaluation.at_once import at_once
from sluice.evaluation.cache import Cache
from sluice.evaluation.outcomes import Patience
from sluice.infra.errors import InputError, UnavailableError
from sluice.provenance.canonical import Json, digest_json

if TYPE_CHECKING:
    import httpx

_AGAIN = {408, 409, 429}


@dataclass(frozen=True)
class Failure:
    """Why a request has no answer, in the short words that become the item's cause."""

    cause: str


class UnreadableAnswer(Exception):
    """The server answered with something else than what was asked for; the message is the cause."""


@dataclass
class Endpoint:
    """An OpenAI-compatible server (`base_url` ends in `/v1`) and the one model that it is asked for.

    `model_digest` is the digest of all that answers: what it answered once is taken from the cache, whatever name the
    model is served under. Failures are asked again by the next call.
    """

    base_url: str
    model: str
    model_digest: str
    cache: Cache
    concurrency: int = 8
    patience: Patience = field(default_factory=Patience)
    api_key: str = "unused"
    _answered: float = field(default=0.0, init=False)

    def ask_all(
        self,
        path: str,
        payloads: Sequence[Mapping[str, Json]],
        read: Callable[[int, Json], Json],
        told: Callable[[int], None],
    ) -> list[Json | Failure]:
        """Answers to `payloads`, posted to `path` (such as `completions`), in their order.

        `read(number, reply)` takes what is needed out of a reply, and raises `UnreadableAnswer` when it is not there.
        `told(done)` hears how many are done. Raises `InputError` when the server does not know the model,
        `UnavailableError` when it is dead, hangs or refuses us; what is finished then is kept.
        """
        keys = [self._key(path, payload) for payload in payloads]
        found: list[Json | Failure | None] = [self.cache.get(key) for key in keys]
        waiting = [number for number, one in enumerate(found) if one is None]

        async def ask() -> None:
            import httpx

            headers = {"Authorization": f"Bearer {self.api_key}"}
            async with httpx.AsyncClient(
                base_url=self.base_url, headers=headers, timeout=self.patience.timeout_s, trust_env=False
            ) as client:

                async def work(number: int) -> None:
                    answer = await self._ask(client, path, payloads[number], partial(read, number))
                    if not isinstance(answer, Failure):
                        self.cache.put(keys[number], answer)
                    found[number] = answer
                    told(sum(one is not None for one in found))

                await at_once(self.concurrency, waiting, work)

        told(len(found) - len(waiting))
        if waiting:
            asyncio.run(ask())
        return [one if one is not None else Failure("missing") for one in found]

    def _key(self, path: str, payload: Mapping[str, Json]) -> str:
        asked = {name: value for name, value in payload.items() if name != "model"}
        return digest_json({"kind": f"benchmark {path}", "model": self.model_digest, "asked": asked})

    async def _ask(
        self, client: httpx.AsyncClient, path: str, payload: Mapping[str, Json], read: Callable[[Json], Json]
    ) -> Json | Failure:
        """One request, with its attempts."""
        import httpx

        started, cause = time.monotonic(), ""
        for attempt in range(self.patience.attempts):
            if attempt:
                await asyncio.sleep(self.patience.pause_s * 2 ** (attempt - 1))
            try:
                async with asyncio.timeout(self.patience.timeout_s):
                    reply = await client.post(path, json=payload)
                self._answered = time.monotonic()
                if reply.is_success:
                    return read(reply.json())
            except (TimeoutError, httpx.TimeoutException):
                cause = "timeout"
            except httpx.TransportError:
                cause = "connection"
            except UnreadableAnswer as unreadable:
                cause = str(unreadable)
            except ValueError:
                cause = "not JSON"
            else:
                cause = f"http {reply.status_code}"
                self._require_welcome(reply)
                if reply.status_code < 500 and reply.status_code not in _AGAIN:
                    break
        if self._answered < started:
            await self._require_life(client, path, payload)
        return Failure(cause)

    def _require_welcome(self, reply: httpx.Response) -> None:
        """Raise for an answer that every other request would get as well."""
        detail = " ".join(reply.text.split())[:200]
        if reply.status_code == 404:
            raise InputError(f"The server at {self.base_url} knows no model {self.model!r}: {detail}")
        if reply.status_code in (401, 403):
            raise UnavailableError(f"The server at {self.base_url} refuses us (HTTP {reply.status_code}): {detail}")

    async def _require_life(self, client: httpx.AsyncClient, path: str, payload: Mapping[str, Json]) -> None:
        """Nothing was answered since this request was sent. Raise unless the smallest request gets an answer: a server
        that is gone, or hangs, is no property of the item."""
        import httpx

        small = {"messages": [{"role": "user", "content": "a"}]} if "messages" in payload else {"prompt": "a"}
        try:
            async with asyncio.timeout(self.patience.timeout_s):
                await client.post(path, json={"model": self.model, "max_tokens": 1, **small})
        except (TimeoutError, httpx.TransportError) as error:
            raise UnavailableError(
                f"The model server at {self.base_url} stopped answering.",
                hint="Finished requests are kept; start again when the server is back.",
            ) from error
        self._answered = time.monotonic()


def finite(value: object) -> float:
    """A log-probability as it must be. Raises `UnreadableAnswer`."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UnreadableAnswer("not a finite number")
    return float(value)
