"""Which values of a metric count, and how many there were."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict

from sluice.serving.metrics import LiveMetric
from sluice.serving.observations import Sample

_BAD_SHARE = 0.02
"""More values than this that cannot be, and nothing is known of a metric."""

_SESSIONS = 100_000
"""Sessions that are remembered: one that comes back after so many others counts anew."""


class Counting:
    """One metric's values. Lists of two are of stable and the canary, in this order.

    Of a session only the first `each` values count (0: all), since they resemble each other: ten failures of one person
    whose requests are strange are not the evidence that ten failures of ten people are.
    """

    def __init__(self, about: LiveMetric, each: int) -> None:
        self._about = about
        self._each = each
        self._sessions: OrderedDict[tuple[bool, str], int] = OrderedDict()
        self._canary_known: list[float] = []
        self._sums = [0.0, 0.0]
        self.n = [0, 0]
        self.bad = [0, 0]

    def value_of(self, sample: Sample, canary: bool) -> float | None:
        """The value if it counts. What the metric cannot be is left out, and counted as bad."""
        value = float(sample.value)
        if not (math.isfinite(value) and value >= 0 and (self._about.kind == "ratio" or value <= 1)):
            self.bad[canary] += 1
            return None
        if self._each and sample.session and not self._among_first((canary, sample.session)):
            return None
        if self._about.unit == "ms":
            # The gateway counts whole milliseconds: 0 is an answer faster than its clock.
            value = max(value, 0.5)
        self.n[canary] += 1
        self._sums[canary] += value
        if canary:
            insort(self._canary_known, sample.known)
        return value

    def mean(self, canary: bool) -> float | None:
        """Of all values that count; None without any."""
        return self._sums[canary] / self.n[canary] if self.n[canary] else None

    def too_many_bad(self) -> bool:
        return any(bad > _BAD_SHARE * (bad + n) for bad, n in zip(self.bad, self.n, strict=True))

    def canary_since(self, since: float) -> tuple[int, float]:
        """How many of the canary's became known from `since` on (epoch seconds), and the seconds until the last."""
        seen = len(self._canary_known) - bisect_left(self._canary_known, since)
        return seen, self._canary_known[-1] - since if seen else 0.0

    def moved(self, jump: float) -> None:
        """The clock jumped by so many seconds."""
        self._canary_known = [known + jump for known in self._canary_known]

    def _among_first(self, session: tuple[bool, str]) -> bool:
        used = self._sessions.pop(session, 0)
        self._sessions[session] = min(used + 1, self._each)
        if len(self._sessions) > _SESSIONS:
            self._sessions.popitem(last=False)
        return used < self._each
