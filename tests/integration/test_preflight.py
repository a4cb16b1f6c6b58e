"""The network preflight over loop-back with gloo: it passes, and it names who is missing or died, in seconds."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sluice.training.preflight import LADDER
from sluice.training.preflight_launch import PreflightPlan, run_preflight
from sluice.training.preflight_report import PreflightReport, report_from_json

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

SLOW = """
import os, signal, sys, time
from sluice.training import preflight
enter = preflight.Preflight._enter
def entering(self, stage):
    if stage.endswith("4 MiB") and self._place.rank == int(os.environ["VICTIM"]):
        if os.environ["DOES"] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    enter(self, stage)
preflight.Preflight._enter = entering
preflight.main(sys.argv[1:])
"""
"""The process, but the victim dies or hangs in the middle of the ladder."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def misbehave(victim: int, does: str, run_s: int, folder: Path) -> tuple[PreflightReport, list[int]]:
    """Two processes of one node, the verdict and the exit codes."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"VICTIM": str(victim), "DOES": does, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    out = folder / "report.json"
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                SLOW,
                "--node-type=laptop",
                "--backend=gloo",
                f"--out={out}",
                f"--run-seconds={run_s}",
            ],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        codes = [process.wait(100) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return report_from_json(out.read_text()), codes


def test_two_nodes_pass_and_both_get_the_verdict() -> None:
    port = free_port()
    reports: dict[int, PreflightReport] = {}

    def node(rank: int) -> None:
        reports[rank] = run_preflight(PreflightPlan("laptop", "gloo", 1, nodes=2, node_rank=rank, port=port))

    threads = [threading.Thread(target=node, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert reports[0].passed, reports[0].to_text()
    assert reports[1].to_json() == reports[0].to_json()
    assert [rung.size for rung in reports[0].rungs] == list(LADDER["gloo"])
    assert all(rung.correct and rung.bus_bandwidth > 0 for rung in reports[0].rungs)
    assert reports[0].latency_us is not None
    assert 1 < reports[0].latency_us < 1e6
    # The other node's clock was compared, and two processes of one machine agree.
    skew = reports[0].facts[1].skew_s
    assert skew is not None
    assert abs(skew) < 1


def test_a_node_that_never_comes_is_named_in_seconds() -> None:
    report = run_preflight(PreflightPlan("laptop", "gloo", 1, nodes=3, port=free_port(), join_s=2))
    (finding,) = report.findings
    assert (finding.cause, finding.blocking) == ("rank_missing", True)
    assert "node 1, node 2 never came: waited 2 s, 1 of 3 did" in finding.sentence
    assert report.seconds < 10


def test_a_process_that_dies_is_named(tmp_path: Path) -> None:
    report, codes = misbehave(1, "die", 60, tmp_path)
    assert codes == [1, -signal.SIGKILL]
    (finding,) = report.findings
    assert finding.cause == "rank_died"
    assert "process 1 (node 0) ended during the all-reduce of 4 MiB" in finding.sentence
    # What was measured before is kept.
    assert len(report.rungs) == 3


def test_a_process_that_hangs_is_named_and_nobody_waits_for_it(tmp_path: Path) -> None:
    report, codes = misbehave(1, "hang", 10, tmp_path)
    assert codes == [1, 1]
    (finding,) = report.findings
    assert finding.cause == "timeout"
    assert "the all-reduce of 4 MiB did not end within 10 s" in finding.sentence
    assert "Behind the others: process 1 (node 0)." in finding.sentence
    # It would have slept for a minute.
    assert report.seconds < 20
