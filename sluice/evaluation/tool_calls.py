"""Tool calls of an answer against those that the item expects.

After the Berkeley Function-Calling Leaderboard (Patil et al. 2025): the right functions with the right arguments;
parallel calls in any order; and no call where none is right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from sluice.evaluation.json_answers import NotJson, json_schema, read_document
from sluice.evaluation.outcomes import Answer
from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json

_WRITTEN = re.compile(r"<tool_call>(?P<call>.*?)(?:</tool_call>|\Z)", re.DOTALL)

Call = Mapping[str, Json]
"""`name`, and `arguments`: an object, or the text that could not be read as one."""


def calls_of(answer: Answer) -> tuple[Call, ...]:
    """The calls that the server found in the answer or, when it looks for none, those written in its text as
    `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. A call that cannot be read is still a call."""
    return answer.tool_calls or tuple(_written(found["call"]) for found in _WRITTEN.finditer(answer.answer))


def tool_call(calls: Sequence[Call], expected: Sequence[Call]) -> float:
    """1 when exactly the expected calls were made (none, where none is expected), else 0.

    Arguments are compared as JSON: the text "1" is not the number 1, true is not 1, but 1.0 is 1; objects whatever the
    order of their keys, lists in their order.
    """
    return float(sorted(map(_identity, calls)) == sorted(map(_identity, expected)))


def tool_call_name(calls: Sequence[Call], expected: Sequence[Call]) -> float:
    """1 when exactly the expected functions were called, each as often, whatever the arguments; else 0."""
    return float(sorted(map(_name, calls)) == sorted(map(_name, expected)))


def calls_valid(calls: Sequence[Call], tools: Sequence[Json]) -> str:
    """What is wrong with the first wrong call, or nothing: each must name one of `tools` (OpenAI definitions) and give
    arguments that satisfy its schema. A schema that is none is nobody's fault but the request's, and asks nothing."""
    functions = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)]
    schemas = {str(one.get("name")): one.get("parameters") for one in functions if isinstance(one, dict)}
    for call in calls:
        name, arguments = _name(call), call.get("arguments")
        if name not in schemas:
            return f"calls {name!r}, which was not offered"
        if isinstance(arguments, str):
            try:
                arguments = read_document(arguments)
            except NotJson:
                return f"calls {name} with arguments that are not JSON"
        if not isinstance(arguments, dict):
            return f"calls {name} with arguments that are no object"
        try:
            if schemas[name] and not json_schema(json.dumps(arguments), schemas[name]):
                return f"calls {name} with arguments that its schema does not allow"
        except InputError:
            continue
    return ""


def _name(call: Call) -> str:
    return str(call.get("name"))


def _identity(call: Call) -> str:
    try:
        return json.dumps([call.get("name"), _plain(call.get("arguments", {}))], sort_keys=True)
    except RecursionError:
        return ""  # nested too deeply to be any call that an item expects


def _plain(value: Json) -> Json:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _written(text: str) -> Call:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):  # the latter for thousands of brackets
        call = None
    if not isinstance(call, dict) or not isinstance(call.get("arguments", {}), dict):
        return {"name": "", "arguments": text}
    return {"name": call.get("name"), "arguments": call.get("arguments", {})}
