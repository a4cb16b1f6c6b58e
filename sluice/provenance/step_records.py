"""What a step is, what it made, and how its record is written and read back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from sluice.infra.errors import InputError, IntegrityError
from sluice.infra.object_store import ObjectStore
from sluice.provenance.canonical import Json, digest_json, hex_of, require_digest

RECORD_VERSION = 1
_RECORD_KEY = re.compile(r"^steps/([0-9a-f]{64})(?:\.([1-9][0-9]*))?\.json$")
_READERS = 16


@dataclass(frozen=True)
class StepKey:
    """What decides a step's result: its name, code digest, parameters (JSON) and input digests by name."""

    name: str
    code: str
    parameters: Mapping[str, Json] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name:
            raise InputError("A step needs a name.")
        require_digest(self.code, "code")
        for name, digest in self.inputs.items():
            require_digest(digest, f"input {name}")

    def to_json(self) -> Json:
        return {
            "version": RECORD_VERSION,
            "name": self.name,
            "code": self.code,
            "parameters": dict(self.parameters),
            "inputs": dict(self.inputs),
        }

    @property
    def digest(self) -> str:
        """The key itself. Raises `InputError` when a parameter has no canonical JSON form (NaN for one)."""
        return digest_json(self.to_json())


@dataclass(frozen=True)
class StepOutput:
    """What a step made: artifact digests by name, and plain values (JSON)."""

    artifacts: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class StepRecord:
    """A finished step. Times are ISO 8601 UTC; `statement` is the digest of the stored DSSE envelope."""

    key: StepKey
    output: StepOutput
    started: str
    finished: str
    host: str
    statement: str

    @property
    def key_digest(self) -> str:
        return self.key.digest

    def to_json(self) -> Json:
        return {
            "key": self.key.to_json(),
            "output": {"artifacts": dict(self.output.artifacts), "values": dict(self.output.values)},
            "started": self.started,
            "finished": self.finished,
            "host": self.host,
            "statement": self.statement,
        }


def read_records(objects: ObjectStore) -> Iterator[StepRecord]:
    """All records, by key and edition; each record's key has the digest that its object is named for.

    Raises `IntegrityError` naming the object that holds something else.
    """
    found = (_RECORD_KEY.match(info.key) for info in objects.list("steps/"))
    keys = [m[0] for m in sorted((m for m in found if m), key=lambda m: (m[1], int(m[2] or 0)))]
    with ThreadPoolExecutor(max_workers=_READERS) as pool:
        yield from pool.map(lambda key: parse_record(key, objects.get(key)), keys)


def record_key(digest: str, edition: int) -> str:
    """Where the record of a step key lies; edition 0 is the first."""
    return f"steps/{hex_of(digest)}{f'.{edition}' if edition else ''}.json"


def parse_record(place: str, data: bytes) -> StepRecord:
    """The record in an object's bytes. Raises `IntegrityError` when it is none, or not the one `place` is named for."""
    match = _RECORD_KEY.match(place)
    try:
        raw = json.loads(data)
        key = raw["key"]
        if key["version"] != RECORD_VERSION:
            raise ValueError(f"unknown record version {key['version']!r}")
        record = StepRecord(
            StepKey(key["name"], key["code"], key["parameters"], key["inputs"]),
            StepOutput(raw["output"]["artifacts"], raw["output"]["values"]),
            raw["started"],
            raw["finished"],
            raw["host"],
            require_digest(raw["statement"], "statement"),
        )
        for name, digest in record.output.artifacts.items():
            require_digest(digest, f"output {name}")
        found = hex_of(record.key_digest)
    except (ValueError, KeyError, TypeError, AttributeError, InputError) as error:
        raise IntegrityError(f"The object {place!r} is not a step record: {error}.") from error
    if match is None or match[1] != found:
        raise IntegrityError(f"The step record {place!r} is that of another key, sha256:{found}.")
    return record
