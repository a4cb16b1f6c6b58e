"""How the collector and those who write keep out of each other's way.

Before the collector deletes anything it announces what, in `collecting/<id>.json`, and only then looks at what is
reachable and how old it is. Whoever stores an artifact, or relies on one that was stored long ago, first makes its
claim visible (a young manifest, a young step record) and only then looks at the announcements. So one of the two
always sees the other: the collector spares what is claimed, or the writer waits and then writes again.

The collector keeps to its announcement's time by its own clock; one that was killed is known to be gone on its own
machine, and elsewhere its announcement runs out.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict

from sluice.infra.errors import ConflictError
from sluice.infra.object_store import ObjectMissing, ObjectStore
from sluice.provenance.canonical import canonical_json
from sluice.provenance.lease import SKEW_S, Process, this_process

GRACE_S = 7 * 24 * 3600.0
"""Age in seconds up to which the collector leaves an object alone, reachable or not."""
ANNOUNCED_S = 600.0
"""How long one announcement holds."""
_PREFIX = "collecting/"


def is_aging(modified: float) -> bool:
    """Whether an object is so old that who relies on it now should write it again: the collector may take it soon."""
    return time.time() - modified > GRACE_S / 2


class Announcement:
    """What a collector is about to delete: digests of artifacts and blobs. Use it as a context."""

    def __init__(self, objects: ObjectStore, digests: Iterable[str]) -> None:
        self._objects = objects
        self._key = f"{_PREFIX}{uuid.uuid4().hex}.json"
        self._digests = sorted(digests)
        self._deadline = 0.0

    def __enter__(self) -> Announcement:
        self._write()
        return self

    def __exit__(self, *_: object) -> None:
        self._objects.delete(self._key)

    def require_time(self) -> None:
        """Called right before each deletion. Raises `ConflictError` when the time ran out: then nothing may go."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise ConflictError(
                "The collector was stopped for so long that others no longer wait for it; what is left stays.",
                hint="Run the same deletion again: it goes on where it was.",
            )
        if left < ANNOUNCED_S / 2:
            self._write()

    def _write(self) -> None:
        asked = time.monotonic()
        expires = time.time() + ANNOUNCED_S
        body = {"process": asdict(this_process()), "expires": expires, "digests": self._digests}
        self._objects.put(self._key, canonical_json(body))
        self._deadline = asked + ANNOUNCED_S


def wait_for_collector(objects: ObjectStore, digests: Iterable[str]) -> bool:
    """Wait while a collector is about to delete one of these; whether that was so, and some may be gone now."""
    wanted, waited = set(digests), False
    while any(_concerns(objects, info.key, wanted) for info in objects.list(_PREFIX)):
        waited = True
        pause()
    return waited


def pause() -> None:
    """Between two looks of who waits."""
    time.sleep(0.2)


def _concerns(objects: ObjectStore, key: str, wanted: set[str]) -> bool:
    try:
        found = json.loads(objects.get(key))
    except ObjectMissing:
        return False
    if Process(**found["process"]).is_gone() or time.time() > found["expires"] + SKEW_S:
        objects.delete(key)
        return False
    return not wanted.isdisjoint(found["digests"])
