"""Running this node's part of the network preflight: start its processes, wait, bring the report.

report = run_preflight(PreflightPlan("p5.48xlarge", "nccl", processes=8, nodes=4, node_rank=2, address=...))
require_passed(report)          # raises StepFailed: training must not start
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from sluice.infra.errors import StepFailed
from sluice.infra.progress import Report, no_report
from sluice.training.preflight_report import Finding, PreflightReport, report_from_json


@dataclass(frozen=True)
class PreflightPlan:
    """One node's part. `processes` of this node; port 0 is a free one, for a preflight of one node.

    All nodes name the same address and port of node 0; not the training's own port, which may still be closing.
    `join_s` is what the slowest node may need to come (its image may be pulled), `run_s` the time for the rest.
    """

    node_type: str
    backend: str
    processes: int
    nodes: int = 1
    node_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    join_s: float = 60.0
    run_s: float = 60.0


def run_preflight(plan: PreflightPlan, report: Report = no_report) -> PreflightReport:
    """Take part, and bring the verdict that all nodes get. Never raises for what the network does: it is a finding."""
    report(0, 0, f"checking the network between {plan.nodes * plan.processes} processes")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sluice-preflight-") as folder:
        out, log = Path(folder) / "report.json", Path(folder) / "log"
        port = plan.port or _free_port()
        with log.open("wb") as stream:
            processes = [
                subprocess.Popen(
                    _command(plan, out),
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=_environment(plan, local_rank, port),
                    start_new_session=True,
                )
                for local_rank in range(plan.processes)
            ]
            try:
                _wait(processes, out, started + plan.join_s + plan.run_s + 15)
            finally:
                for process in processes:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if out.is_file():
            return report_from_json(out.read_text())
        ended = ", ".join(
            f"process {plan.node_rank * plan.processes + local} ended with {process.returncode}"
            for local, process in enumerate(processes)
            if process.returncode != 0
        )
        last = (log.read_text(errors="replace").strip().splitlines() or ["nothing was printed"])[-1]
        return PreflightReport(
            plan.node_type,
            plan.nodes,
            plan.nodes * plan.processes,
            plan.backend,
            time.monotonic() - started,
            findings=(Finding("rank_died", f"{ended or 'all ended'} without a verdict: {last[:300]}"),),
        )


def require_passed(report: PreflightReport) -> None:
    """Raises `StepFailed` with every blocking finding."""
    if not report.passed:
        said = " ".join(f"{one.cause}: {one.sentence}" for one in report.findings if one.blocking)
        raise StepFailed(
            f"The network preflight did not pass. {said}",
            hint="docs/cluster-training.md says what each cause means. Nothing was trained.",
        )


def _wait(processes: list[subprocess.Popen[bytes]], out: Path, deadline: float) -> None:
    """Until all have ended. One that ends with an error and leaves no report soon is not waited for by the others."""
    patience: float | None = None
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if patience is None and any(process.poll() for process in processes):
            patience = time.monotonic() + 10
        if patience is not None and time.monotonic() > patience and not out.is_file():
            return
        time.sleep(0.05)


def _command(plan: PreflightPlan, out: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "sluice.training.preflight",
        f"--node-type={plan.node_type}",
        f"--backend={plan.backend}",
        f"--join-seconds={plan.join_s}",
        f"--run-seconds={plan.run_s}",
        f"--out={out}",
    ]


def _environment(plan: PreflightPlan, local_rank: int, port: int) -> dict[str, str]:
    environment = dict(os.environ) | {
        "RANK": str(plan.node_rank * plan.processes + local_rank),
        "WORLD_SIZE": str(plan.nodes * plan.processes),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(plan.processes),
        "MASTER_ADDR": plan.address,
        "MASTER_PORT": str(port),
    }
    environment.setdefault("OMP_NUM_THREADS", "1")
    # A preflight that runs inside torchrun's environment has a store of its own.
    environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    if sys.platform == "linux" and plan.address == "127.0.0.1":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
