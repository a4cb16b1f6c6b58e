"""The judgement of a preflight, NCCL's log, and the floors; running it is in tests/integration/test_preflight.py."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from sluice.infra.errors import StepFailed
from sluice.training.node_types import NODE_TYPES, find_node_type
from sluice.training.preflight import LADDER, Place, count_efa_devices
from sluice.training.preflight_floors import FLOORS, MIB, floor_of
from sluice.training.preflight_launch import require_passed
from sluice.training.preflight_report import (
    CAUSES,
    Facts,
    Finding,
    PreflightReport,
    Rung,
    judge,
    read_nccl_log,
    report_from_json,
    size_text,
)

P5 = find_node_type("p5.48xlarge")
GIB = 1024 * MIB


def two_nodes() -> list[Facts]:
    """Sixteen processes as they should be."""
    return [
        Facts(r, f"host-{r // 8}", r // 8, f"GPU {r}", 8, 32, "AWS Libfabric", "efa", 0.001 if r % 8 == 0 else None)
        for r in range(16)
    ]


def rung(bus_bandwidth: float, size: int = GIB, processes: int = 16) -> Rung:
    return Rung(size, size * 2 * (processes - 1) / processes / (bus_bandwidth * 1e9), processes)


def causes(facts: list[Facts], *rungs: Rung) -> list[tuple[str, bool]]:
    return [(one.cause, one.blocking) for one in judge(facts, rungs, P5, floor_of("p5.48xlarge", 2))]


def test_bandwidths_are_those_of_nccl_tests() -> None:
    # A line of AWS's table for two p5.48xlarge: 1 GiB in 4607.6 us is 233.04 and 436.95 GB/s.
    line = Rung(GIB, 4607.6e-6, 16)
    assert line.algorithm_bandwidth == pytest.approx(233.04, abs=0.01)
    assert line.bus_bandwidth == pytest.approx(436.95, abs=0.01)
    assert Rung(GIB, 1.0, 1).bus_bandwidth == 0


def test_a_good_network_passes() -> None:
    assert causes(two_nodes(), rung(437), rung(343, 256 * MIB), Rung(8, 70e-6, 16)) == []


def test_sockets_in_place_of_efa_are_named() -> None:
    facts = [replace(one, network="Socket", provider=None) if one.node else one for one in two_nodes()]
    (finding,) = judge(facts, [], P5, None)
    assert finding.cause == "no_efa_provider"
    assert "on host-1 NCCL uses Socket" in finding.sentence
    assert "fell back to TCP sockets" in finding.sentence
    # The plugin is there, but libfabric chose TCP.
    facts = [replace(one, provider="tcp;ofi_rxm") for one in two_nodes()]
    assert "NCCL uses tcp;ofi_rxm" in judge(facts, [], P5, None)[0].sentence
    # A log that says nothing is no proof of EFA.
    assert causes([replace(one, provider=None, network=None) for one in two_nodes()]) == [("no_efa_provider", True)]


def test_one_node_needs_no_provider_and_no_efa() -> None:
    facts = [replace(one, provider=None, network=None, efa_devices=0) for one in two_nodes()[:8]]
    assert judge(facts, [], P5, floor_of("p5.48xlarge", 1)) == ()


@pytest.mark.parametrize(("accelerators", "efa_devices"), [(7, 32), (8, 31)])
def test_a_node_that_shows_too_few_devices_is_named_once(accelerators: int, efa_devices: int) -> None:
    facts = [
        replace(one, accelerators=accelerators, efa_devices=efa_devices) if one.node else one for one in two_nodes()
    ]
    (finding,) = judge(facts, [], P5, None)
    assert (finding.cause, finding.blocking) == ("device_count", True)
    assert f"host-1 shows {7 if accelerators == 7 else 31}" in finding.sentence


def test_two_processes_on_one_device_are_named() -> None:
    facts = two_nodes()
    facts[3] = replace(facts[3], device="GPU 2")
    (finding,) = judge(facts, [], P5, None)
    assert finding.cause == "device_shared"
    assert "processes 2, 3 on host-0" in finding.sentence
    # The same name on another host is another device.
    facts[3] = replace(facts[3], device="GPU 10")
    assert judge(facts, [], P5, None) == ()


@pytest.mark.parametrize("bandwidth", [217.0, 21.0, math.nan])
def test_a_slow_network_and_a_figure_that_is_none_do_not_pass(bandwidth: float) -> None:
    assert causes(two_nodes(), rung(bandwidth)) == [("bandwidth_below_floor", True)]
    assert causes(two_nodes(), rung(218.1)) == []


def test_a_wrong_sum_is_worse_than_slow() -> None:
    assert causes(two_nodes(), replace(rung(437), correct=False)) == [("wrong_sum", True)]


@pytest.mark.parametrize(
    ("skew", "error", "expected"),
    [
        (0.9, 0.0, []),
        (-5.0, 0.1, [("clock_skew", False)]),
        (120.0, 0.1, [("clock_skew", True)]),
        # What the measurement cannot tell is not held against the node.
        (5.0, 4.5, []),
    ],
)
def test_clocks(skew: float, error: float, expected: list[tuple[str, bool]]) -> None:
    facts = two_nodes()
    facts[8] = replace(facts[8], skew_s=skew, skew_error_s=error)
    assert causes(facts) == expected


@pytest.mark.parametrize(
    ("log", "network", "provider"),
    [
        (
            "ip-10-0-1-2:7:9 [3] NCCL INFO NET/OFI Selected provider is efa, fabric is efa-direct (found 32 nics)\n"
            "ip-10-0-1-2:7:9 [3] NCCL INFO Using network AWS Libfabric\n",
            "AWS Libfabric",
            "efa",
        ),
        ("h:1:2 [0] NCCL INFO NET/OFI Selected Provider is efa*\n", None, "efa"),
        ("h:1:2 [0] NCCL INFO NET/OFI Selected Provider is tcp;ofi_rxm\n", None, "tcp;ofi_rxm"),
        (
            "h:1:2 [0] NCCL INFO NET/Plugin: Could not find: libnccl-net-aws-ofi.so\n"
            "h:1:2 [0] NCCL INFO NET/Socket : Using [0]eth0:10.1.1.203<0>\nh:1:2 [0] NCCL INFO Using network Socket\n",
            "Socket",
            None,
        ),
        ("", None, None),
    ],
)
def test_what_nccl_says_it_uses(log: str, network: str | None, provider: str | None) -> None:
    assert read_nccl_log(log) == (network, provider)


def test_a_device_counts_when_the_container_can_open_it(tmp_path: Path) -> None:
    classes, handles = tmp_path / "class", tmp_path / "dev"
    assert count_efa_devices(classes, handles) == 0
    for number in range(4):
        (classes / f"rdmap{number}s0").mkdir(parents=True)
    handles.mkdir()
    for number in range(3):
        (handles / f"uverbs{number}").touch()
    (handles / "rdma_cm").touch()
    assert count_efa_devices(classes, handles) == 3


def test_whole_nodes_are_named_as_such() -> None:
    place = Place(0, 8, 0, 2, "a", 1, False)
    assert (place.nodes, place.node, Place(5, 8, 1, 2, "a", 1, False).node) == (4, 0, 2)
    assert place.named([1, 4, 5]) == "all 2 processes of node 2, process 1 (node 0)"


def test_each_floor_is_measured_and_no_floor_is_above_what_was_published() -> None:
    # Two p5.48xlarge and two p4de.24xlarge as AWS published them, in GB/s.
    published = {64 * MIB: (209.19, 47.58), 256 * MIB: (342.81, 69.89), GIB: (436.95, 76.79)}
    for size, (p5, p4de) in published.items():
        for node_type, measured in (("p5.48xlarge", p5), ("p4de.24xlarge", p4de)):
            floor = floor_of(node_type, 2)
            assert floor is not None
            assert 0.4 * measured < floor.bandwidth[size] <= 0.5 * measured
    for node_type, floors in FLOORS.items():
        ladder = LADDER["gloo" if node_type == "laptop" else "nccl"]
        for floor in (floors.within, floors.across):
            assert set(floor.bandwidth) <= set(ladder), "a floor at a size that nobody measures judges nothing"
            assert floor.source
    assert set(FLOORS) <= set(NODE_TYPES)
    assert floor_of("unknown", 2) is None


def test_a_report_survives_json_and_says_its_findings() -> None:
    finding = Finding("rank_missing", "all 8 processes of node 3 never came.")
    report = PreflightReport("p5.48xlarge", 4, 16, "nccl", 3.5, (rung(400),), {GIB: 218.0}, "AWS", tuple(two_nodes()))
    for one in (report, replace(report, findings=(finding,)), PreflightReport("laptop", 1, 2, "gloo", 0.1)):
        again = report_from_json(json.dumps(one.to_json()))
        assert (again.passed, again.findings, again.facts, again.floor) == (
            one.passed,
            one.findings,
            one.facts,
            one.floor,
        )
        assert [r.size for r in again.rungs] == [r.size for r in one.rungs]
        assert again.to_text() == one.to_text()
    failed = replace(report, findings=(finding,))
    assert "FAIL rank_missing: all 8 processes of node 3" in failed.to_text()
    assert failed.to_json()["rungs"][0]["bus_gb_s"] == pytest.approx(400)
    require_passed(report)
    with pytest.raises(StepFailed, match="rank_missing: all 8 processes of node 3"):
        require_passed(failed)
    # A warning alone does not stop a training.
    require_passed(replace(report, findings=(replace(finding, blocking=False),)))
    assert finding.cause in CAUSES


def test_sizes_as_people_say_them() -> None:
    assert [size_text(n) for n in (8, 64 * 1024, MIB, GIB)] == ["8 B", "64 KiB", "1 MiB", "1 GiB"]
