from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sluice.serving.access_log import AccessLog, GatewaySamples, parse_line, summarize
from sluice.serving.envoy_routes import cluster_name
from tests.serving.samples import digest

CANARY, STABLE = digest("c"), digest("5")


def line(release: str = CANARY, **changes: Any) -> str:
    entry = {
        "ts": "1000.5", "request_id": "r", "traceparent": None, "session": "s", "route": "split",
        "cluster": cluster_name(release), "status": 200, "flags": "-", "total_ms": 900, "bytes": 100,
        "streamed": True, "ttft_ms": 120, "chunks": 5, "text": True, "truncated": False, "ended": True, "error": False,
    }  # fmt: skip
    return json.dumps(entry | changes) + "\n"


def test_requests_are_counted_by_what_the_user_noticed(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    path.write_text(
        line()
        + line(status=500, ttft_ms=None, streamed=False, text=False, total_ms=3)
        + line(ended=False, flags="UPE")
        + line(error=True)
        + line(text=False, ttft_ms=None)
        + line(truncated=True)
        + line(flags="DC", ended=False)  # the client left: nobody's failure
        + line(route="forced-canary", status=500)  # a probe
        + line(STABLE)
    )
    found = summarize(AccessLog(path).read(1000, 1001), CANARY, 2, 1)
    assert (found.requests, found.errors, found.broken, found.empty, found.truncated) == (6, 1, 2, 1, 1)
    assert list(found.ttft_ms) == [120, 120]
    assert list(found.total_ms) == [900, 900, 900]
    assert (found.thumbs_up, found.thumbs_down, found.whole) == (2, 1, 3)


def test_the_log_is_read_as_it_grows_with_half_lines_and_rotation(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    log = AccessLog(path)
    assert len(log.read(0, 2000)) == 0
    path.write_text(line() + line()[:40])
    assert len(log.read(0, 2000)) == 1
    with path.open("a") as stream:
        stream.write(line()[40:] + "not json\n" + line(cluster="-") + line(ts="1500"))
    assert [sample.time for sample in log.read(0, 2000)] == [1000.5, 1000.5, 1500]
    assert [sample.time for sample in log.read(1001, 2000)] == [1500]
    path.rename(tmp_path / "access.jsonl.1")
    path.write_text(line(ts="1600"))
    assert [sample.time for sample in log.read(1400, 2000)] == [1500, 1600]


def test_a_line_without_its_fields_is_passed_over() -> None:
    assert parse_line(b"[]") is None
    assert parse_line(b'{"cluster": "release-x"}') is None
    assert parse_line(json.dumps({"cluster": cluster_name(CANARY), "ts": "x"}).encode()) is None


def test_feedback_is_joined_by_release(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    path.write_text(line() + line(STABLE))
    source = GatewaySamples(AccessLog(path), lambda release, *_: (3, 1) if release == CANARY else (0, 0))
    assert (source.samples(CANARY, 0, 2000).thumbs_up, source.samples(STABLE, 0, 2000).feedback) == (3, 0)
