"""What a curation step gets and gives back. A step can be computed by another engine without the others noticing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sluice.curation.records import TraceRecord

BY_CORRECTION = "correction"
BY_THUMBS_UP = "thumbs up"


@dataclass(frozen=True)
class Candidate:
    """A record on its way to an example. `rule` says why it may train, `label` what the model should have said."""

    record: TraceRecord
    rule: str = ""
    label: str = ""
    score_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdicts:
    """What a step decided: the candidates kept, and for each other one the reason by trace id."""

    kept: tuple[Candidate, ...]
    dropped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CurationStep:
    """A named decision over all candidates, which arrive ordered by (start, id)."""

    name: str
    decide: Callable[[Sequence[Candidate]], Verdicts]
