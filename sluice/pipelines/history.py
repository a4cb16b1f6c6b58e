"""Who was champion when, from the ledger; with the numbers that MLflow knows them by, where it answers."""

from __future__ import annotations

from dataclasses import dataclass

from sluice.components.aliases import REPAIR
from sluice.components.workspace import Workspace
from sluice.infra.audit import read
from sluice.infra.errors import SluiceError
from sluice.infra.settings import Settings
from sluice.provenance.release_state import Reign
from sluice.provenance.releases import read_state


@dataclass(frozen=True)
class Champion:
    """One reign, and its version's number in MLflow (None: MLflow does not know it, or does not answer)."""

    reign: Reign
    version: int | None


def champions(workspace: Workspace) -> tuple[list[Champion], str]:
    """All champions, oldest first, and a sentence when MLflow could not be asked for their numbers."""
    reigns = read_state(workspace.ledger).reigns()
    try:
        from sluice.pipelines.approvals import registry_of
        from sluice.registry.versions import list_versions

        versions = list_versions(registry_of(workspace), workspace.settings.application) if reigns else []
        # Newest first: of two versions of one digest the lower number stays, as everywhere.
        numbers, note = {version.digest: version.number for version in versions}, ""
    except SluiceError as error:
        numbers, note = {}, f"Without the versions' numbers: {error.message}"
    return [Champion(reign, numbers.get(reign.release)) for reign in reigns], note


def repairs(settings: Settings) -> list[str]:
    """Aliases that somebody moved by hand and that were put back here, oldest first, as sentences."""
    return [f"{line.time[:19]} {line.reason}" for line in read(settings.home) if line.verb == REPAIR]
