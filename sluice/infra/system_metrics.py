"""What the machine does: processor, memory, disk, network and NVIDIA accelerators, under MLflow's own names.

MLflow's monitor would bring its whole client along (seconds of processor time, hundreds of MB) beside a training that
needs both. Names and units are those of `mlflow.system_metrics`, which a test compares, so that MLflow's page draws
them: https://mlflow.org/docs/latest/system-metrics/
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MEGABYTE = 1e6


class SystemMetrics:
    """Reads the machine; `folder` is on the disk to look at. Network counts from the first reading."""

    def __init__(self, folder: Path = Path("/"), every_s: float = 10.0) -> None:
        import psutil

        self.every_s = every_s
        self._folder = folder
        self._network = psutil.net_io_counters()
        # The first call has nothing to compare with and says 0.
        psutil.cpu_percent()
        self._nvml, self._devices = _open_accelerators()

    def read(self) -> dict[str, float]:
        """Values by name, of this moment (processor: since the last reading)."""
        import psutil

        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(str(self._folder)), psutil.net_io_counters()
        return {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system_memory_usage_percentage": memory.used / memory.total * 100,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / MEGABYTE,
            "disk_available_megabytes": disk.free / MEGABYTE,
            "network_receive_megabytes": (network.bytes_recv - self._network.bytes_recv) / MEGABYTE,
            "network_transmit_megabytes": (network.bytes_sent - self._network.bytes_sent) / MEGABYTE,
            **self._accelerators(),
        }

    def _accelerators(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for number, device in enumerate(self._devices):
            for one in (_memory, _utilization, _power):
                try:
                    found |= {f"gpu_{number}_{name}": round(value, 1) for name, value in one(self._nvml, device)}
                except self._nvml.NVMLError:
                    # Some devices do not tell everything (a MIG slice has no utilisation).
                    continue
        return found


def _memory(nvml: Any, device: Any) -> Iterator[tuple[str, float]]:
    memory = nvml.nvmlDeviceGetMemoryInfo(device)
    yield "memory_usage_percentage", memory.used / memory.total * 100
    yield "memory_usage_megabytes", memory.used / MEGABYTE


def _utilization(nvml: Any, device: Any) -> Iterator[tuple[str, float]]:
    yield "utilization_percentage", nvml.nvmlDeviceGetUtilizationRates(device).gpu


def _power(nvml: Any, device: Any) -> Iterator[tuple[str, float]]:
    watts = nvml.nvmlDeviceGetPowerUsage(device) / 1000
    yield "power_usage_watts", watts
    yield "power_usage_percentage", watts / (nvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1000) * 100


def _open_accelerators() -> tuple[Any, list[Any]]:
    """NVML and a handle of each device; none without the package `nvidia-ml-py` or without a driver."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None, []
    try:
        nvml.nvmlInit()
        return nvml, [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError:
        return nvml, []
