"""Values that the tests of this room share."""

from __future__ import annotations

from sluice.serving.analysis import ReleaseSamples
from sluice.serving.routes import Target


def digest(letter: str) -> str:
    return "sha256:" + letter * 64


def target(letter: str, port: int = 8101) -> Target:
    return Target(digest(letter), digest(letter), f"app-{letter * 12}", (f"127.0.0.1:{port}",))


def samples(
    release: str, requests: int, *, errors: int = 0, ms: float = 100.0, up: int = 0, down: int = 0, empty: int = 0
) -> ReleaseSamples:
    """A release with `requests` requests whose latencies spread a little around `ms`."""
    whole = requests - errors
    times = tuple(ms * (1 + 0.02 * (index % 5)) for index in range(whole))
    return ReleaseSamples(
        release, requests, errors=errors, empty=empty, ttft_ms=times, total_ms=times, thumbs_up=up, thumbs_down=down
    )
