"""A rollout's figures from the gateway: every request that finished, as single values.

A log that is missing, cut or damaged, or that misses what Envoy counted, makes every metric missing: what cannot be
seen never passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Protocol

from sluice.infra.errors import UnavailableError
from sluice.serving.access_log import AccessLog, AccessSample
from sluice.serving.envoy_admin import Traffic
from sluice.serving.metrics import LIVE_METRICS
from sluice.serving.observations import Observed, Sample

GATEWAY_METRICS = tuple(metric.name for metric in LIVE_METRICS.values() if metric.source == "gateway")
_WRITTEN_AFTER_S = 5.0
"""A finished request's line is in the log by then, also on a busy machine."""

_MAY_MISS = 0.1
_CLOCK_MS = 0.5
"""The gateway counts whole milliseconds; a time of 0 is less than one, and ratios need more than 0."""


class GatewayTraffic(Protocol):
    """What the gateway counts and does with its log; `router.EnvoyRouter` is one."""

    def traffic(self) -> Mapping[str, Traffic]:
        """Counts by release. Raises `UnavailableError`."""

    def rotate_log(self) -> None:
        """Put a large log aside. Raises `UnavailableError`."""


class GatewaySamples:
    """`observations.SampleSource` over the access log: what users got. Probes, mirrored requests and requests whose
    client left before the end are no samples."""

    def __init__(self, log: AccessLog, router: GatewayTraffic) -> None:
        self._log = log
        self._router = router
        self._finished: dict[str, float] = {}
        self._counted: deque[tuple[float, int]] = deque()
        self._base: tuple[frozenset[str], int, int] | None = None

    def observe(self, canary: str, stable: str, since: float, until: float) -> Observed:
        """The samples of requests that ended in [since, until)."""
        users = (one for one in self._read(canary, stable, since, until) if not (one.forced or one.shadow))
        samples = tuple(sample for one in users if not one.cancelled for sample in _values(one, one.known))
        return self._observed(samples, canary, stable, until)

    def _read(self, canary: str, stable: str, since: float, until: float) -> list[AccessSample]:
        found = [one for one in self._log.read(since, until) if one.release in (canary, stable)]
        for one in found:
            if not (one.cancelled or one.timed_out):
                release = one.answered or one.release
                # The latest by the order of the log: after a clock was set back it is not the largest.
                self._finished[release] = one.known
        return found

    def _observed(self, samples: tuple[Sample, ...], canary: str, stable: str, until: float) -> Observed:
        releases = frozenset((canary, stable))
        active, trouble = self._look(releases, until)
        finished = {release: self._finished[release] for release in releases if release in self._finished}
        return Observed(samples, active, finished, self._missing(until, trouble))

    def _missing(self, now: float, trouble: str) -> dict[str, str]:
        sentence = self._log.trouble(now) or trouble
        return dict.fromkeys(GATEWAY_METRICS, sentence) if sentence else {}

    def _look(self, releases: frozenset[str], now: float) -> tuple[dict[str, int], str]:
        """Requests running by release, and what is wrong with the log by what Envoy counted."""
        try:
            self._router.rotate_log()
            traffic = self._router.traffic()
        except UnavailableError:
            return {}, ""
        mine = {release: traffic.get(release, Traffic()) for release in releases}
        active = {release: one.active + one.shadows_active for release, one in mine.items()}
        return active, self._compare(releases, sum(one.finished for one in mine.values()), now)

    def _compare(self, releases: frozenset[str], counted: int, now: float) -> str:
        logged = sum(self._log.lines.get(release, 0) for release in releases)
        earlier = self._counted[-1] if self._counted else (now, counted)
        # Other releases, an Envoy that began anew, a clock that went back: counting starts again.
        if self._base is None or self._base[0] != releases or counted < earlier[1] or now < earlier[0]:
            self._base = (releases, counted, logged)
            self._counted.clear()
        self._counted.append((now, counted))
        while len(self._counted) > 1 and self._counted[1][0] <= now - _WRITTEN_AFTER_S:
            self._counted.popleft()
        expected = self._counted[0][1] - self._base[1] if self._counted[0][0] <= now - _WRITTEN_AFTER_S else 0
        got = logged - self._base[2]
        if expected - got > 2 + _MAY_MISS * expected:
            return f"The gateway finished {expected} requests and logged {got} of them: is the disk full?"
        return ""


class ShadowSamples(GatewaySamples):
    """`observations.SampleSource` of the shadow: the same questions answered by both, stable's answers that users got
    and beside each what the canary made of it, paired by request id. A pair becomes known with its second answer."""

    def observe(self, canary: str, stable: str, since: float, until: float) -> Observed:
        """The samples of pairs whose second answer ended in [since, until)."""
        begun = min((one.time for one in self._read(canary, stable, since, until)), default=since)
        recent = [one for one in self._read(canary, stable, min(begun, since), until) if not one.cancelled]
        users = {one.request_id: one for one in recent if one.release == stable and not (one.shadow or one.forced)}
        pairs: list[tuple[float, AccessSample]] = []
        for shadow in (one for one in recent if one.release == canary and one.shadow):
            user = users.get(shadow.request_id)
            known = max(user.known, shadow.known) if user else 0.0
            if user is not None and since <= known < until:
                pairs += [(known, user), (known, shadow)]
        pairs.sort(key=lambda pair: pair[0])
        samples = tuple(sample for known, answer in pairs for sample in _values(answer, known))
        return self._observed(samples, canary, stable, until)


def _values(one: AccessSample, known: float) -> Iterator[Sample]:
    """Every metric's value for one answer. Only whole ones say how long an answer takes: a broken release is fast."""

    def sample(metric: str, value: float, detail: str = "") -> Sample:
        return Sample(metric, one.release, value, known, one.request_id, one.session, detail)

    wrong = _wrong(one)
    yield sample("error_rate", float(bool(wrong)), wrong)
    if wrong:
        return
    yield sample("empty_answers", float(not one.text), "" if one.text else "no text in the answer")
    yield sample("truncated_answers", float(one.truncated), "cut at the token limit" if one.truncated else "")
    if one.ttft_ms is not None:
        yield sample("time_to_first_token", max(one.ttft_ms, _CLOCK_MS))
        if one.last_ms is not None and one.tokens > 2 and one.last_ms > one.ttft_ms:
            yield sample("time_per_token", (one.last_ms - one.ttft_ms) / (one.tokens - 1))
    yield sample("total_time", max(one.total_ms, _CLOCK_MS))


def _wrong(one: AccessSample) -> str:
    """What was wrong with an answer, in a few words; empty for a whole one."""
    if one.failed_over and one.successful:
        return "no server of it answered; stable did"
    flags = f" ({','.join(one.flags)})" if one.flags else ""
    if not one.successful:
        return f"HTTP {one.status}{flags}"
    if one.error:
        return "error inside the stream"
    return f"stream ended early{flags}" if one.broken else ""
