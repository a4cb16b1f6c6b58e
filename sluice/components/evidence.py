"""The measurements that a gate's decision rests on: their digests, and the scores of both releases in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from sluice.components.workspace import Workspace

if TYPE_CHECKING:
    from sluice.evaluation.scores import Scores

Side = Literal["candidate", "champion"]


@dataclass(frozen=True)
class Measurements:
    """Digests of the measurements of one candidate against one champion. `calibration` is empty without a judge, or
    without labelled items."""

    evaluation: str
    calibration: str
    benchmark_candidate: str
    benchmark_champion: str
    safety_candidate: str
    safety_champion: str
    speed: str

    def by_name(self) -> Mapping[str, str]:
        """As a decision names its evidence: `benchmark-candidate`."""
        return {name.replace("_", "-"): digest for name, digest in asdict(self).items() if digest}


def scores_of_side(workspace: Workspace, measured: Measurements, side: Side) -> Scores:
    """All columns of one release."""
    from sluice.evaluation.scores import merged, read_scores

    alone = (measured.benchmark_candidate, measured.safety_candidate)
    if side == "champion":
        alone = (measured.benchmark_champion, measured.safety_champion)
    folders = [workspace.folder(digest) / side for digest in (measured.evaluation, measured.speed)]
    return merged(read_scores(folder) for folder in [*folders, *(workspace.folder(digest) for digest in alone)])
