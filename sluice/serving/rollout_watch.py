"""What a controller sees of its two releases: read without gaps, looked at by the trip and judged by the analysis."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace

from sluice.serving.analysis import Analysis, AnalysisResult, Conviction
from sluice.serving.metrics import LIVE_METRICS
from sluice.serving.observations import Observed, Sample, SampleSource
from sluice.serving.policy import AnalysisPolicy, Minimum, RolloutPolicy, TripPolicy
from sluice.serving.rollout_interfaces import Clock
from sluice.serving.rollout_state import RolloutState
from sluice.serving.trip import Trip, Tripwire

REQUESTS = "error_rate"
"""The metric of which every request gives one value: by it requests are counted."""


class Reading:
    """One source, read in windows that tile time: each begins where the last one ended, whatever the clock does.

    A clock set back would let what is new look read already: then the window begins anew at the new time, and what the
    source tells again until the old time is left out.
    """

    def __init__(self, source: SampleSource, canary: str, stable: str, since: float, clock: Clock) -> None:
        self._source = source
        self._releases = (canary, stable)
        self._until = since
        self._clock = clock
        self._asked = clock.monotonic()
        self._told: frozenset[tuple[str, str]] = frozenset()
        self._told_until = since

    def read(self) -> Observed:
        """What became known since the last time. A reading that failed as a whole is made again with the next one."""
        now, asked = self._clock.now(), self._clock.monotonic()
        if now < self._until:
            return self._set_back(now, asked)
        observed = self._source.observe(*self._releases, self._until, now)
        self._asked = asked
        if observed.samples or not observed.missing:
            self._until = now
        if self._told:
            fresh = tuple(one for one in observed.samples if _key(one) not in self._told)
            observed = replace(observed, samples=fresh)
            self._told = self._told if now < self._told_until else frozenset()
        return observed

    def _set_back(self, now: float, asked: float) -> Observed:
        last = self._source.observe(*self._releases, self._until, self._until + asked - self._asked)
        again = self._source.observe(*self._releases, now, self._until)
        self._told = frozenset(_key(one) for one in (*again.samples, *last.samples))
        self._told_until, self._until, self._asked = self._until, now, asked
        return last


class Watch:
    """Stable and canary from `since` (epoch seconds) on: what is known by now, the trip, and the analysis.

    `requests` counts the canary's requests that became known since `count_from` was last called; `missing` says by
    metric why there are no figures.
    """

    def __init__(
        self,
        canary: str,
        stable: str,
        *,
        analysis: AnalysisPolicy,
        trip: TripPolicy,
        source: SampleSource,
        since: float,
        clock: Clock,
    ) -> None:
        self._canary, self._stable = canary, stable
        self._within_s = trip.within_s
        self._tripwire = Tripwire(trip, canary, stable)
        self._clock = clock
        gating = any(limits.gating for limits in analysis.metrics.values())
        self._analysis = Analysis(analysis, canary, stable) if gating else None
        self._reading = Reading(source, canary, stable, since, clock)
        self._pending: list[Sample] = []
        self._recent: deque[Sample] = deque()
        self.missing: Mapping[str, str] = {}
        self._from = since
        self.requests = 0

    def count_from(self, since: float) -> None:
        """Count the canary's requests from here on."""
        self._from, self.requests = since, 0

    def moved(self, jump: float) -> None:
        """The clock jumped by so many seconds: what was seen before it belongs to the moments that it belonged to."""
        self._recent = deque(replace(one, known=one.known + jump) for one in self._recent)
        self._pending = [replace(one, known=one.known + jump) for one in self._pending]
        self._from += jump
        self._tripwire.moved(jump)
        if self._analysis is not None:
            self._analysis.moved(jump)

    def look(self) -> Trip | None:
        """Read what became known. What ends the rollout at once, or None."""
        observed = self._reading.read()
        self.missing = observed.missing
        self._pending += observed.samples
        now = self._clock.now()
        for sample in observed.samples:
            if sample.metric == REQUESTS:
                self._recent.append(sample)
                self.requests += sample.release == self._canary and sample.known >= self._from
        while self._recent and not 0 <= now - self._recent[0].known <= self._within_s:
            self._recent.popleft()
        return self._tripwire.look(replace(observed, samples=tuple(self._recent)), now)

    def analyse(self, minimum: Minimum, since: float) -> AnalysisResult:
        """What all figures say by now; `since` begins the running step, for its minimum."""
        if self._analysis is None:
            return AnalysisResult("inconclusive", "Nothing but the trip decides here.", ())
        self._analysis.add(sorted(self._pending, key=lambda sample: sample.known))
        self._pending.clear()
        return self._analysis.result(minimum, since=since, missing=self.missing)


def shadow_policy(policy: AnalysisPolicy) -> AnalysisPolicy:
    """What can be judged of answers that nobody sees: the rates that the gateway knows."""
    rates = {
        name: limits
        for name, limits in policy.metrics.items()
        if (LIVE_METRICS[name].kind, LIVE_METRICS[name].source) == ("rate", "gateway")
    }
    return policy.model_copy(update={"metrics": rates})


def verdict_of(trip: Trip, last: AnalysisResult | None) -> AnalysisResult:
    """The trip as an analysis: what the last one said of the metrics, and the requests that convict the release."""
    convicting = tuple(
        Conviction(one.request_id, one.session, one.metric, one.value, one.detail, one.known) for one in trip.requests
    )
    return AnalysisResult("fail", trip.sentence, last.metrics if last else (), convicting)


def progress(
    state: RolloutState, policy: RolloutPolicy, requests: int, result: AnalysisResult | None
) -> tuple[float, float, str]:
    """How far the phase is, for a `Report`: done, of how many, and in words."""
    if state.phase == "baking":
        return min(state.spent_s, policy.bake_s), policy.bake_s, f"baking at {state.weight}%"
    if state.phase not in ("shadowing", "holding"):
        return 0, 0, f"{state.target.served_name}: {state.phase}"
    shadow, step = (policy.shadow if state.phase == "shadowing" else None), policy.steps[state.step]
    least, longest = (shadow or step.minimum).requests, (shadow or step).maximum_time_s
    where = "in the shadow" if shadow else f"{state.weight}% on the canary"
    paused = ", paused" if state.paused else ""
    says = result.sentence if result else "no figures yet"
    return min(requests, least), least, f"{where}{paused}, {state.spent_s:.0f} of at most {longest:.0f} s: {says}"


def _key(sample: Sample) -> tuple[str, str]:
    return sample.metric, sample.request_id
