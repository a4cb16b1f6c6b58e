"""What can come back for an item of a suite, and the files that keep it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from sluice.infra.errors import InputError

Outcome = Literal["answered", "truncated", "empty", "refused", "timeout", "error"]

# Openings of refusals, after the prefix lists used to score refusal in Zou et al. 2023 (arXiv:2307.15043, appendix),
# and of plain "I do not know". Only the opening counts: an answer may say "cannot" about its subject.
_REFUSAL = re.compile(
    r"^\W*(i'm sorry|i am sorry|sorry,|i apologi[sz]e|as an ai\b|i'm just an ai|"
    r"i (can't|cannot|can not|am unable to|am not able to|do not know|don't know)\b|"
    r"(the|this) context (does not|doesn't) (contain|say|mention|provide))",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Prompt:
    """One item as it is asked: chat messages with `role` and `content`."""

    item_id: str
    messages: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Sampling:
    """How the model samples. Temperature 0 is greedy."""

    max_tokens: int = 80
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Patience:
    """Time-out of one attempt (seconds), attempts per item, pause before the second attempt (doubled each time), and
    the number of attempts in a row, over all items, without any HTTP answer after which the server counts as dead."""

    timeout_s: float = 60.0
    attempts: int = 3
    pause_s: float = 0.5
    dead_after: int = 10


@dataclass(frozen=True)
class Answer:
    """What came back for one item. Times in seconds from sending; `error` is `cause: detail`, or None."""

    item_id: str
    answer: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    ttft_s: float | None
    latency_s: float
    error: str | None = None

    @property
    def outcome(self) -> Outcome:
        """What the answer is, before anyone asks whether it is right."""
        if self.error is not None:
            return "timeout" if self.error.startswith("timeout") else "error"
        if not self.answer.strip():
            return "empty"
        if self.finish_reason == "content_filter" or _REFUSAL.match(self.answer.replace("\u2019", "'")):
            return "refused"
        return "truncated" if self.finish_reason == "length" else "answered"


class Journal:
    """Finished items, one line each, under keys that say what was asked.

    A last line torn by a kill is cut off before the next is written.
    """

    def __init__(self, path: Path) -> None:
        self.known: dict[str, Answer] = {}
        data = path.read_bytes() if path.is_file() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) != len(data):
            path.write_bytes(whole)
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
                self.known[entry["key"]] = Answer(**entry["answer"])
            except (ValueError, KeyError, TypeError):
                continue  # an unreadable line costs one question asked again, nothing else
        self._stream = path.open("a", encoding="utf-8")

    def append(self, key: str, answer: Answer) -> None:
        self._stream.write(json.dumps({"key": key, "answer": asdict(answer)}, ensure_ascii=False) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def write_answers(path: Path, answers: Iterable[Answer]) -> None:
    """Write answers as JSONL, one object a line with the fields of `Answer`."""
    path.write_text("".join(json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in answers), encoding="utf-8")


def read_answers(path: Path) -> list[Answer]:
    """Read what `write_answers` wrote. Raises `InputError` naming the line."""
    answers = []
    # Not splitlines(): an answer may hold U+2028, which JSON does not escape.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        try:
            answers.append(Answer(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise InputError(f"Line {number} of {path} is not an answer: {error}.") from error
    return answers
