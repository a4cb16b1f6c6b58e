"""The hard trip: a burst of failures, or a server that takes requests and never answers. It waits for no statistics.

It asks for little evidence, and so for a large effect: at least half of the answers failed, and more than twice the
share of stable. When everything fails for everybody it is not the release; the analysis goes on comparing.
"""

from __future__ import annotations

from dataclasses import dataclass

from sluice.serving.observations import Observed, Sample
from sluice.serving.policy import TripPolicy

_TIMES_STABLE = 2.0


@dataclass(frozen=True)
class Trip:
    """Why a rollout ends at once, and the failed requests of the canary that say so, the latest last."""

    sentence: str
    requests: tuple[Sample, ...] = ()


class Tripwire:
    """Looked at several times a second. It remembers since when the canary has been busy without an answer: a release
    with few users may have finished its last request long ago, and be asked again just now."""

    def __init__(self, policy: TripPolicy, canary: str, stable: str) -> None:
        self._policy = policy
        self._canary, self._stable = canary, stable
        self._finished: float | None = None
        self._busy_since: float | None = None

    def look(self, recent: Observed, now: float) -> Trip | None:
        """What ends the rollout, or None. `recent` holds at least the samples of the last `within_s` seconds before
        `now` (epoch seconds), and what is active and finished now."""
        # Both look: the silence has to see every moment.
        silence = self._silence(recent, now)
        return self._burst(recent, now) or silence

    def moved(self, jump: float) -> None:
        """The clock jumped by so many seconds: what it showed before counts as if it had always been right."""
        if self._busy_since is not None:
            self._busy_since += jump

    def _burst(self, recent: Observed, now: float) -> Trip | None:
        begin = now - self._policy.within_s
        within = [each for each in recent.samples if each.metric == "error_rate" and each.known >= begin]
        ours = [each for each in within if each.release == self._canary]
        theirs = [each for each in within if each.release == self._stable]
        failed = tuple(each for each in ours if _failed(each))
        theirs_failed = sum(map(_failed, theirs))
        if len(failed) < self._policy.failed or len(failed) < self._policy.share * len(ours):
            return None
        if theirs and len(failed) / len(ours) <= _TIMES_STABLE * theirs_failed / len(theirs):
            return None
        details = sorted({each.detail for each in failed if each.detail})
        why = f" ({', '.join(details[:3])})" if details else ""
        beside = f"{theirs_failed} of {len(theirs)} on stable" if theirs else "stable finished none"
        seconds = f"{self._policy.within_s:g} s"
        sentence = (
            f"{len(failed)} of {len(ours)} answers of the canary failed or broke within {seconds}{why}; {beside}."
        )
        return Trip(sentence, failed)

    def _silence(self, recent: Observed, now: float) -> Trip | None:
        active, finished = recent.active.get(self._canary, 0), recent.finished.get(self._canary)
        if active == 0 or finished != self._finished or (self._busy_since is not None and now < self._busy_since):
            self._finished, self._busy_since = finished, None
        if active == 0:
            return None
        if self._busy_since is None:
            self._busy_since = now
        theirs = recent.finished.get(self._stable)
        if now - self._busy_since < self._policy.silent_s or theirs is None or theirs <= self._busy_since:
            return None
        requests = f"{active} request{'' if active == 1 else 's'}"
        return Trip(f"The canary has {requests} and has finished none for {self._policy.silent_s:g} s; stable has.")


def _failed(sample: Sample) -> bool:
    # A value that is not a number is no good answer either.
    return not sample.value <= 0
