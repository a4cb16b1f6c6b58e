"""One training run as its processes read it: `job.json` in the work folder, written by `train`, read by every process.

work_dir/job.json, automodel.yaml, train.jsonl, validation.jsonl.in ...   what goes in
work_dir/metrics.jsonl, events.jsonl ...                                what is seen (`journal.py`)
work_dir/checkpoints/                                                    what a run resumes from
work_dir/export/, probes.json, hardware.json, outcome.json                what comes out
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sluice.infra.errors import IntegrityError
from sluice.training.recipe import Recipe

JOB_FILE, CONFIG_FILE, OUTCOME_FILE, HARDWARE_FILE = "job.json", "automodel.yaml", "outcome.json", "hardware.json"
CHECKPOINTS, EXPORT, LOG = "checkpoints", "export", "train.log"

Kind = Literal["finished", "paused", "interrupted", "stopped", "failed"]


@dataclass(frozen=True)
class Job:
    """What is trained, on what, how far. `last_step` is where this run pauses; the schedule's last step by default.

    `mirror` is where the object store keeps copies of the checkpoints; None for nowhere.
    """

    work_dir: Path
    base_dir: Path
    train_file: Path
    validation_file: Path | None
    recipe: Recipe
    last_step: int
    mirror: str | None = None

    @property
    def pauses(self) -> bool:
        """Whether the run ends before its schedule does, to go on later."""
        return self.last_step < self.recipe.schedule.max_steps

    def write(self) -> None:
        """Whole or not at all."""
        values = {
            "base_dir": str(self.base_dir),
            "train_file": str(self.train_file),
            "validation_file": str(self.validation_file) if self.validation_file else None,
            "recipe": self.recipe.to_json(),
            "last_step": self.last_step,
            "mirror": self.mirror,
        }
        replace_text(self.work_dir / JOB_FILE, json.dumps(values, indent=2))

    @classmethod
    def read(cls, work_dir: Path) -> Job:
        """Raises `IntegrityError` when the folder holds no job."""
        try:
            values = json.loads((work_dir / JOB_FILE).read_text(encoding="utf-8"))
            validation = values["validation_file"]
            return cls(
                work_dir,
                Path(values["base_dir"]),
                Path(values["train_file"]),
                Path(validation) if validation else None,
                Recipe.model_validate(values["recipe"], strict=False),
                int(values["last_step"]),
                values["mirror"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{work_dir / JOB_FILE} is no training job: {error}.") from error


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: `finished` (exported), `paused` at its last step, `interrupted` after a notice (saved),
    `stopped` by a guard, `failed` by an error that the next attempt would meet again."""

    kind: Kind
    step: int
    sentence: str
    best_step: int | None = None

    def write(self, work_dir: Path) -> None:
        replace_text(work_dir / OUTCOME_FILE, json.dumps(vars(self)))

    @classmethod
    def read(cls, work_dir: Path) -> Outcome | None:
        """None when no attempt has ended in an orderly way since `clear`."""
        try:
            values: dict[str, Any] = json.loads((work_dir / OUTCOME_FILE).read_text(encoding="utf-8"))
            return cls(**values)
        except (OSError, ValueError, TypeError):
            return None

    @staticmethod
    def clear(work_dir: Path) -> None:
        (work_dir / OUTCOME_FILE).unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    staging = path.with_name(f".{path.name}.partial")
    staging.write_text(text, encoding="utf-8")
    staging.replace(path)
