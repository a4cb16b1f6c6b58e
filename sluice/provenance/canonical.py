"""Canonical bytes and digests. Two equal values have equal bytes, on every machine and Python.

The form is JSON with sorted keys, no blanks, UTF-8 and no NaN or infinity (as in RFC 8785, restricted to values
whose numbers are integers, short decimals or strings, so that number formatting cannot differ).
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from sluice.infra.errors import InputError

Json = Any
"""A JSON value: None, bool, int, float, str, list or dict with string keys."""

_DIGEST = re.compile(r"^sha256:[0-9a-f]{64}$")
_DIGESTS = re.compile(r"sha256:[0-9a-f]{64}")


def canonical_json(value: Json) -> bytes:
    """The canonical bytes of a JSON value. Raises `InputError` for what JSON cannot hold (NaN included)."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InputError(f"This value has no canonical JSON form: {error}.") from error


def digest_bytes(data: bytes) -> str:
    """`sha256:<64 hex digits>` of the bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_json(value: Json) -> str:
    """Digest of a JSON value's canonical bytes."""
    return digest_bytes(canonical_json(value))


def digest_file(path: Path) -> str:
    """Digest of a file's bytes, read in bounded memory."""
    with path.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def is_digest(value: str) -> bool:
    """Whether the text is a digest."""
    return _DIGEST.match(value) is not None


def digests_in(value: Json) -> list[str]:
    """Every digest that stands anywhere in a JSON value."""
    return _DIGESTS.findall(json.dumps(value, default=dict))


def require_digest(value: str, name: str = "digest") -> str:
    """`value` itself when it is a digest; else `InputError` naming it."""
    if not is_digest(value):
        raise InputError(f"{name} = {value!r} is not a digest.", hint="Expected sha256: and 64 hexadecimal digits.")
    return value


def hex_of(digest: str) -> str:
    """The 64 hexadecimal digits of a digest."""
    return require_digest(digest).removeprefix("sha256:")


def short(digest: str) -> str:
    """The first 12 hexadecimal digits: for names and screens, never for identity."""
    return hex_of(digest)[:12]
