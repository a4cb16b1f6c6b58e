"""Answers that should be JSON: whether they are, and whether they satisfy the item's schema.

The whole answer has to be the document. One Markdown fence around it is let pass, since the programs that read answers
of language models take it off; a sentence before or after is not, since they would fail on it.
"""

from __future__ import annotations

import json
import re

from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json

_FENCED = re.compile(r"```(?:json)?[ \t]*\n(?P<document>.*?)\n?```", re.DOTALL | re.IGNORECASE)


class NotJson(ValueError):
    """The text is no JSON document."""


def json_valid(answer: str) -> float:
    """1 when the answer is JSON (RFC 8259, so NaN is none), else 0."""
    try:
        read_document(answer)
    except NotJson:
        return 0.0
    return 1.0


def json_schema(answer: str, schema: Json) -> float:
    """1 when the answer is JSON that satisfies the schema, else 0.

    `format` says nothing, as in JSON Schema itself, and a `$ref` leads nowhere beyond the schema. Raises `InputError`
    when the schema is none.
    """
    from jsonschema import exceptions, validators
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    try:
        kind = validators.validator_for(schema, default=validators.Draft202012Validator)
        kind.check_schema(schema)
        # A registry of its own: the library's would fetch a reference from the network.
        return float(kind(schema, registry=Registry()).is_valid(read_document(answer)))
    except (NotJson, RecursionError, OverflowError):
        return 0.0  # the latter two: nested too deeply, or a number too large, for any program to make use of
    except (exceptions.SchemaError, Unresolvable, AttributeError, TypeError) as error:
        raise InputError(f"json_schema = {json.dumps(schema)[:200]} is no JSON schema: {error}"[:600]) from error


def read_document(answer: str) -> Json:
    """The JSON document that an answer is. Raises `NotJson`."""
    text = answer.strip()
    if fenced := _FENCED.fullmatch(text):
        text = fenced["document"]
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise NotJson(str(error)) from error


def _refuse(constant: str) -> Json:
    raise NotJson(f"{constant} is no JSON")
