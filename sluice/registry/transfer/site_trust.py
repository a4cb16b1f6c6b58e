"""The trust in another site: its keys as this site knows them, and what its ledger, kept here, says about keys.

It is for looking at what that site made: its models and the statements about them. Nothing of this site's own ledger or
steps is ever read with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sluice.infra.object_store import ObjectInfo, ObjectStore
from sluice.infra.transfer import Moved, ignore_moved
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.key_changes import trust_of
from sluice.provenance.ledger import Ledger
from sluice.provenance.trust import Trust, TrustPolicy
from sluice.registry.transfer.sites import TrustedSite
from sluice.registry.transfer.source import ReadOnlyObjects
from sluice.registry.transfer.verification import nobody


def trust_of_site(objects: ObjectStore, artifacts: ArtifactStore, site: TrustedSite, application: str) -> Trust:
    """Whose signatures count for what `site` made. Raises `IntegrityError` when its ledger, kept here, is damaged."""
    ledger = Ledger(_Below(objects, f"sites/{site.name}/"), application, nobody(), policy=TrustPolicy.of(site.keys))
    return trust_of(TrustPolicy.of(site.keys), ledger, artifacts)


class _Below(ReadOnlyObjects):
    """The objects below a prefix, as an `ObjectStore` that can only be read."""

    def __init__(self, objects: ObjectStore, prefix: str) -> None:
        self._objects, self._prefix = objects, prefix

    def get(self, key: str) -> bytes:
        return self._objects.get(self._prefix + key)

    def get_file(self, key: str, path: Path, *, moved: Moved = ignore_moved) -> None:
        self._objects.get_file(self._prefix + key, path, moved=moved)

    def head(self, key: str) -> ObjectInfo | None:
        found = self._objects.head(self._prefix + key)
        return ObjectInfo(key, found.size, found.modified) if found else None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for info in self._objects.list(self._prefix + prefix):
            yield ObjectInfo(info.key.removeprefix(self._prefix), info.size, info.modified)
