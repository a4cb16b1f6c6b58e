"""AutoModel's configuration of a job, with our rows in place of its data loaders. For training processes only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nemo_automodel.recipes._typed_config import RecipeConfig

from sluice.training.automodel import local_batch_size
from sluice.training.batches import plan_batches
from sluice.training.job import Job
from sluice.training.recipe import Recipe
from sluice.training.rows import AnswerRows, Collation, StepLoader, ValidationLoader


@dataclass(frozen=True)
class LoaderConfig:
    """Stands where AutoModel's recipe expects the configuration of a data loader, and builds ours."""

    job: Job
    training: bool
    packing: None = None
    emits_thd = False
    dataset_builds_on_all_ranks = True

    @property
    def seed(self) -> int:
        return self.job.recipe.seed

    def build(
        self, *, tokenizer: Any, dp_rank: int, dp_world_size: int, packing_contract: Any, **unused: Any
    ) -> StepLoader | ValidationLoader:
        """Called by AutoModel on every process, when the model stands and its kind of packing is known."""
        recipe, path = self.job.recipe, self.job.train_file if self.training else self.job.validation_file
        assert path is not None
        rows = AnswerRows.read(path, self.job.base_dir, tokenizer)
        packing = packing_contract if recipe.data.packing and self.training else None
        collate = Collation(rows, tokenizer.pad_token_id or 0, packing, _columns(recipe))
        schedule = recipe.schedule.model_copy(update={"micro_batch_size": local_batch_size(recipe)})
        if not self.training:
            return ValidationLoader(
                rows.lengths, collate, schedule.micro_batch_size, dp_rank=dp_rank, dp_size=dp_world_size
            )
        plan = plan_batches(rows.lengths, recipe.data, schedule, recipe.seed)
        return StepLoader(plan, collate, schedule, dp_rank=dp_rank, dp_size=dp_world_size)


class JobConfig(RecipeConfig):  # type: ignore[misc]
    """AutoModel's configuration with our rows in place of its data loaders."""

    def __init__(self, raw: Any, job: Job) -> None:
        super().__init__(raw)
        self.job = job

    @cached_property
    def dataloader(self) -> LoaderConfig:
        return LoaderConfig(self.job, training=True)

    @cached_property
    def validation_dataloaders(self) -> dict[str, LoaderConfig]:
        if self.job.validation_file is None:
            return {}
        return {"default": LoaderConfig(self.job, training=False)}


def _columns(recipe: Recipe) -> int:
    """What the length of a row has to be a multiple of."""
    needs = [2 * recipe.parallelism.cp if recipe.parallelism.cp > 1 else 1, recipe.parallelism.tp]
    # float8 products want multiples of 16; a compiled model is compiled anew for each length it meets.
    needs += [16 if recipe.precision.fp8 else 1, 64 if recipe.precision.compile else 1]
    return math.lcm(*needs)
