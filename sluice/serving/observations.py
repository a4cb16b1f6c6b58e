"""What was observed of two releases: single values, in the order in which they became known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Sample:
    """One value of one metric (`metrics.LIVE_METRICS`). `known` is when it became known, epoch seconds: the end of the
    request, the moment of a thumb. `detail` says in a few words why a bad value is bad ("HTTP 503 (UF)")."""

    metric: str
    release: str
    value: float
    known: float
    request_id: str = ""
    session: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Observed:
    """What a source knows of some seconds. `samples` of both releases in the order of `known`.

    `active` is how many requests run on each release now, and `finished` when each release last finished one (epoch
    seconds; no entry: never): a server that takes requests and never answers shows nowhere else. `missing` says, by
    metric, in a sentence, why no figures can be had.
    """

    samples: tuple[Sample, ...]
    active: Mapping[str, int] = field(default_factory=dict)
    finished: Mapping[str, float] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)


class SampleSource(Protocol):
    """Where a rollout's figures come from. One source never gives a sample twice for windows that do not overlap."""

    def observe(self, canary: str, stable: str, since: float, until: float) -> Observed:
        """Samples of the two releases that became known in [since, until), epoch seconds; probes and requests whose
        client left do not count. Never raises for a part that is down: that is `missing`."""
