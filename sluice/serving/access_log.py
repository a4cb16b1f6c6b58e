"""What users got, request by request, from the gateway's access log.

The log is JSON, one line a finished request; exact times, so an analysis needs no histogram. Times are seconds since
the epoch, durations milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sluice.serving.analysis import ReleaseSamples
from sluice.serving.envoy_routes import release_of

_CLIENT_LEFT = "DC"
"""Envoy's flag for a client that closed its connection: not the release's doing."""

FeedbackCounts = Callable[[str, float, float], tuple[int, int]]
"""`counts(release, since, until)`: thumbs up and thumbs down on answers of that release begun in that time."""


@dataclass(frozen=True)
class AccessSample:
    """One finished request. `ttft_ms` is the time to the first text, None when there was no text.

    `forced` marks probes, which chose their release. `flags` are Envoy's response flags, empty for none.
    """

    time: float
    request_id: str
    traceparent: str
    session: str
    release: str
    status: int
    flags: tuple[str, ...]
    forced: bool
    streamed: bool
    ttft_ms: float | None
    total_ms: float
    chunks: int
    bytes: int
    text: bool
    truncated: bool
    ended: bool
    error: bool

    @property
    def successful(self) -> bool:
        return 200 <= self.status < 300

    @property
    def cancelled(self) -> bool:
        """The client left before the end."""
        return _CLIENT_LEFT in self.flags

    @property
    def broken(self) -> bool:
        """An answer that began well and did not end: an upstream that vanished, an error inside a stream."""
        if not self.successful or self.cancelled:
            return False
        return bool(self.flags) or self.error or (self.streamed and not self.ended)


class AccessLog:
    """Reads a growing log. Keeps what it has read, so a call costs only what was added since the last one."""

    def __init__(self, path: Path, *, keep_s: float = 24 * 3600.0) -> None:
        self.path = path
        self._keep_s = keep_s
        self._offset = 0
        self._inode = 0
        self._samples: list[AccessSample] = []

    def read(self, since: float, until: float) -> list[AccessSample]:
        """Finished requests that began in [since, until), in the order in which they ended."""
        self._advance()
        return [sample for sample in self._samples if since <= sample.time < until]

    def _advance(self) -> None:
        try:
            with self.path.open("rb") as stream:
                found = self.path.stat()
                # A log that was rotated or cut begins anew.
                if found.st_ino != self._inode or found.st_size < self._offset:
                    self._inode, self._offset = found.st_ino, 0
                stream.seek(self._offset)
                data = stream.read()
        except FileNotFoundError:
            return
        whole = data.rfind(b"\n") + 1  # the last line may be half written
        self._offset += whole
        for line in data[:whole].splitlines():
            sample = parse_line(line)
            if sample is not None:
                self._samples.append(sample)
        if self._samples and self._samples[0].time < self._samples[-1].time - 2 * self._keep_s:
            oldest = self._samples[-1].time - self._keep_s
            self._samples = [sample for sample in self._samples if sample.time >= oldest]


def parse_line(line: bytes) -> AccessSample | None:
    """One line of the log; None for a request that reached no release and for a damaged line."""
    try:
        entry: dict[str, Any] = json.loads(line)
        release = release_of(str(entry.get("cluster") or ""))
        if release is None:
            return None
        flags = str(entry.get("flags") or "-")
        ttft = entry.get("ttft_ms")
        return AccessSample(
            time=float(entry["ts"]),
            request_id=str(entry.get("request_id") or ""),
            traceparent=str(entry.get("traceparent") or ""),
            session=str(entry.get("session") or ""),
            release=release,
            status=int(entry.get("status") or 0),
            flags=() if flags == "-" else tuple(flags.split(",")),
            forced=str(entry.get("route") or "").startswith("forced-"),
            streamed=bool(entry.get("streamed")),
            ttft_ms=None if ttft is None else float(ttft),
            total_ms=float(entry["total_ms"]),
            chunks=int(entry.get("chunks") or 0),
            bytes=int(entry.get("bytes") or 0),
            text=bool(entry.get("text")),
            truncated=bool(entry.get("truncated")),
            ended=bool(entry.get("ended")),
            error=bool(entry.get("error")),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def summarize(samples: Iterable[AccessSample], release: str, thumbs_up: int, thumbs_down: int) -> ReleaseSamples:
    """The figures of one release. Probes do not count, nor do requests whose client left before the end."""
    mine = [sample for sample in samples if sample.release == release and not sample.forced and not sample.cancelled]
    whole = [sample for sample in mine if sample.successful and not sample.broken]
    return ReleaseSamples(
        release=release,
        requests=len(mine),
        errors=sum(not sample.successful for sample in mine),
        broken=sum(sample.broken for sample in mine),
        empty=sum(not sample.text for sample in whole),
        truncated=sum(sample.truncated for sample in whole),
        # A broken release is fast: only whole answers say how long an answer takes.
        ttft_ms=tuple(sample.ttft_ms for sample in whole if sample.ttft_ms is not None),
        total_ms=tuple(sample.total_ms for sample in whole),
        thumbs_up=thumbs_up,
        thumbs_down=thumbs_down,
    )


class GatewaySamples:
    """`rollout.SampleSource` from the gateway's log and, joined by release, the users' feedback."""

    def __init__(self, log: AccessLog, feedback: FeedbackCounts) -> None:
        self._log = log
        self._feedback = feedback

    def samples(self, release: str, since: float, until: float) -> ReleaseSamples:
        """The figures of `release` for requests begun in [since, until)."""
        up, down = self._feedback(release, since, until)
        return summarize(self._log.read(since, until), release, up, down)
