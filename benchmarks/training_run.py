"""One timed training run through the product's entry point, and what a result has to say of its machine.

All that the training benchmarks know of the trainer stands here: `train_until` and the journal that it leaves.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import statistics
import subprocess
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sluice.training.journal import Journal
from sluice.training.recipe import Recipe
from sluice.training.train import train_until

WARM_UP = 2
"""Steps that are not counted: the first ones allocate, and compile."""


@dataclass(frozen=True)
class Run:
    """One start of the training processes: seconds of each step after the warm-up, and until the first one began.

    Tokens are those of the counted steps; `memory_gib` is the peak of the fullest accelerator, or of process 0.
    """

    times: list[float]
    start_up_s: float
    first_loss: float
    memory_gib: float
    label_tokens: int
    tokens: int

    @property
    def step_s(self) -> float:
        return statistics.median(self.times)


def train_and_time(base: Path, dataset: Path, recipe: Recipe, work: Path, steps: int) -> Run:
    """Train `steps` steps in a new work folder, then pause: nothing is exported or loaded again. A step's time is the
    wall time from the end of the one before, so data, logging and saving count."""
    launched = time.time()
    train_until(steps, base, dataset, recipe, work)
    lines = Journal(work).steps()
    ends = [line.time for line in lines]
    counted = lines[WARM_UP:]
    return Run(
        [after - before for before, after in itertools.pairwise(ends)][WARM_UP - 1 :],
        lines[0].time - lines[0].seconds - launched,
        lines[0].loss,
        max(line.memory_gib for line in lines),
        sum(line.label_tokens for line in counted),
        sum(line.tokens for line in counted),
    )


def machine() -> dict[str, Any]:
    """Hardware, versions, commit and load: without them a figure says nothing."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run(["git", "status", "--short"], capture_output=True, text=True, check=False).stdout.strip()
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    packages = ("torch", "nemo-automodel", "transformers", "peft")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit + (" with changes" if changed else ""),
        "processor": cpu[0].partition(":")[2].strip() if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    } | {name: importlib.metadata.version(name) for name in packages}
