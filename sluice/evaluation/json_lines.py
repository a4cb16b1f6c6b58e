"""JSONL files that people write: items, labelled items, probes, the data of benchmark tasks."""

from __future__ import annotations

import json
from collections.abc import Iterator

from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json, canonical_json


def json_lines(data: bytes, source: str, *, hint: str = "") -> Iterator[tuple[str, Json]]:
    """Each line that is not empty as (`source line 3`, value). Raises `InputError` for one that is no JSON."""
    # Not splitlines(): it would also cut at U+2028 inside a text.
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{source} line {number}"
        try:
            value = json.loads(line)
            canonical_json(value)  # what has no canonical form (NaN, half a character) has no digest
        except (ValueError, RecursionError, InputError) as error:
            raise InputError(f"{where} is not JSON: {str(error).rstrip('.')}.", hint=hint) from error
        yield where, value
