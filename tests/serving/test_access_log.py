from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.infra.errors import UnavailableError
from sluice.serving.access_log import AccessLog, parse_line
from sluice.serving.envoy_admin import Traffic
from sluice.serving.envoy_clusters import cluster_name, guarded_cluster, shadow_cluster
from sluice.serving.gateway_samples import GATEWAY_METRICS, GatewaySamples, ShadowSamples
from sluice.serving.observations import Observed
from tests.serving.samples import digest

CANARY, STABLE = digest("c"), digest("5")


def line(release: str = CANARY, **changes: Any) -> str:
    """A request that begins at 1000.5 and ends at 1001.4."""
    entry = {
        "ts": "1000.5", "request_id": "r", "traceparent": None, "session": "s", "route": "split",
        "cluster": cluster_name(release), "answered": release, "status": 200, "flags": "-", "total_ms": 900,
        "bytes": 100, "streamed": True, "ttft_ms": 120, "last_ms": 820, "tokens": 8, "text": True, "truncated": False,
        "ended": True, "error": False,
    }  # fmt: skip
    return json.dumps(entry | changes) + "\n"


class Counts:
    """What Envoy would count."""

    def __init__(self) -> None:
        self.finished: int | None = 0
        self.active = 0

    def traffic(self) -> dict[str, Traffic]:
        if self.finished is None:
            raise UnavailableError("Envoy does not answer.")
        return {CANARY: Traffic(begun=self.finished + self.active, active=self.active), STABLE: Traffic()}

    def rotate_log(self) -> None:
        """Nothing is large here."""


def observe(path: Path, since: float = 0, until: float = 2000) -> Observed:
    return GatewaySamples(AccessLog(path), Counts()).observe(CANARY, STABLE, since, until)


def values(found: Observed, metric: str, release: str = CANARY) -> list[float]:
    return [one.value for one in found.samples if (one.metric, one.release) == (metric, release)]


def test_each_request_is_what_its_user_noticed(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    path.write_text(
        line()
        + line(status=503, flags="UF", streamed=False, text=False, ttft_ms=None, total_ms=3, request_id="down")
        + line(ended=False)
        + line(error=True)
        + line(text=False, ttft_ms=None, last_ms=None, tokens=0)
        + line(truncated=True, tokens=2)
        + line(cluster=guarded_cluster(CANARY), answered=STABLE)
        + line(flags="DC", ended=False)  # the client left: nobody's failure
        + line(route="forced-canary", status=500)  # a probe
        + line(route="shadow", cluster=shadow_cluster(CANARY), status=500)
        + line(STABLE, streamed=False, total_ms=0, ttft_ms=0)
    )
    found = observe(path)
    wrong = {one.detail for one in found.samples if one.metric == "error_rate" and one.value}
    assert wrong == {
        "HTTP 503 (UF)", "stream ended early", "error inside the stream", "no server of it answered; stable did"
    }  # fmt: skip
    assert sorted(values(found, "error_rate")) == [0, 0, 0, 1, 1, 1, 1]
    assert sorted(values(found, "empty_answers")) == [0, 0, 1]
    assert sorted(values(found, "truncated_answers")) == [0, 0, 1]
    assert values(found, "time_to_first_token") == [120, 120]
    assert values(found, "time_per_token") == [100]
    assert values(found, "total_time") == [900, 900, 900]
    # Ratios need more than nothing.
    assert values(found, "total_time", STABLE) == [0.5]
    assert {one.known for one in found.samples if one.request_id == "down"} == {1000.503}
    assert (found.active, dict(found.missing)) == ({CANARY: 0, STABLE: 0}, {})
    assert found.finished == {CANARY: 1001.4, STABLE: 1001.4}


def test_a_server_that_takes_and_never_answers_has_finished_nothing(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    path.write_text(line(flags="DC", status=0) + line(flags="UT", status=504))
    counts = Counts()
    counts.active = 3
    found = GatewaySamples(AccessLog(path), counts).observe(CANARY, STABLE, 0, 2000)
    assert (found.active[CANARY], found.finished) == (3, {})
    assert [one.detail for one in found.samples] == ["HTTP 504 (UT)"]


def test_a_log_that_cannot_be_trusted_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    assert "does not exist" in observe(path).missing["error_rate"]
    assert set(observe(path).missing) == set(GATEWAY_METRICS)
    path.write_text(line() * 3)
    source = GatewaySamples(AccessLog(path), Counts())
    assert not source.observe(CANARY, STABLE, 0, 2000).missing
    os.truncate(path, 100)
    assert "was cut" in source.observe(CANARY, STABLE, 2000, 2001).missing["total_time"]
    assert not source.observe(CANARY, STABLE, 2001, 2100).missing
    path.write_bytes(b"{}\n\x00\xff\n" + line().encode())
    assert "damaged" in observe(path).missing["error_rate"]


def test_requests_that_finish_and_are_not_logged_are_missed(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    path.write_text("")
    counts = Counts()
    source = GatewaySamples(AccessLog(path), counts)
    assert not source.observe(CANARY, STABLE, 0, 2000).missing
    counts.finished = 10
    assert not source.observe(CANARY, STABLE, 2000, 2001).missing  # their lines may be on the way
    assert "finished 10 requests and logged 0" in source.observe(CANARY, STABLE, 2001, 2007).missing["error_rate"]
    path.write_text(line() * 10)
    assert not source.observe(CANARY, STABLE, 2007, 2008).missing
    counts.finished = 3  # Envoy began anew
    assert not source.observe(CANARY, STABLE, 2008, 2020).missing
    counts.finished = None
    unknown = source.observe(CANARY, STABLE, 2020, 2030)
    assert (unknown.active, dict(unknown.missing)) == ({}, {})


def test_a_shadow_is_paired_with_what_its_user_got(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"

    def shadow(request: str, **changes: Any) -> str:
        return line(CANARY, cluster=shadow_cluster(CANARY), route="shadow", request_id=request, **changes)

    path.write_text(
        line(STABLE, request_id="a") + shadow("a", total_ms=9500, status=500)
        + line(STABLE, request_id="b")  # its shadow is not there yet
        + shadow("c")  # nobody's
        + line(CANARY, request_id="d") + shadow("d")  # the canary's own user
    )  # fmt: skip
    source = ShadowSamples(AccessLog(path), Counts())
    assert not source.observe(CANARY, STABLE, 0, 1005).samples
    found = source.observe(CANARY, STABLE, 1005, 1100)
    assert {one.request_id for one in found.samples} == {"a"}
    assert {one.known for one in found.samples} == {1010.0}
    assert values(found, "error_rate") == [1]
    assert values(found, "error_rate", STABLE) == [0]
    with path.open("a") as stream:
        stream.write(shadow("b", total_ms=50_000))
    assert {one.request_id for one in source.observe(CANARY, STABLE, 1100, 1200).samples} == {"b"}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["write", "half", "late", "look", "rotate", "tell"]), max_size=30))
def test_no_line_is_lost_or_doubled_by_rotation_late_lines_or_half_ones(
    tmp_path_factory: pytest.TempPathFactory, events: list[str]
) -> None:
    path = tmp_path_factory.mktemp("log") / "access.jsonl"
    log = AccessLog(path)
    stream = path.open("a")
    now, written, asked, rest = 1000.0, 0, 0.0, ""
    seen: list[str] = []

    def write(begun: float) -> str:
        nonlocal written
        written += 1
        return line(ts=str(begun - 0.9), request_id=str(written))

    def look(until: float) -> float:
        stream.flush()
        seen.extend(one.request_id for one in log.read(asked, until))
        return until

    for event in events:
        now += 1.0
        if event in ("write", "late"):
            stream.write(rest + write(now if event == "write" else now - 5))
            rest = ""
        elif event == "half":
            whole = rest + write(now)
            stream.write(whole[:40] if not rest else "")
            rest = whole[40:] if not rest else whole
        elif event == "look":
            asked = look(now)
        elif event == "rotate" and path.exists():
            path.rename(path.with_name(f"access.{int(now * 1e9)}.jsonl"))
        elif event == "tell" and not path.exists():
            stream.write(rest)
            rest = ""
            stream.close()
            stream = path.open("a")
    stream.write(rest)
    asked = look(now + 10)
    look(now + 20)
    stream.close()
    assert sorted(seen, key=int) == [str(number + 1) for number in range(written)]
    assert not log.trouble(now + 20)


def test_a_line_without_its_fields_is_damaged_and_one_without_a_release_is_nobodys() -> None:
    assert parse_line(json.dumps({"cluster": "-"}).encode()) is None
    for damaged in (b"[]", b"not json", b"\xff", json.dumps({"cluster": cluster_name(CANARY), "ts": "1"}).encode()):
        with pytest.raises(ValueError, match=r"access log|Expecting|decode"):
            parse_line(damaged)


def test_after_a_clock_was_set_back_releases_finish_requests_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    path.write_text(line())
    source = GatewaySamples(AccessLog(path), Counts())
    before = source.observe(CANARY, STABLE, 0, 2000).finished[CANARY]
    with path.open("a") as log:
        log.write(line(ts="500.000000"))
    source.observe(CANARY, STABLE, 500, 600)
    assert source.observe(CANARY, STABLE, 600, 700).finished[CANARY] < before
