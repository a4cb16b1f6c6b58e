"""What one production trace says, in a form that no trace store dictates: frozen, typed, one JSON line each.

Times are whole milliseconds since the epoch (UTC): the finest that every trace store keeps, and an integer has one
JSON form only. A trace's id is its 32 hexadecimal OpenTelemetry digits; a store adds and removes its own prefix.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from sluice.infra.errors import IntegrityError
from sluice.provenance.canonical import Json, canonical_json

THUMB = "thumb"
"""Name of a score whose value is True (up) or False (down)."""
CORRECTION = "correction"
"""Name of a score whose value is the answer that should have been given."""

ScoreSource = Literal["user", "judge", "code"]


@dataclass(frozen=True)
class Message:
    """One message of a conversation, verbatim."""

    role: str
    content: str


@dataclass(frozen=True)
class Context:
    """One retrieved chunk that the prompt was built from."""

    id: str
    text: str


@dataclass(frozen=True)
class Score:
    """One revision of a judgement of a trace. Whoever changes their mind leaves two: the later one counts."""

    id: str
    name: str
    value: bool | float | str
    source: ScoreSource
    author: str
    created_ms: int
    comment: str = ""


@dataclass(frozen=True)
class TraceRecord:
    """One request of production and all that was said about it.

    `output_type` is "json" where JSON was asked for, `tools` (JSON text) the definitions of the tools that were
    offered, `tool_calls` (JSON text) the calls that came back; all three are empty without.

    `ended_ms` is None while the root span has not arrived: such a trace is half written, and everything else in it
    may be missing. Texts are empty and numbers None when the trace does not say. `release`, `adapter_digest` and
    `index_digest` are digests; `prompt_version` names the prompt; `ttft_ms` is the time to the first token.
    """

    id: str
    started_ms: int
    ended_ms: int | None
    status: Literal["ok", "error"] = "ok"
    error: str = ""
    session: str = ""
    user: str = ""
    environment: str = ""
    model: str = ""
    release: str = ""
    adapter_digest: str = ""
    index_digest: str = ""
    prompt_version: str = ""
    question: str = ""
    messages: tuple[Message, ...] = ()
    answer: str = ""
    finish_reason: str = ""
    contexts: tuple[Context, ...] = ()
    input_tokens: int | None = None
    output_tokens: int | None = None
    ttft_ms: float | None = None
    output_type: str = ""
    tools: str = ""
    tool_calls: str = ""
    scores: tuple[Score, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the root span has arrived."""
        return self.ended_ms is not None

    def to_json(self) -> Json:
        line = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("messages", "contexts", "scores"):
            line[name] = [{f.name: getattr(part, f.name) for f in fields(part)} for part in line[name]]
        return line

    @classmethod
    def from_json(cls, line: Mapping[str, Json]) -> TraceRecord:
        """The record of a parsed line. Raises TypeError or KeyError when it is not one."""
        parts: dict[str, Json] = dict(line)
        parts["messages"] = tuple(Message(**part) for part in line["messages"])
        parts["contexts"] = tuple(Context(**part) for part in line["contexts"])
        parts["scores"] = tuple(Score(**part) for part in line["scores"])
        return cls(**parts)


def valid_text(text: str) -> str:
    """`text` with each lone surrogate (half a character: UTF-8 cannot hold it) replaced by a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def latest_scores(scores: Iterable[Score], name: str) -> tuple[Score, ...]:
    """The last word of each author under `name`, oldest first. Equal times fall back to the id, so order is total."""
    last: dict[tuple[str, str], Score] = {}
    for score in sorted(scores, key=lambda s: (s.created_ms, s.id)):
        if score.name == name:
            # Dropped first, so that a changed mind moves to the time of the change.
            last.pop((score.source, score.author), None)
            last[score.source, score.author] = score
    return tuple(last.values())


def write_records(records: Iterable[TraceRecord], path: Path) -> None:
    """One canonical JSON line for each record, in the order given."""
    with path.open("wb") as stream:
        for record in records:
            stream.write(canonical_json(record.to_json()) + b"\n")


def read_records(path: Path) -> Iterator[TraceRecord]:
    """The records of a JSONL file. Raises `IntegrityError` naming the file and the line that is not a record."""
    # Split at "\n" only: str.splitlines would also cut at U+2028 and its kin inside a message.
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield TraceRecord.from_json(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise IntegrityError(f"Line {number} of {path} is not a trace record: {error}.") from error
