"""What can come back for an item of a suite, and the files that keep it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json

Outcome = Literal["answered", "truncated", "empty", "refused", "no_answer", "timeout", "error"]

# Only the opening counts: an answer may say "cannot" or "not mentioned" about its subject.
_SORRY = r"(i'm sorry|i am sorry|sorry|unfortunately|i apologi[sz]e|my apologies)\b[^.!?\n]{0,40}?[,.;:]?\s*(but\s+)?"
_SOURCE = r"(the|this|that|your|any)\s+((given|provided|above)\s+)?(contexts?|passages?|documents?|information|text)\b"
_CANNOT = r"(i|we) (can't|cannot|can not|could not|couldn't|am unable to|am not able to)"
# "I do not know" and "the context does not say": honest where the answer is not there, and so told apart from declining
# to answer (as the unanswerable questions of SQuAD 2.0, Rajpurkar et al. 2018, arXiv:1806.03822).
_NO_ANSWER = re.compile(
    rf"^\W*({_SORRY})?((based on|according to|from|in) {_SOURCE},?\s*)?("
    + "|".join(
        (
            r"(i|we) (do not|don't) know\b",
            r"(i|we) (do not|don't) have\b[^.\n]{0,40}\binformation\b",
            r"(i|we) have no (information|idea)\b",
            rf"{_CANNOT} (find|determine|tell)\b",
            rf"{_CANNOT} answer\b[^.\n]*\b(from|based on|using|with) {_SOURCE}",
            rf"{_SOURCE} (does not|doesn't|do not|don't) (contain|say|mention|provide|state|specify|include|answer)\b",
            r"there is (no|not enough|insufficient) (information|mention|answer)\b",
            r"(it|this|that) is(n't| not) (mentioned|stated|specified|given|provided)\b",
            r"(no answer|unanswerable|unknown|not (mentioned|stated|specified|provided) in)\b",
        )
    )
    + ")",
    re.IGNORECASE,
)
# Openings of refusals, after the prefix lists used to score refusal in Zou et al. 2023 (arXiv:2307.15043, appendix).
_REFUSAL = re.compile(
    r"^\W*(i'm sorry|i am sorry|sorry,|i apologi[sz]e|my apologies|as an ai\b|i'm just an ai|"
    r"i (can't|cannot|can not|won't|will not|must decline|am unable to|am not able to)\b|"
    r"it is(n't| not) (appropriate|ethical|legal)\b)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Prompt:
    """One item as it is asked: chat messages, and OpenAI definitions of the tools that the model is offered."""

    item_id: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Json] = ()


@dataclass(frozen=True)
class Sampling:
    """How the model samples. Temperature 0 is greedy."""

    max_tokens: int = 80
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Patience:
    """Time-out of one attempt (seconds), attempts per item, pause before the second attempt (doubled each time)."""

    timeout_s: float = 60.0
    attempts: int = 3
    pause_s: float = 0.5


@dataclass(frozen=True)
class Answer:
    """What came back for one item. Times in seconds from sending; `error` is `cause: detail`, or None.

    `tool_calls`: `{"name": text, "arguments": object}` each, in the model's order; arguments that are no JSON object
    stay the text that the model wrote.
    """

    item_id: str
    answer: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    ttft_s: float | None
    latency_s: float
    error: str | None = None
    tool_calls: tuple[Mapping[str, Json], ...] = ()

    @property
    def outcome(self) -> Outcome:
        """What the answer is, before anyone asks whether it is right."""
        if self.error is not None:
            return "timeout" if self.error.startswith("timeout") else "error"
        if self.finish_reason == "content_filter":
            return "refused"
        if not self.answer.strip() and not self.tool_calls:
            return "empty"
        opening = self.answer.replace("\u2019", "'")
        if _NO_ANSWER.match(opening):
            return "no_answer"
        if _REFUSAL.match(opening):
            return "refused"
        return "truncated" if self.finish_reason == "length" else "answered"

    def to_json(self) -> dict[str, Json]:
        return {**asdict(self), "tool_calls": [dict(call) for call in self.tool_calls]}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Answer:
        """Raises `TypeError` for what is no answer."""
        return cls(**{**row, "tool_calls": tuple(row.get("tool_calls", ()))})


def write_answers(path: Path, answers: Iterable[Answer]) -> None:
    """Write answers as JSONL, one object a line with the fields of `Answer`."""
    path.write_text("".join(json.dumps(a.to_json(), ensure_ascii=False) + "\n" for a in answers), encoding="utf-8")


def read_answers(path: Path) -> list[Answer]:
    """Read what `write_answers` wrote. Raises `InputError` naming the line."""
    answers = []
    # Not splitlines(): an answer may hold U+2028, which JSON does not escape.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        try:
            answers.append(Answer.from_json(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise InputError(f"Line {number} of {path} is not an answer: {error}.") from error
    return answers
