"""What users got, request by request, from the gateway's access log.

The log is JSON, one line a finished request; exact times, so an analysis needs no histogram. Times are seconds since
the epoch, durations milliseconds.
"""

from __future__ import annotations

import json
import os
import time
from bisect import bisect_left, insort
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from sluice.serving.envoy_clusters import release_of
from sluice.serving.log_rotation import put_aside_at, rotated_logs

_CLIENT_LEFT = "DC"
"""Envoy's flag for a client that closed its connection: not the release's doing."""

_TIMED_OUT = frozenset({"UT", "SI", "DT", "UMSDR"})
"""Envoy's flags for a server that was too slow or silent."""

_DOUBT_S = 60.0


@dataclass(frozen=True)
class AccessSample:
    """One finished request. `release` is the one whose users it belongs to, `answered` the one that answered it:
    another one when the release's own servers were gone.

    `time` is when it began. `known` is when its line could be read: its end, or later when the line came late.
    `ttft_ms` and `last_ms` are the times from the request to the first and the last text, None when there was none;
    `tokens` counts the pieces of text. `forced` marks probes, which chose their release, `shadow` mirrored requests,
    whose answer nobody saw. `flags` are Envoy's response flags, empty for none.
    """

    time: float
    known: float
    request_id: str
    traceparent: str
    session: str
    release: str
    answered: str
    status: int
    flags: tuple[str, ...]
    forced: bool
    shadow: bool
    streamed: bool
    ttft_ms: float | None
    last_ms: float | None
    total_ms: float
    tokens: int
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
    def timed_out(self) -> bool:
        """The gateway gave up waiting."""
        return not _TIMED_OUT.isdisjoint(self.flags)

    @property
    def failed_over(self) -> bool:
        """Another release answered, because no server of this one could be reached."""
        return bool(self.answered) and self.answered != self.release

    @property
    def broken(self) -> bool:
        """An answer that began well and did not end: a server that vanished, an error inside a stream."""
        if not self.successful or self.cancelled:
            return False
        return bool(self.flags) or self.error or (self.streamed and not self.ended)


class AccessLog:
    """Reads a growing log through rotation. Keeps what it has read, so a call costs only what was added since."""

    def __init__(self, path: Path, *, keep_s: float = 24 * 3600.0) -> None:
        self.path = path
        self.lines: dict[str, int] = {}
        """Lines read so far, by release."""
        self._keep_s = keep_s
        self._stream: BinaryIO | None = None
        self._place = 0
        self._rest = b""
        self._samples: list[AccessSample] = []
        self._asked = 0.0
        self._trouble = ""
        self._trouble_at = 0.0

    def read(self, since: float, until: float) -> list[AccessSample]:
        """Requests that became known in [since, until), in that order.

        A line that was written after somebody asked for the time in which its request ended becomes known at that
        asking's end: so successive windows that meet miss nothing and see nothing twice.
        """
        if self._stream is None:
            # What was put aside an hour before cannot hold a line that became known since.
            self._open([file for file in rotated_logs(self.path) if _modified(file) > since - 3600.0])
        self._advance(min(self._asked, until), until)
        self._asked = until
        found = self._samples
        return found[bisect_left(found, since, key=_known) : bisect_left(found, until, key=_known)]

    def trouble(self, now: float) -> str:
        """Why lines may be missing, in a sentence; empty when there is no reason to think so. Asked after `read`."""
        if self._stream is None:
            return f"The access log {str(self.path)!r} does not exist."
        return self._trouble if self._trouble and abs(now - self._trouble_at) < _DOUBT_S else ""

    def _advance(self, earliest: float, now: float) -> None:
        while self._stream is not None:
            # Looked at before the file is read to its end: once the next one exists, this one grows no more.
            following = self._following()
            self._take(self._stream.read(), earliest, now)
            if os.fstat(self._stream.fileno()).st_size < self._stream.tell():
                self._doubt("The access log was cut: lines are lost.", now)
                self._stream.seek(0)
                self._rest = b""
                continue
            if following is None:
                break
            found, gone = following
            if gone:
                self._doubt("The access log was replaced, or put aside more often than it was read.", now)
            if self._rest:
                self._doubt("The access log ended within a line.", now)
            self._open(found)
        if self._samples and self._samples[0].known < self._samples[-1].known - 2 * self._keep_s:
            oldest = self._samples[-1].known - self._keep_s
            del self._samples[: bisect_left(self._samples, oldest, key=_known)]

    def _following(self) -> tuple[list[Path], bool] | None:
        """The files put aside after the open one, and whether that one is gone; None while it is the newest."""
        assert self._stream is not None
        mine = _inode(os.fstat(self._stream.fileno()))
        current, aside = _stat(self.path), rotated_logs(self.path)
        if current is not None and _inode(current) == mine:
            return None
        places = [place for place, file in enumerate(aside) if (found := _stat(file)) and _inode(found) == mine]
        later = aside[places[-1] + 1 :] if places else [file for file in aside if put_aside_at(file) > self._place]
        # Put aside, and Envoy has not opened a new one yet: it writes to this one still.
        return (later, not places) if later or current is not None else None

    def _open(self, aside: list[Path]) -> None:
        """The first of these files, or the one that Envoy writes now."""
        if self._stream is not None:
            self._stream.close()
        self._rest, self._stream = b"", None
        for file in (*aside, self.path):
            with suppress(FileNotFoundError):
                self._stream = file.open("rb")
                self._place = put_aside_at(file) if file != self.path else time.time_ns()
                return

    def _take(self, data: bytes, earliest: float, now: float) -> None:
        *whole, self._rest = (self._rest + data).split(b"\n")
        for line in whole:
            try:
                sample = parse_line(line)
            except ValueError:
                self._doubt("The access log holds a damaged line.", now)
                continue
            if sample is None:
                continue
            self.lines[sample.release] = self.lines.get(sample.release, 0) + 1
            insort(self._samples, replace(sample, known=max(sample.known, earliest)), key=_known)

    def _doubt(self, sentence: str, now: float) -> None:
        self._trouble, self._trouble_at = sentence, now


def parse_line(line: bytes) -> AccessSample | None:
    """One line of the log; None for a request that reached no release. Raises `ValueError` for a damaged line."""
    try:
        entry: dict[str, Any] = json.loads(line)
        release = release_of(str(entry.get("cluster") or ""))
        if release is None:
            return None
        flags = str(entry.get("flags") or "-")
        route = str(entry.get("route") or "")
        began, total_ms = float(entry["ts"]), float(entry["total_ms"])
        return AccessSample(
            time=began,
            known=began + total_ms / 1000,
            request_id=str(entry.get("request_id") or ""),
            traceparent=str(entry.get("traceparent") or ""),
            session=str(entry.get("session") or ""),
            release=release,
            answered=str(entry.get("answered") or ""),
            status=int(entry.get("status") or 0),
            flags=() if flags == "-" else tuple(flags.split(",")),
            forced=route.startswith("forced-"),
            shadow=route == "shadow",
            streamed=bool(entry.get("streamed")),
            ttft_ms=_number(entry.get("ttft_ms")),
            last_ms=_number(entry.get("last_ms")),
            total_ms=total_ms,
            tokens=int(entry.get("tokens") or 0),
            bytes=int(entry.get("bytes") or 0),
            text=bool(entry.get("text")),
            truncated=bool(entry.get("truncated")),
            ended=bool(entry.get("ended")),
            error=bool(entry.get("error")),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a line of the access log: {error}") from error


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _known(sample: AccessSample) -> float:
    return sample.known


def _stat(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except FileNotFoundError:
        return None


def _inode(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _modified(file: Path) -> float:
    found = _stat(file)
    return found.st_mtime if found else 0.0
