"""Asking a new adapter some questions before users do, so that they do not pay for what a server makes at first use."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from sluice.infra.errors import UnavailableError
from sluice.serving.vllm import VllmClient


@dataclass(frozen=True)
class WarmUp:
    """`before_s`, `after_s`: seconds to the first token of a question asked alone. `asked`, `lost`: of the questions
    asked in between, as many at once as users will; `busy_s` the median of them, whole answers."""

    before_s: float
    after_s: float
    busy_s: float
    asked: int
    lost: int

    @property
    def sentence(self) -> str:
        lost = f", {self.lost} without an answer" if self.lost else ""
        return (
            f"Warmed up with {self.asked} questions{lost}: a first token took {self.before_s:.3f} s before and "
            f"{self.after_s:.3f} s after."
        )


def first_token_s(client: VllmClient, model: str, prompt: str) -> float:
    """Seconds until one token has come. A prompt asked before is in the server's cache and says nothing."""
    begun = time.perf_counter()
    client.ask(model, [{"role": "user", "content": prompt}], max_tokens=1)
    return time.perf_counter() - begun


def warm_up(
    client: VllmClient, model: str, prompts: Sequence[str], *, before_s: float, at_once: int, max_tokens: int
) -> WarmUp:
    """Ask `at_once` questions at once, each prompt as often, then time a first token again.

    `before_s` is the first token of the adapter's very first question (`first_token_s`). Raises `UnavailableError` when
    the last question is not answered; those before may be lost, and are counted.
    """
    from concurrent.futures import ThreadPoolExecutor

    # A number before each prompt: nothing is answered from the cache of prefixes.
    questions = [f"{number}. {prompts[number % len(prompts)]}" for number in range(2, 2 + at_once * len(prompts))]

    def ask(question: str) -> float | None:
        begun = time.perf_counter()
        try:
            client.ask(model, [{"role": "user", "content": question}], max_tokens=max_tokens)
        except UnavailableError:
            return None
        return time.perf_counter() - begun

    with ThreadPoolExecutor(at_once) as pool:
        taken = sorted(seconds for seconds in pool.map(ask, questions) if seconds is not None)
    after = first_token_s(client, model, f"1. {prompts[0]}")
    busy = taken[len(taken) // 2] if taken else 0.0
    return WarmUp(before_s, after, busy, len(questions), len(questions) - len(taken))
