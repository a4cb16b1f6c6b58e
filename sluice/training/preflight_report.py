"""What a network preflight found: pure values, the judgement, and how people and programs read it.

Algorithm bandwidth is S / t, bus bandwidth of an all-reduce S / t x 2 (n - 1) / n for S bytes, t seconds and n
processes: the speed of the slowest link, whatever n is. Source: NVIDIA's nccl-tests, doc/PERFORMANCE.md.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sluice.training.node_types import NodeType
from sluice.training.preflight_floors import Floor

CAUSES = {
    "rank_missing": "a process never came",
    "rank_died": "a process ended in the middle",
    "timeout": "the whole took longer than it may",
    "no_efa_provider": "NCCL does not use EFA between nodes",
    "device_count": "a node has fewer accelerators or EFA devices than its type",
    "device_shared": "two processes use one accelerator",
    "bandwidth_below_floor": "an all-reduce is slower than it must be",
    "wrong_sum": "an all-reduce gave a wrong result",
    "clock_skew": "a node's clock is off",
    "failed": "the collective library raised an error",
}
SKEW_WARNING_S = 1.0
SKEW_LIMIT_S = 60.0
"""Signatures and certificates become invalid: S3 refuses a request that is 15 minutes off, STS one of 5."""


@dataclass(frozen=True)
class Finding:
    """One problem: its name (a key of `CAUSES`), a sentence, and whether training must not start."""

    cause: str
    sentence: str
    blocking: bool = True


@dataclass(frozen=True)
class Facts:
    """What one process saw. `provider` is libfabric's, from NCCL's log; `network` NCCL's transport (None: no NCCL).

    `skew_s` is the node's clock minus node 0's, known within `skew_error_s` (only the first process of each node).
    """

    rank: int
    host: str
    node: int
    device: str
    accelerators: int
    efa_devices: int
    network: str | None = None
    provider: str | None = None
    skew_s: float | None = None
    skew_error_s: float = 0.0


@dataclass(frozen=True)
class Rung:
    """One message size of the ladder: bytes, and the mean seconds of an all-reduce on the slowest process."""

    size: int
    seconds: float
    processes: int
    correct: bool = True

    @property
    def algorithm_bandwidth(self) -> float:
        """GB/s."""
        return self.size / self.seconds / 1e9

    @property
    def bus_bandwidth(self) -> float:
        """GB/s; 0 for a single process, which sends nothing."""
        return self.algorithm_bandwidth * 2 * (self.processes - 1) / self.processes


@dataclass(frozen=True)
class PreflightReport:
    """Of one preflight. `seconds` since the roll call began; a report without rungs never got that far."""

    node_type: str
    nodes: int
    processes: int
    backend: str
    seconds: float
    rungs: tuple[Rung, ...] = ()
    floor: Mapping[int, float] = field(default_factory=dict)
    floor_source: str = ""
    facts: tuple[Facts, ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def passed(self) -> bool:
        return not any(finding.blocking for finding in self.findings)

    @property
    def latency_us(self) -> float | None:
        """Microseconds of the smallest all-reduce."""
        return min(self.rungs, key=lambda rung: rung.size).seconds * 1e6 if self.rungs else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, with what is derived beside what was measured."""
        rungs = [
            {
                "bytes": rung.size,
                "microseconds": rung.seconds * 1e6,
                "algorithm_gb_s": rung.algorithm_bandwidth,
                "bus_gb_s": rung.bus_bandwidth,
                "floor_gb_s": self.floor.get(rung.size),
                "correct": rung.correct,
            }
            for rung in self.rungs
        ]
        whole = asdict(self) | {"rungs": rungs, "passed": self.passed, "latency_us": self.latency_us}
        del whole["floor"]
        return whole

    def to_text(self) -> str:
        """A table and the findings, as a log shows it."""
        lines = [
            f"preflight: {self.nodes} x {self.node_type}, {self.processes} processes, {self.backend}, "
            f"{self.seconds:.1f} s"
        ]
        if self.rungs:
            lines.append(f"{'size':>10} {'time':>12} {'algorithm':>12} {'bus':>12} {'floor':>12}")
        for rung in self.rungs:
            floor = self.floor.get(rung.size)
            lines.append(
                f"{size_text(rung.size):>10} {rung.seconds * 1e6:>9.0f} us {rung.algorithm_bandwidth:>7.2f} GB/s "
                f"{rung.bus_bandwidth:>7.2f} GB/s " + (f"{floor:>7.2f} GB/s" if floor is not None else f"{'-':>12}")
            )
        if self.floor_source:
            lines.append(f"floor: {self.floor_source}")
        lines += [f"{'FAIL' if one.blocking else 'warn'} {one.cause}: {one.sentence}" for one in self.findings]
        lines.append("passed" if self.passed else "not passed: training must not start")
        return "\n".join(lines)


def report_from_json(text: str) -> PreflightReport:
    """The inverse of `to_json`."""
    whole = json.loads(text)
    processes = whole["processes"]
    rungs = tuple(Rung(one["bytes"], one["microseconds"] / 1e6, processes, one["correct"]) for one in whole["rungs"])
    return PreflightReport(
        whole["node_type"],
        whole["nodes"],
        processes,
        whole["backend"],
        whole["seconds"],
        rungs,
        {one["bytes"]: one["floor_gb_s"] for one in whole["rungs"] if one["floor_gb_s"] is not None},
        whole["floor_source"],
        tuple(Facts(**one) for one in whole["facts"]),
        tuple(Finding(**one) for one in whole["findings"]),
    )


def judge(
    facts: Sequence[Facts], rungs: Sequence[Rung], shape: NodeType | None, floor: Floor | None
) -> tuple[Finding, ...]:
    """All that is wrong, the most telling first. `shape` and `floor` are None where nothing is known to compare."""
    across = len({one.node for one in facts}) > 1
    found: list[Finding] = []
    if across and shape is not None and shape.efa_devices:
        found += _provider(facts)
    if shape is not None:
        found += _devices(facts, shape, across)
    used = Counter((one.host, one.device) for one in facts)
    for (host, device), count in used.items():
        if count > 1:
            ranks = ", ".join(str(one.rank) for one in facts if (one.host, one.device) == (host, device))
            found.append(Finding("device_shared", f"processes {ranks} on {host} all use {device}."))
    for rung in rungs:
        if not rung.correct:
            found.append(Finding("wrong_sum", f"an all-reduce of {size_text(rung.size)} added up to a wrong sum."))
        least = floor.bandwidth.get(rung.size) if floor is not None else None
        # "Not at least" rather than "below": a figure that is not a number does not pass.
        if least is not None and not rung.bus_bandwidth >= least:
            found.append(
                Finding(
                    "bandwidth_below_floor",
                    f"{rung.bus_bandwidth:.3g} GB/s of bus bandwidth at {size_text(rung.size)}; at least {least:g} "
                    "are expected.",
                )
            )
    return tuple(found + _clocks(facts))


def read_nccl_log(text: str) -> tuple[str | None, str | None]:
    """NCCL's transport and libfabric's provider as a log of NCCL_DEBUG=INFO names them; None for what it does not say.

    The lines: `NET/OFI Selected provider is efa, fabric is efa-direct (found 32 nics)` (older: `Selected Provider`) and
    `Using network AWS Libfabric`; sockets say `Using network Socket`.
    """
    network = re.findall(r"Using network (.+?)\s*$", text, re.MULTILINE)
    provider = re.findall(r"NET/OFI Selected [Pp]rovider is ([^\s,*]+)", text)
    return (network[-1] if network else None), (provider[-1] if provider else None)


def size_text(size: int) -> str:
    """1024 -> `1 KiB`."""
    for unit, value in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= value:
            return f"{size / value:g} {unit}"
    return f"{size} B"


def _provider(facts: Sequence[Facts]) -> list[Finding]:
    others = [one for one in facts if one.provider != "efa"]
    if not others:
        return []
    hosts = ", ".join(sorted({one.host for one in others}))
    used = sorted({one.provider or one.network or "nothing that its log names" for one in others})
    sentence = f"on {hosts} NCCL uses {', '.join(used)} between nodes, not EFA."
    if any("Socket" in (one.network or "") for one in others):
        sentence += " It fell back to TCP sockets: does the image have libnccl-net-$NCCL_NET_PLUGIN.so?"
    return [Finding("no_efa_provider", sentence)]


def _devices(facts: Sequence[Facts], shape: NodeType, across: bool) -> list[Finding]:
    found = []
    for host, one in {one.host: one for one in facts}.items():
        local = sum(other.host == host for other in facts)
        for have, least, what in (
            (one.accelerators, max(local, shape.accelerators if across else 0), "accelerators"),
            (one.efa_devices, shape.efa_devices if across else 0, "EFA devices"),
        ):
            if have < least:
                found.append(
                    Finding("device_count", f"{host} shows {have} {what}; a {shape.name} in this run needs {least}.")
                )
    return found


def _clocks(facts: Sequence[Facts]) -> list[Finding]:
    found = []
    for one in facts:
        # What the measurement cannot tell is not held against the node.
        off = max(0.0, abs(one.skew_s) - one.skew_error_s) if one.skew_s is not None else 0.0
        if off > SKEW_WARNING_S:
            sentence = f"the clock of {one.host} is {off:.1f} s off node 0's."
            found.append(Finding("clock_skew", sentence, blocking=off > SKEW_LIMIT_S))
    return found
