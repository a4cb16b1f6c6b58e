"""What lies beside a release: its model signature and its bill of materials, found by a small pointer object.

A pointer `signatures/<adapter hex>.json` holds `{"signature": <artifact digest>}`, `boms/<adapter hex>.json` holds
`{"bom": <artifact digest>}`. A model that was signed again (after a key was revoked) has `<adapter hex>.1.json` and so
on beside its first signature; the newest one travels, in the place of the first. Whatever is there travels with the
release; a release without them travels too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import count

from sluice.infra.errors import IntegrityError
from sluice.infra.object_store import ObjectMissing, ObjectStore
from sluice.provenance.canonical import canonical_json, hex_of, require_digest

POINTERS = {"signature": "signatures", "bom": "boms"}
"""Folder of the pointers, by kind of companion."""


def pointer_key(kind: str, adapter: str) -> str:
    """Where the pointer to a companion of an adapter lies."""
    return f"{POINTERS[kind]}/{hex_of(adapter)}.json"


def pointers(adapter: str, companions: Mapping[str, str]) -> dict[str, bytes]:
    """The pointer objects of an adapter's companions (digests by kind) by key, as a snapshot carries them."""
    return {pointer_key(kind, adapter): canonical_json({kind: digest}) for kind, digest in companions.items()}


def find_companions(objects: ObjectStore, adapter: str) -> dict[str, str]:
    """Artifact digests of an adapter's companions by kind: of several signatures the newest.

    Raises `IntegrityError` for a pointer that holds none.
    """
    found: dict[str, str] = {}
    for kind in POINTERS:
        key = pointer_key(kind, adapter)
        for edition in count(1):
            try:
                found[kind] = require_digest(json.loads(objects.get(key))[kind], kind)
            except ObjectMissing:
                break
            except (ValueError, KeyError, TypeError) as error:
                raise IntegrityError(f"The object {key!r} names no {kind}: {error!r}.") from error
            if kind != "signature":
                break
            key = f"{POINTERS[kind]}/{hex_of(adapter)}.{edition}.json"
    return found
