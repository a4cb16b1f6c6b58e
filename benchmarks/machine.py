"""Where, when and of what a benchmark's figures were made: the first part of its result file."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Where and when this ran, and of what."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit, changed = (
        subprocess.run([*git, *more], capture_output=True, text=True, check=False).stdout.strip()
        for more in (("rev-parse", "HEAD"), ("status", "--short", "--untracked-files=no"))
    )
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit + (" with changes" if changed else ""),
        "processor": cpu[0].partition(":")[2].strip() if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    } | {name: version(name) for name in ("numpy", "scipy")}
