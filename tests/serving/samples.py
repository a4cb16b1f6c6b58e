"""Values that the tests of this room share."""

from __future__ import annotations

from collections.abc import Sequence

from sluice.serving.observations import Sample
from sluice.serving.routes import Target
from sluice.statistics.paired import Floats


def digest(letter: str) -> str:
    return "sha256:" + letter * 64


CANARY, STABLE = digest("c"), digest("5")


def target(letter: str, port: int = 8101) -> Target:
    return Target(digest(letter), digest(letter), f"app-{letter * 12}", (f"127.0.0.1:{port}",))


def stream(
    metric: str,
    canary: Sequence[float] | Floats,
    stable: Sequence[float] | Floats,
    *,
    begin: float = 0.0,
    seconds: float = 100.0,
) -> list[Sample]:
    """Values of a metric, of each release evenly spread over the same `seconds` from `begin` (epoch seconds) on."""
    found = [
        Sample(metric, release, float(value), begin + seconds * (index + 0.5) / len(values), f"{release[7:8]}{index}")
        for release, values in ((CANARY, canary), (STABLE, stable))
        for index, value in enumerate(values)
    ]
    return sorted(found, key=lambda sample: sample.known)
