"""What lies beside a release: its model signature and its bill of materials, found by a small pointer object.

A pointer `signatures/<adapter hex>.json` holds `{"signature": <artifact digest>}`, `boms/<adapter hex>.json` holds
`{"bom": <artifact digest>}`. Whatever is there travels with the release; a release without them travels too.
"""

from __future__ import annotations

import json

from sluice.infra.errors import IntegrityError
from sluice.infra.object_store import ObjectMissing, ObjectStore
from sluice.provenance.canonical import hex_of, require_digest

POINTERS = {"signature": "signatures", "bom": "boms"}
"""Folder of the pointers, by kind of companion."""


def pointer_key(kind: str, adapter: str) -> str:
    """Where the pointer to a companion of an adapter lies."""
    return f"{POINTERS[kind]}/{hex_of(adapter)}.json"


def find_companions(objects: ObjectStore, adapter: str) -> dict[str, str]:
    """Artifact digests of an adapter's companions by kind. Raises `IntegrityError` for a pointer that holds none."""
    found: dict[str, str] = {}
    for kind in POINTERS:
        key = pointer_key(kind, adapter)
        try:
            found[kind] = require_digest(json.loads(objects.get(key))[kind], kind)
        except ObjectMissing:
            continue
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"The object {key!r} names no {kind}: {error!r}.") from error
    return found
