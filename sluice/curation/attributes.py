"""The attributes of a chat span: OpenTelemetry's gen_ai conventions, and `sluice.*` for what they have no name for.

Written by the emission, read by every trace store. Source of the gen_ai names and of the shape of messages (`parts`):
opentelemetry.io/docs/specs/semconv/gen-ai. Structured values travel as JSON text, and some stores hand them back
parsed, so reading accepts both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Literal

from sluice.curation.records import Context, Message, Score, TraceRecord, valid_text
from sluice.provenance.canonical import Json

OPERATION = "gen_ai.operation.name"
CHAT = "chat"
REQUEST_MODEL = "gen_ai.request.model"
RESPONSE_MODEL = "gen_ai.response.model"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
INPUT_MESSAGES = "gen_ai.input.messages"
OUTPUT_MESSAGES = "gen_ai.output.messages"
OUTPUT_TYPE = "gen_ai.output.type"
TOOLS = "gen_ai.tool.definitions"
SESSION = "session.id"
USER = "user.id"
RELEASE = "sluice.release"
ADAPTER = "sluice.adapter_digest"
INDEX = "sluice.index_digest"
PROMPT_VERSION = "sluice.prompt_version"
CONTEXTS = "sluice.contexts"
TTFT_MS = "sluice.ttft_ms"
ENVIRONMENT = "sluice.environment"
# An object, not bare text: a store that parses JSON text would turn the question "42" into a number.
REQUEST = "sluice.request"
ERROR = "error.type"
ERROR_MESSAGE = "error.message"


def format_messages(
    messages: Sequence[Message], finish_reason: str = "", tool_calls: Sequence[Mapping[str, Json]] = ()
) -> str:
    """Messages as the conventions want them: role and text parts; `finish_reason` on each where one is given.
    `tool_calls` (`name` and `arguments` each) are further parts of the last one."""
    formatted = []
    for message in messages:
        entry: dict[str, Json] = {
            "role": message.role,
            "parts": [{"type": "text", "content": message.content}],
        }
        if finish_reason:
            entry["finish_reason"] = finish_reason
        formatted.append(entry)
    if formatted:
        calls = [{"type": "tool_call", "name": call["name"], "arguments": call["arguments"]} for call in tool_calls]
        formatted[-1]["parts"] += calls
    return json.dumps(formatted)


def format_contexts(contexts: Sequence[Context]) -> str:
    """Retrieved chunks as a JSON list of id and text, best first."""
    return json.dumps([{"id": context.id, "text": context.text} for context in contexts])


def format_request(question: str) -> str:
    """What the user asked, before a prompt was made of it."""
    return json.dumps({"question": question})


def parse_messages(value: Json) -> tuple[Message, ...]:
    """The messages of an attribute; parts that are not text are left out, what is no list of messages is empty."""
    parsed = _parsed(value)
    if not isinstance(parsed, list):
        return ()
    messages = []
    for entry in parsed:
        if isinstance(entry, Mapping) and "role" in entry:
            messages.append(Message(_text(entry["role"]), _message_text(entry)))
    return tuple(messages)


def record_of_span(
    trace_id: str,
    started_ms: int,
    ended_ms: int,
    status: Literal["ok", "error"],
    attributes: Mapping[str, Json],
    scores: tuple[Score, ...],
) -> TraceRecord:
    """The record that a finished root span and its scores tell."""
    messages = parse_messages(attributes.get(INPUT_MESSAGES))
    outputs = _parsed(attributes.get(OUTPUT_MESSAGES))
    answers = parse_messages(outputs)
    reasons = [e.get("finish_reason") for e in outputs if isinstance(e, Mapping)] if isinstance(outputs, list) else []
    request = _parsed(attributes.get(REQUEST))
    if isinstance(request, Mapping):
        question = _text(request.get("question"))
    else:
        # Traces of another emitter: the user's last message is the nearest thing to a question.
        question = next((m.content for m in reversed(messages) if m.role == "user"), "")
    contexts = _parsed(attributes.get(CONTEXTS))
    return TraceRecord(
        id=trace_id,
        started_ms=started_ms,
        ended_ms=ended_ms,
        status=status,
        error=_text(attributes.get(ERROR_MESSAGE) or attributes.get(ERROR)),
        session=_text(attributes.get(SESSION)),
        user=_text(attributes.get(USER)),
        environment=_text(attributes.get(ENVIRONMENT)),
        model=_text(attributes.get(RESPONSE_MODEL) or attributes.get(REQUEST_MODEL)),
        release=_text(attributes.get(RELEASE)),
        adapter_digest=_text(attributes.get(ADAPTER)),
        index_digest=_text(attributes.get(INDEX)),
        prompt_version=_text(attributes.get(PROMPT_VERSION)),
        question=question,
        messages=messages,
        answer=answers[-1].content if answers else "",
        finish_reason=_text(reasons[-1]) if reasons else "",
        contexts=tuple(
            Context(_text(c.get("id")), _text(c.get("text")))
            for c in (contexts if isinstance(contexts, list) else [])
            if isinstance(c, Mapping)
        ),
        input_tokens=_whole(attributes.get(INPUT_TOKENS)),
        output_tokens=_whole(attributes.get(OUTPUT_TOKENS)),
        ttft_ms=_number(attributes.get(TTFT_MS)),
        output_type=_text(attributes.get(OUTPUT_TYPE)),
        tools=_text(attributes.get(TOOLS)),
        tool_calls=_tool_calls(outputs),
        scores=tuple(sorted(scores, key=lambda s: (s.created_ms, s.id))),
    )


def _message_text(entry: Mapping[str, Json]) -> str:
    parts = entry.get("parts", entry.get("content", ""))
    if not isinstance(parts, list):
        return _text(parts)
    texts = []
    for part in parts:
        if isinstance(part, Mapping) and part.get("type", "text") == "text":
            texts.append(_text(part.get("content", part.get("text"))))
    return "".join(texts)


def _tool_calls(outputs: Json) -> str:
    parts = (
        [part for entry in outputs if isinstance(entry, Mapping) for part in _listed(entry.get("parts"))]
        if (isinstance(outputs, list))
        else []
    )
    calls = [
        {"name": part.get("name"), "arguments": part.get("arguments")}
        for part in parts
        if isinstance(part, Mapping) and part.get("type") == "tool_call"
    ]
    return json.dumps(calls) if calls else ""


def _listed(value: Json) -> list[Json]:
    return value if isinstance(value, list) else []


def _parsed(value: Json) -> Json:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return None


def _text(value: Json) -> str:
    if value is None:
        return ""
    return valid_text(value if isinstance(value, str) else json.dumps(value))


def _number(value: Json) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if abs(number) != float("inf") and number == number else None


def _whole(value: Json) -> int | None:
    number = _number(value)
    return None if number is None else int(number)
