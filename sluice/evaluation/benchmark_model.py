"""The served model as lm-evaluation-harness asks it. To be imported inside functions only: it takes seconds.

Tokenising and the reading of log-probabilities are the harness's own (`lm_eval.models.openai_completions`); sending is
ours (`Endpoint`), so that one lost request costs one item.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lm_eval.models.api_models import JsonChatStr
from lm_eval.models.openai_completions import LocalCompletionsAPI
from tokenizers import Tokenizer

from sluice.evaluation.benchmark_endpoint import Endpoint, Failure, UnreadableAnswer, finite
from sluice.provenance.canonical import Json

Told = Callable[[int, int], None]
"""`told(done, total)`: requests of the task."""

_UNLIMITED = 1 << 20
"""Tokens of context. The server refuses what is too long; the harness would cut it without a word."""


class ServedModel(LocalCompletionsAPI):  # type: ignore[misc]
    """Log-likelihoods of plain text from `/completions` (`echo`), and answers from `/chat/completions`.

    `base` is the base model's folder, with its tokenizer. `lost` has the causes of requests without an answer, by
    `request_name`.
    """

    def __init__(self, endpoint: Endpoint, base: Path, told: Told) -> None:
        super().__init__(
            base_url=endpoint.base_url, model=endpoint.model, tokenizer_backend="none", max_length=_UNLIMITED
        )
        # Not by transformers, which the harness would import for it: that takes seconds, and PyTorch.
        self.base, self.tokens = base, Tokenizer.from_file(str(base / "tokenizer.json"))
        self.endpoint, self.told = endpoint, told
        self.lost: dict[str, str] = {}

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> JsonChatStr:
        """The messages as they are: the server applies the template, as it does for users."""
        return JsonChatStr(json.dumps(chat_history, ensure_ascii=False))

    def tok_encode(self, string: str, **kwargs: Any) -> list[int]:
        ids: list[int] = self.tokens.encode(string, add_special_tokens=False).ids
        return ids

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        config = json.loads((self.base / "config.json").read_bytes())
        return int(config.get("bos_token_id") or config["eos_token_id"])

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """`requests`: ((context, continuation), tokens of the context, tokens of the continuation) each."""
        payloads = [self._create_payload([[*context, *rest]], seed=self._seed) for _, context, rest in requests]

        def read(number: int, reply: Json) -> Json:
            _, context, rest = requests[number]
            return _likelihood(reply, len(context), len(context) + len(rest))

        answers = self.endpoint.ask_all("completions", payloads, read, self._tell(len(payloads)))
        found = []
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if isinstance(answer, Failure):
                self.lost[request_name(*texts)] = answer.cause
                answer = [float("nan"), False]
            found.append((answer[0], answer[1]))
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """`requests` have `args`: the messages as JSON, and the task's `generation_kwargs`."""
        payloads = [_chat_payload(self.model, self._seed, *request.args) for request in requests]
        answers = self.endpoint.ask_all("chat/completions", payloads, _content, self._tell(len(payloads)))
        for request, answer in zip(requests, answers, strict=True):
            if isinstance(answer, Failure):
                self.lost[request_name(*request.args)] = answer.cause
        return ["" if isinstance(answer, Failure) else answer for answer in answers]

    def _tell(self, total: int) -> Callable[[int], None]:
        return lambda done: self.told(done, total)


def request_name(context: Any, rest: Any) -> str:
    """Name of a request by its arguments in the harness: context and continuation, or messages and options."""
    return json.dumps([context, rest], default=str)


def _likelihood(reply: Json, context: int, asked: int) -> Json:
    """[log-likelihood of the tokens after `context`, whether each was the most likely one]."""
    try:
        tokens = reply["choices"][0]["logprobs"]["token_logprobs"]
        # The prompt's and the one token that had to be generated: with any other number the sum is over other tokens.
        if len(tokens) != asked + 1:
            raise UnreadableAnswer("log-probabilities of other tokens")
        [(likelihood, greedy)] = LocalCompletionsAPI.parse_logprobs(reply, ctxlens=[context])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UnreadableAnswer("no log-probabilities") from error
    return [finite(likelihood), bool(greedy)]


def _chat_payload(model: str, seed: int, messages: JsonChatStr, options: Mapping[str, Any]) -> dict[str, Json]:
    until = options.get("until", [])
    return {
        "model": model,
        "messages": json.loads(messages.prompt),
        "max_tokens": int(options.get("max_gen_toks", 256)),
        "temperature": float(options.get("temperature", 0.0)),
        "stop": [until] if isinstance(until, str) else list(until),
        "seed": seed,
    }


def _content(number: int, reply: Json) -> Json:
    try:
        content = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise UnreadableAnswer("no answer in the reply") from error
    return content or ""
