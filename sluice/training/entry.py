"""What every process of a training run executes: `torchrun ... -m sluice.training.entry WORK_DIR LOCK`.

NeMo AutoModel's fine-tuning recipe as `finetuning.py` extends it. Here: the process ends when its launcher is gone or
when it hangs, and an error that a restart would meet again is written down so that none is tried.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import sys
import threading
import time
from pathlib import Path
from typing import Any

NOT_NEEDED = ("mlflow", "wandb", "comet_ml", "sklearn", "tensorboard")
"""Optional imports of AutoModel and transformers that take seconds in every process and serve nothing here."""


def exit_with_launcher(lock: Path, interval_s: float = 0.5) -> None:
    """End this process within `interval_s` when nobody holds `lock` any more, or when torchrun's agent is gone.

    The launcher holds an exclusive lock on the file while the run is wanted. The kernel releases it however the
    launcher ends, so not even kill -9 leaves processes (and on a cluster their accelerators) behind.
    """
    parent = os.getppid()
    handle = os.open(lock, os.O_RDONLY)

    def watch() -> None:
        while os.getppid() == parent:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(interval_s)
                continue
            break
        os._exit(70)

    threading.Thread(target=watch, name="exit-with-launcher", daemon=True).start()


def describe_hardware() -> dict[str, Any]:
    """Device, processor, cores and library versions of this process, for the record of the run."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "accelerators": torch.cuda.device_count() if cuda else 0,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main(arguments: list[str]) -> None:
    """Train the job of WORK_DIR; process 0 leaves a description of the hardware."""
    work_dir, lock = (Path(argument) for argument in arguments)
    exit_with_launcher(lock)
    rank = int(os.environ["RANK"])
    from sluice.training.job import CONFIG_FILE, HARDWARE_FILE, Job
    from sluice.training.journal import Event, Journal
    from sluice.training.watch import Watch

    job, journal = Job.read(work_dir), Journal(work_dir)
    where = job.recipe.parallelism
    watch = Watch(
        work_dir,
        rank,
        where.collective_timeout_minutes * 60,
        world_size=where.world_size,
        tell=lambda finding: journal.write(Event("hang", finding, level="error")),
    )
    for name in NOT_NEEDED:
        # None makes `import name` raise ModuleNotFoundError, as if it were not installed; callers handle that.
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]

    from sluice.training import cpu_compatibility

    cpu_compatibility.install()

    from nemo_automodel.components.config.loader import load_yaml_config

    from sluice.training.finetuning import LONG_S, FineTuning

    recipe = FineTuning(load_yaml_config(work_dir / CONFIG_FILE), job, watch)
    with watch:
        try:
            with watch.allow("start-up", LONG_S):
                recipe.setup()
            if rank == 0:
                (work_dir / HARDWARE_FILE).write_text(json.dumps(describe_hardware()), encoding="utf-8")
            recipe.run()
        except Exception as error:
            _note_failure(work_dir, recipe.done, error)
            raise


def _note_failure(work_dir: Path, step: int, error: Exception) -> None:
    """Write an error down that every restart would meet again. An echo of another process's end is none."""
    from sluice.infra.errors import SluiceError
    from sluice.training.failures import is_echo
    from sluice.training.job import Outcome

    said = str(error) if isinstance(error, SluiceError) else f"{type(error).__name__}: {error}"
    if not is_echo(said):
        Outcome("failed", step, said[:2000]).write(work_dir)


if __name__ == "__main__":
    main(sys.argv[1:])
