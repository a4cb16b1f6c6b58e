"""What every process of a training run executes: `torchrun ... -m sluice.training.entry CONFIG LOCK HARDWARE`.

NeMo AutoModel's stock fine-tuning recipe, with five additions: it runs without CUDA (cpu_compatibility), writes each
step's metrics at once (the stock logger holds back 100 and loses them when killed), projects only answer tokens
(answer_columns), leaves the scores of the probe prompts (round_trip), and ends when the process that launched the run
is gone.
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
    """Train as CONFIG says; rank 0 leaves a description of the hardware in HARDWARE."""
    config, lock, hardware = (Path(argument) for argument in arguments)
    exit_with_launcher(lock)
    for name in NOT_NEEDED:
        # None makes `import name` raise ModuleNotFoundError, as if it were not installed; callers handle that.
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]

    from sluice.training import cpu_compatibility
    from sluice.training.answer_columns import keep_answer_columns
    from sluice.training.round_trip import PROBES_FILE, probe, write_probes

    cpu_compatibility.install()

    from nemo_automodel.components.config.loader import load_yaml_config
    from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction

    class AnswerFinetuning(TrainFinetuneRecipeForNextTokenPrediction):  # type: ignore[misc]
        def _forward_backward_step(self, idx: int, batch: dict[str, Any], **options: Any) -> None:
            super()._forward_backward_step(idx, keep_answer_columns(batch), **options)

        def log_train_metrics(self, log_data: Any) -> None:
            super().log_train_metrics(log_data)
            if self.dist_env.is_main:
                self.metric_logger_train.flush()

        def log_val_metrics(self, val_name: str, log_data: Any, metric_logger: Any = None) -> None:
            super().log_val_metrics(val_name, log_data, metric_logger)
            if self.dist_env.is_main and metric_logger is not None:
                metric_logger.flush()

        def save_checkpoint(self, epoch: int, step: int, *values: Any, **options: Any) -> None:
            # Before the checkpoint: once that is complete, nothing of the run is missing.
            if step + 1 >= self.step_scheduler.max_steps:
                base = Path(self.cfg.model.pretrained_model_name_or_path)
                found = probe(self.model_parts[0], base, self.dist_env.device)
                if self.dist_env.is_main:
                    write_probes(found, hardware.with_name(PROBES_FILE))
            super().save_checkpoint(epoch, step, *values, **options)

    recipe = AnswerFinetuning(load_yaml_config(config))
    recipe.setup()
    if recipe.dist_env.is_main:
        hardware.write_text(json.dumps(describe_hardware()), encoding="utf-8")
    recipe.run_train_validation_loop()


if __name__ == "__main__":
    main(sys.argv[1:])
