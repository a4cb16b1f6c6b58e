"""Bus bandwidth that an all-reduce must reach on each node type, in GB/s (10^9 bytes), and where each figure is from.

A floor is to catch what is broken (TCP sockets instead of EFA, rails that are missing, a GPU that has lost its NVLink),
not what is a little slow. It is half of what is published where a measurement is, and 40% of the link's own speed where
only that is known. More nodes, other NCCL versions and neighbours stay above half; sockets reach a tenth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MIB = 2**20
_MEASURED = "half of AWS's nccl-tests on two nodes (awsome-distributed-training, micro-benchmarks/nccl-tests/README.md)"


@dataclass(frozen=True)
class Floor:
    """Least bus bandwidth in GB/s by message size in bytes, and its source in words."""

    bandwidth: Mapping[int, float]
    source: str


@dataclass(frozen=True)
class Floors:
    """Of one node type: for a run within one node, and for one over several."""

    within: Floor
    across: Floor


# All-reduce, out of place, at 64 MiB, 256 MiB and 1 GiB. p5.48xlarge: 209.2, 342.8 and 437.0 GB/s;
# p4de.24xlarge: 47.6, 69.9 and 76.8 GB/s.
_P5 = Floor({64 * MIB: 104.0, 256 * MIB: 171.0, 1024 * MIB: 218.0}, f"{_MEASURED}, p5.48xlarge")
_P4 = Floor({64 * MIB: 23.0, 256 * MIB: 34.0, 1024 * MIB: 38.0}, f"{_MEASURED}, p4de.24xlarge")


def _nvlink(name: str, one_way: float) -> Floor:
    """40% of a GPU's NVLink bandwidth in one direction, from 256 MiB on: latency hides it below."""
    floor = round(0.4 * one_way, 1)
    return Floor(
        {256 * MIB: floor, 1024 * MIB: floor}, f"40% of {one_way:g} GB/s, one direction of NVLink ({name}'s data sheet)"
    )


_SAME_NETWORK = "as p5.48xlarge: also 3200 Gb/s of EFA a node (AWS's list of accelerated instances), none measured"
_LIKE_P5 = Floor(_P5.bandwidth, _SAME_NETWORK)
_LOOPBACK = Floor(
    {MIB: 0.01, 16 * MIB: 0.01}, "generous: a busy laptop's loop-back does ten times as much; only a hang is below"
)

FLOORS: Mapping[str, Floors] = {
    "p4d.24xlarge": Floors(
        _nvlink("A100", 300), Floor(_P4.bandwidth, "as p4de.24xlarge: also 400 Gb/s of EFA a node, none measured")
    ),
    "p4de.24xlarge": Floors(_nvlink("A100", 300), _P4),
    "p5.48xlarge": Floors(_nvlink("H100", 450), _P5),
    "p5e.48xlarge": Floors(_nvlink("H200", 450), _LIKE_P5),
    "p5en.48xlarge": Floors(_nvlink("H200", 450), _LIKE_P5),
    "p6-b200.48xlarge": Floors(_nvlink("B200", 900), _LIKE_P5),
    "laptop": Floors(_LOOPBACK, _LOOPBACK),
}


def floor_of(node_type: str, nodes: int) -> Floor | None:
    """None for a node type without one: its bandwidth is measured and shown, and judged by nobody."""
    floors = FLOORS.get(node_type)
    return None if floors is None else (floors.across if nodes > 1 else floors.within)
