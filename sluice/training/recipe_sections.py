"""The sections of a recipe: one class for each, unknown keys refused. `recipe.py` puts them together.

Units stand in the field's name or its description. What AutoModel calls them is in `automodel.py` alone.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Module = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Floating = Literal["float32", "bfloat16"]
Method = Literal["lora", "dora", "qlora", "full"]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def wrong(field: str, says: str) -> PydanticCustomError:
    """What a check over several fields raises: `field` (dotted, below its section) is wrong, and why."""
    return PydanticCustomError("field", "{says}", {"field": field, "says": says})


class LoraSection(Section):
    """Which projections get a low-rank pair, and its size. Weights are scaled by alpha / rank. Not read by `full`."""

    rank: int = Field(8, ge=1, le=256, description="inner width of each pair")
    alpha: int = Field(32, ge=1, description="scale: the pair's product counts alpha / rank")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="share of the pair's output dropped while training")
    target_modules: Annotated[tuple[Module, ...], Field(min_length=1, strict=False)] = Field(
        ("q_proj", "v_proj"), description="projections that get a pair"
    )

    @model_validator(mode="after")
    def _no_module_twice(self) -> Self:
        if twice := sorted({one for one in self.target_modules if self.target_modules.count(one) > 1}):
            raise wrong("target_modules", f"names {twice[0]} twice")
        return self


class DataSection(Section):
    """How examples become batches. Lengths in tokens, prompt and answer together."""

    digest: Digest | None = Field(None, description="train on this dataset artifact and refuse any other")
    max_length: int = Field(384, ge=16, description="longer examples are left out and counted")
    packing: bool = Field(False, description="several examples in one row of pack_length, blind to each other")
    pack_length: int | None = Field(None, ge=16, description="empty: max_length")
    bucket_batches: int = Field(
        16, ge=1, description="global batches sorted by length together: less padding; 1 keeps the shuffled order"
    )
    validation_limit: int | None = Field(None, ge=1, description="use the first so many validation examples")

    @property
    def row_length(self) -> int:
        """The longest row of a batch."""
        return (self.pack_length or self.max_length) if self.packing else self.max_length

    @model_validator(mode="after")
    def _packs_hold_an_example(self) -> Self:
        if self.pack_length is not None and not self.packing:
            raise wrong("pack_length", "means nothing while data.packing is false")
        if self.pack_length is not None and self.pack_length < self.max_length:
            raise wrong("pack_length", f"is shorter than data.max_length = {self.max_length}, the longest example")
        return self


class ScheduleSection(Section):
    """Steps and batch sizes. One step is `global_batch_size` rows (examples, or packs) over all processes."""

    max_steps: int = Field(ge=1, description="optimizer steps of the whole run")
    global_batch_size: int = Field(8, ge=1, description="rows of one step over all processes")
    micro_batch_size: int = Field(4, ge=1, description="rows of one forward pass of one process")
    validate_every_steps: int | None = Field(None, ge=1, description="besides the last step, which always is")
    result: Literal["last", "best"] = Field("last", description="weights of the last step, or of the lowest val. loss")


class OptimizerSection(Section):
    """AdamW with a linear warm-up and a decay to `minimum_learning_rate` at `max_steps`."""

    learning_rate: float = Field(1e-3, gt=0, description="highest, at the end of the warm-up")
    minimum_learning_rate: float = Field(1e-5, ge=0, description="at max_steps")
    warmup_steps: int = Field(1, ge=0, description="steps of linear increase")
    decay: Literal["cosine", "linear", "constant"] = Field("cosine", description="shape after the warm-up")
    betas: Annotated[tuple[float, float], Field(strict=False)] = Field((0.9, 0.95), description="of AdamW")
    epsilon: float = Field(1e-8, gt=0, description="of AdamW")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="longer gradients are scaled down to it")

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        if self.minimum_learning_rate > self.learning_rate:
            raise wrong("minimum_learning_rate", f"exceeds optimizer.learning_rate = {self.learning_rate}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise wrong("betas", "must be at least 0 and below 1")
        return self


class ParallelismSection(Section):
    """Processes, and how the model is cut. Processes = dp x tp x pp x cp; FSDP2 shards over dp x cp."""

    nodes: int = Field(1, ge=1, description="machines that train together")
    processes: int = Field(2, ge=1, le=64, description="of one node; with accelerators one for each")
    tp: int = Field(1, ge=1, description="tensor parallel: each layer's matrices cut over so many processes")
    pp: int = Field(1, ge=1, description="pipeline parallel: layers cut into so many stages")
    cp: int = Field(1, ge=1, description="context parallel: each row's tokens cut over so many processes")
    backend: Literal["gloo", "nccl"] = Field("gloo", description="gloo: processors; nccl: NVIDIA accelerators")
    collective_timeout_minutes: float = Field(5, gt=0, description="a collective that hangs longer ends the attempt")
    reshard_after_forward: bool = Field(True, description="false: keep gathered weights until backward, saves a gather")
    activation_checkpointing: bool = Field(False, description="compute activations again in backward: less memory")

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes

    @property
    def dp(self) -> int:
        """Data-parallel size: groups of processes that each see rows of their own."""
        return self.world_size // (self.tp * self.pp * self.cp)

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        cut = self.tp * self.pp * self.cp
        if self.world_size % cut:
            raise wrong(
                "processes",
                f"x parallelism.nodes = {self.world_size} processes are not a multiple of tp x pp x cp = {cut}, "
                "so the data-parallel size is no integer",
            )
        return self


class PrecisionSection(Section):
    """How weights are held (`parameters`), what layers calculate in, what gradients are summed in (`reduce`)."""

    parameters: Floating = Field("float32", description="trained weights, gradients and optimizer hold this")
    compute: Floating = Field("float32", description="layers calculate in this; frozen weights are held in it")
    reduce: Floating = Field("float32", description="gradients are summed over processes in this")
    fp8: bool = Field(False, description="float8 matrix products where the accelerator has them (H100 and newer)")
    compile: bool = Field(False, description="torch.compile for each layer: slower start, faster steps")
    fused_loss: bool = Field(
        True, description="scores and cross-entropy in one, 512 tokens at a time; accelerators without tp and pp only"
    )


class CheckpointSection(Section):
    """When a run is saved and what is kept. A checkpoint is for resuming: it holds what training changes, no more."""

    every_steps: int = Field(10, ge=1, description="longest way back after a failure")
    keep_last: int = Field(2, ge=1, description="newest that stay")
    keep_every_hours: float | None = Field(None, gt=0, description="also keep one for each so many hours")
    asynchronous: bool = Field(True, description="write while training goes on")
    upload: bool = Field(True, description="copy to the object store beside training")


class NotFiniteGuard(Section):
    """A loss or gradient norm that is NaN or infinite."""

    policy: Literal["skip", "roll_back", "stop"] = Field("skip", description="what happens then")
    limit: int = Field(3, ge=1, description="so many in a row, or roll-backs, stop the run")


class SpikeGuard(Section):
    """A gradient norm above `factor` x the median of the last `window` steps."""

    policy: Literal["off", "warn", "skip", "roll_back", "stop"] = Field("skip", description="what happens then")
    factor: float = Field(20.0, gt=1, description="times the median gradient norm")
    window: int = Field(50, ge=5, description="steps that the median is of")
    limit: int = Field(5, ge=1, description="so many in a row, or roll-backs, stop the run")


class CorridorGuard(Section):
    """A loss further above a median than `width` x the median absolute deviation, both of the `window` accepted steps
    whose median was the lowest so far."""

    policy: Literal["off", "warn", "skip", "roll_back", "stop"] = Field("roll_back", description="what happens then")
    width: float = Field(20.0, gt=1, description="times the median absolute deviation")
    window: int = Field(50, ge=5, description="steps that the medians are of")
    limit: int = Field(3, ge=1, description="so many in a row, or roll-backs, stop the run; not with warn")


class ValidationGuard(Section):
    """A validation loss that has not been lower by `minimum_change` for `patience` validations."""

    policy: Literal["off", "warn", "stop"] = Field("stop", description="what happens then")
    patience: int = Field(3, ge=1, description="validations without a lower loss")
    minimum_change: float = Field(0.0, ge=0, description="a smaller decrease does not count")


class RankGuard(Section):
    """A process that computes a fixed probe more than `factor` x slower than the median of all; one that died."""

    policy: Literal["off", "warn", "stop"] = Field("warn", description="what happens then")
    factor: float = Field(2.0, gt=1, description="times the median probe time")
    every_steps: int = Field(50, ge=1, description="steps between probes")
    restarts: int = Field(2, ge=0, description="restarts from the last checkpoint after a process died, per attempt")


class GuardSection(Section):
    """What must not go on unnoticed. `skip` drops the step's update, `roll_back` goes on from the last checkpoint
    without that step's rows, `stop` ends the run; each says so in the log and in MLflow."""

    not_finite: NotFiniteGuard = NotFiniteGuard()
    gradient_spike: SpikeGuard = SpikeGuard()
    loss_corridor: CorridorGuard = CorridorGuard()
    validation_loss: ValidationGuard = ValidationGuard()
    ranks: RankGuard = RankGuard()

    @property
    def roll_backs(self) -> int:
        """The most that a run may have; each may need a start of its own, where nothing was saved yet."""
        sections = (self.not_finite, self.gradient_spike, self.loss_corridor)
        return sum(section.limit - 1 for section in sections if section.policy == "roll_back")


class SampleSection(Section):
    """Answers generated during training (greedy) at the first `prompts` validation prompts, at each validation."""

    prompts: int = Field(2, ge=0, le=16, description="0: none")
    max_tokens: int = Field(24, ge=1, le=512, description="of one answer")


class OutputSection(Section):
    """What is made beside the adapter."""

    merge: bool = Field(False, description="also a whole model: the base with the adapter merged into it")


class BudgetSection(Section):
    """A run past one of these stops, saves, and leaves no process behind."""

    timeout_minutes: float = Field(30.0, gt=0, description="of one attempt")
    dollars: float | None = Field(None, gt=0, description="of all attempts, at the node type's price")
    notice_s: float = Field(90.0, gt=0, description="seconds to save in after SIGTERM (spot: 120, pod: its grace)")
