"""Two sources of figures as one."""

from __future__ import annotations

from collections.abc import Mapping

from sluice.serving.observations import Observed, SampleSource


class BothSources:
    """The gateway's figures, quick and exact, and the trace store's, which say what the answers were worth."""

    def __init__(self, fast: SampleSource, slow: SampleSource) -> None:
        self.fast = fast
        self.slow = slow

    def observe(self, canary: str, stable: str, since: float, until: float) -> Observed:
        """Samples of both in the order in which they became known; requests that run are the gateway's to tell."""
        fast = self.fast.observe(canary, stable, since, until)
        slow = self.slow.observe(canary, stable, since, until)
        samples = tuple(sorted((*fast.samples, *slow.samples), key=lambda sample: sample.known))
        missing: Mapping[str, str] = {**fast.missing, **slow.missing}
        return Observed(samples, fast.active, fast.finished, missing)
