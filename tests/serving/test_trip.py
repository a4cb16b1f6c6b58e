"""The hard trip: what ends a rollout at once, and what must not."""

from __future__ import annotations

import pytest

from sluice.serving.observations import Observed, Sample
from sluice.serving.policy import TripPolicy
from sluice.serving.trip import Trip, Tripwire
from tests.serving.samples import CANARY, STABLE

POLICY = TripPolicy(failed=5, within_s=10, share=0.5, silent_s=60)
NOW = 1_000.0


def errors(release: str, values: list[int], *, until: float = NOW) -> tuple[Sample, ...]:
    """Values of the error rate, the last one known at `until`, a tenth of a second apart."""
    return tuple(
        Sample("error_rate", release, value, until - 0.1 * (len(values) - 1 - index), f"{index}", detail="HTTP 503")
        for index, value in enumerate(values)
    )


def look(*samples: tuple[Sample, ...]) -> Trip | None:
    return Tripwire(POLICY, CANARY, STABLE).look(Observed(sum(samples, ())), NOW)


def test_a_burst_of_failures_trips_and_names_its_requests() -> None:
    trip = look(errors(CANARY, [1, 0, 1, 1, 1, 1]), errors(STABLE, [0] * 20))
    assert trip is not None
    assert trip.sentence == "5 of 6 answers of the canary failed or broke within 10 s (HTTP 503); 0 of 20 on stable."
    assert [request.request_id for request in trip.requests] == ["0", "2", "3", "4", "5"]
    assert look(errors(CANARY, [1] * 5)) is not None, "there is nothing to compare with, and everything failed"
    assert look(errors(CANARY, [float("nan")] * 5)) is not None  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("canary", "stable"),
    [
        (errors(CANARY, [1] * 4), errors(STABLE, [0] * 20)),  # too few
        (errors(CANARY, [1] * 5 + [0] * 6), errors(STABLE, [0] * 20)),  # less than half
        (errors(CANARY, [1] * 9), errors(STABLE, [1, 0] * 10)),  # stable fails too
        (errors(CANARY, [1] * 9, until=NOW - 11), errors(STABLE, [0] * 20)),  # long ago
        (errors("another", [1] * 9), errors(STABLE, [0] * 20)),
    ],
)
def test_what_does_not_trip(canary: tuple[Sample, ...], stable: tuple[Sample, ...]) -> None:
    assert look(canary, stable) is None


def busy(active: int, canary: float | None, stable: float) -> Observed:
    finished = {STABLE: stable} if canary is None else {STABLE: stable, CANARY: canary}
    return Observed((), {CANARY: active}, finished)


def test_a_server_that_never_answers_trips_when_stable_does() -> None:
    wire = Tripwire(POLICY, CANARY, STABLE)
    assert wire.look(busy(3, None, NOW), NOW) is None
    assert wire.look(busy(3, None, NOW + 59), NOW + 59) is None
    trip = wire.look(busy(3, None, NOW + 60), NOW + 60)
    assert trip is not None
    assert "3 requests and has finished none for 60 s" in trip.sentence


def test_a_seldom_asked_canary_is_not_silent() -> None:
    wire = Tripwire(POLICY, CANARY, STABLE)
    assert wire.look(busy(0, NOW - 500, NOW), NOW) is None
    assert wire.look(busy(1, NOW - 500, NOW + 300), NOW + 300) is None, "its first request for a while has just begun"
    assert wire.look(busy(1, NOW + 330, NOW + 350), NOW + 350) is None, "it has finished one since"
    assert wire.look(busy(0, NOW + 330, NOW + 380), NOW + 380) is None
    assert wire.look(busy(1, NOW + 330, NOW + 400), NOW + 415) is None


def test_when_stable_is_silent_too_it_is_not_the_release() -> None:
    wire = Tripwire(POLICY, CANARY, STABLE)
    assert wire.look(busy(3, None, NOW - 1), NOW) is None
    assert wire.look(busy(3, None, NOW - 1), NOW + 100) is None


def test_a_clock_set_back_begins_anew() -> None:
    wire = Tripwire(POLICY, CANARY, STABLE)
    assert wire.look(busy(1, None, NOW), NOW) is None
    assert wire.look(busy(1, None, NOW - 500), NOW - 500) is None
    assert wire.look(busy(1, None, NOW - 450), NOW - 450) is None
    assert wire.look(busy(1, None, NOW - 440), NOW - 440) is not None


def test_a_clock_that_jumps_ahead_is_no_silence() -> None:
    wire = Tripwire(POLICY, CANARY, STABLE)
    assert wire.look(busy(1, None, NOW), NOW) is None
    assert wire.look(busy(1, None, NOW + 1), NOW + 1) is None
    wire.moved(3600)
    assert wire.look(busy(1, None, NOW + 1), NOW + 3602) is None
    assert wire.look(busy(1, None, NOW + 3610), NOW + 3660) is not None, "it has been silent for 60 s by any clock"
