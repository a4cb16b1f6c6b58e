"""NeMo AutoModel's fine-tuning recipe, made to survive. Executed by every process of a run (`entry.py`).

AutoModel builds model, LoRA, FSDP2, optimizer, loss and learning-rate schedule, and runs the steps. Ours are: the rows
of each step (a function of the step alone), guards between gradient and update, checkpoints, what is told about each
step, answers to fixed prompts, and the export. AutoModel counts steps from 0, everything here counts from 1.
"""

from __future__ import annotations

import logging
import platform
import resource
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import torch
import torch.distributed as dist
from nemo_automodel.recipes.llm import train_ft

from sluice.training.answer_columns import keep_answer_columns
from sluice.training.checkpoint_files import Checkpoint, CheckpointFailed
from sluice.training.checkpoint_state import TrainingState
from sluice.training.checkpoint_store import CheckpointStore
from sluice.training.dora import start_magnitudes
from sluice.training.failures import START_AGAIN
from sluice.training.guards import Guards, RollBack, Stop, Verdict
from sluice.training.job import CHECKPOINTS, EXPORT, Job, Outcome
from sluice.training.job_config import JobConfig
from sluice.training.journal import Event, Journal, Sample, StepMetrics, Validation
from sluice.training.rank_probe import judge
from sluice.training.rank_probe import probe as speed_probe
from sluice.training.roll_backs import RollBacks
from sluice.training.round_trip import PROBES_FILE, probe, write_probes
from sluice.training.samples import Prompt, answer, read_prompts
from sluice.training.watch import Watch

logger = logging.getLogger(__name__)
LONG_S = 1800.0
"""How long a phase without beats may take: set-up, reading and writing checkpoints, validation, export."""


class FineTuning(train_ft.TrainFinetuneRecipeForNextTokenPrediction):  # type: ignore[misc]
    """One run. `setup()` builds and resumes, `run()` trains to the job's last step and exports."""

    def __init__(self, config: Any, job: Job, watch: Watch) -> None:
        super().__init__(JobConfig(config, job))
        self.job, self.watch = job, watch
        self.journal = Journal(job.work_dir)
        # An attempt is one start of the processes; only process 0 writes, so only it has to count.
        self.attempt = 1 + sum(event.kind == "started" for event in self.journal.read(Event))
        self.store = CheckpointStore(job.work_dir / CHECKPOINTS, job.recipe.checkpoints, self._tell_event)
        self.roll_backs = RollBacks(job.work_dir)
        self.guards = Guards(job.recipe.guards, roll_backs=self.roll_backs)
        self._loss_buffer: list[torch.Tensor] = []
        self._verdict = Verdict()
        self._step_started = self._step_seconds = 0.0
        self._learning_rate = 0.0
        self._saved_step = self._validated_step = 0
        self._first_step = True
        # Read at the first validation: a large tokenizer takes a second to load.
        self._prompts: list[Prompt] | None = None

    # ---- building and resuming

    def setup(self) -> None:
        train_ft.scale_grads_and_clip_grad_norm = self._judging(train_ft.scale_grads_and_clip_grad_norm)
        super().setup()
        for optimizer in self.optimizer:
            optimizer.step = self._unless_skipped(optimizer.step)
        # The learning rate keeps the schedule's horizon; only the loop ends earlier.
        self.step_scheduler.max_steps = self.job.last_step

    def load_checkpoint(self, restore_from: str | None = None) -> None:
        """Called by AutoModel's `setup` when everything is built: go on from the newest good checkpoint, if any."""
        if self.job.recipe.method == "dora":
            for part in self.model_parts:
                start_magnitudes(part)
        self._state = TrainingState(self.model_parts, self.optimizer, self.lr_scheduler or [])
        self._resume(self._state.newest_good(self.store))

    def _resume(self, found: Checkpoint | None) -> None:
        if found is not None:
            details = self._state.load(found)
            # On another machine the file beside the checkpoints may be gone; nothing that is known here is lost.
            self.roll_backs.merge(details["roll_backs"])
            self.guards = Guards(self.job.recipe.guards, details["guards"], self.roll_backs)
            if self.dist_env.is_main:
                self._tell("resumed", f"Going on after step {found.step}, from {found.folder.name}.", found.step)
        self.step_scheduler.step = self._saved_step = found.step if found else 0
        self.step_scheduler.epoch = 0
        self.dataloader.start(self.step_scheduler.step + 1)

    @property
    def done(self) -> int:
        """Steps done; 0 before the set-up came that far."""
        scheduler = self.__dict__.get("step_scheduler")
        return int(scheduler.step) if scheduler is not None else 0

    # ---- the run

    def run(self) -> None:
        """Train to the job's last step; leaves `outcome.json` and, when finished, the export."""
        if self.dist_env.is_main:
            self._tell("started", f"Attempt {self.attempt}: step {self.done} of {self.job.last_step}.", self.done)
        stopped: Stop | None = None
        while True:
            try:
                self.run_train_validation_loop()
                break
            except RollBack as back:
                self._zero_grad()
                self._roll_back(back.verdict)
            except Stop as stop:
                self._zero_grad()
                stopped = stop
                break
        with self.watch.allow("ending", LONG_S):
            self._conclude(stopped)
            self._state.close()
            super()._finalize_and_close_checkpointer()

    def _conclude(self, stopped: Stop | None) -> None:
        self._settle()
        if stopped is not None and stopped.validation_loss is None:
            self._end(Outcome("stopped", stopped.step, str(stopped)))
        elif stopped is None and self.step_scheduler.sigterm_flag and self.done < self.job.last_step:
            self._end(Outcome("interrupted", self.done, f"Saved after step {self.done}; run again to continue."))
        elif stopped is None and self.job.pauses:
            self._end(Outcome("paused", self.done, f"Paused after step {self.done}, as asked."))
        else:
            self._export(stopped)

    def _finalize_and_close_checkpointer(self) -> None:
        """AutoModel closes its checkpointer when the loop ends; the export needs it afterwards."""

    def _make_progress_bar(self, total: int | None = None, initial: int = 0) -> None:
        """Progress is the journal's."""

    def _roll_back(self, verdict: Verdict) -> None:
        with self.watch.allow("rolling back", LONG_S):
            self._go_back(verdict)

    def _go_back(self, verdict: Verdict) -> None:
        self._settle()
        if self.dist_env.is_main:
            self.store.discard_after(min(verdict.dropped) - 1)
        dist.barrier()
        self.roll_backs.record(verdict)
        if (found := self._state.newest_good(self.store)) is None:
            # Nothing was saved yet: the base is the last good state, and a fresh process the way to it.
            raise SystemExit(START_AGAIN)
        self._resume(found)

    # ---- one step

    def _run_train_optim_step(self, batches: list[Any], max_grad_norm: float | None = None) -> Any:
        self.watch.beat(self.done + 1, "step")
        self._step_started = time.perf_counter()
        self._learning_rate = float(self.optimizer[0].param_groups[0]["lr"])
        self._loss_buffer = []
        # The first step of a process compiles kernels, or the whole model.
        with self.watch.allow("first step", LONG_S) if self._first_step else nullcontext():
            result = super()._run_train_optim_step(batches, max_grad_norm)
        self._first_step = False
        self._step_seconds = time.perf_counter() - self._step_started
        return result

    def _run_validation_epoch(self, val_dataloader: Any) -> Any:
        with self.watch.allow("validation", LONG_S):
            return super()._run_validation_epoch(val_dataloader)

    def _forward_backward_step(self, idx: int, batch: dict[str, Any], **options: Any) -> None:
        # A fused loss computes no scores over the vocabulary at all; stages and cut rows have columns of their own.
        where = self.job.recipe.parallelism
        if where.pp == where.cp == 1 and not isinstance(self.loss_fn, train_ft.LinearCrossEntropy):
            batch = keep_answer_columns(batch)
        super()._forward_backward_step(idx, batch, **options)
        self._loss_buffer = options["loss_buffer"]

    def _judging(self, clip: Callable[..., Any]) -> Callable[..., Any]:
        """AutoModel's clipping, followed by the guards: between gradient and update, with the norm before clipping."""

        def clip_and_judge(*values: Any, **options: Any) -> Any:
            norm = clip(*values, **options)
            self._judge(norm, options.get("num_label_tokens"))
            return norm

        return clip_and_judge

    def _judge(self, norm: Any, label_tokens: int | None) -> None:
        step = self.done + 1
        loss = self._dp_allreduce(torch.sum(torch.stack(self._loss_buffer)), include_cp=True)
        if self.pp_enabled:
            loss = self._broadcast_from_last_pp_stage((loss / (label_tokens or 1)).to(self.dist_env.device))
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self._verdict = self.guards.observe(step, float(loss), float(norm))
        self._act(step, self._verdict)

    def _act(self, step: int, verdict: Verdict) -> None:
        if verdict.sentence and self.dist_env.is_main:
            level = {"go": "info", "stop": "error"}.get(verdict.action, "warning")
            self._tell("guard", verdict.sentence, step, level, guard=verdict.guard, action=verdict.action)
        if verdict.action == "stop":
            raise Stop(verdict, step - 1)
        if verdict.action == "roll_back":
            raise RollBack(verdict)

    def _unless_skipped(self, update: Callable[..., Any]) -> Callable[..., Any]:
        def step(*values: Any, **options: Any) -> Any:
            return None if self._verdict.action == "skip" else update(*values, **options)

        return step

    def _zero_grad(self) -> None:
        for optimizer in self.optimizer:
            optimizer.zero_grad()

    # ---- what is told

    def log_train_metrics(self, log_data: Any) -> None:
        """Called by AutoModel on every process after each step."""
        values, step = log_data.metrics, self.done + 1
        if self.dist_env.is_main:
            metrics = StepMetrics(
                step=step,
                loss=float(values["loss"]),
                grad_norm=float(values["grad_norm"]),
                learning_rate=self._learning_rate,
                tokens=int(values["num_tokens_per_step"]),
                label_tokens=int(values["num_label_tokens"]),
                seconds=self._step_seconds,
                memory_gib=_memory_gib(),
                mfu=float(values["mfu"]) / 100 if values.get("mfu") and torch.cuda.is_available() else None,
                skipped=self._verdict.guard if self._verdict.action == "skip" else None,
                attempt=self.attempt,
            )
            self.journal.write(metrics)
            logger.info("step %d: loss %.6g, gradient norm %.4g", step, metrics.loss, metrics.grad_norm)
        section = self.job.recipe.guards.ranks
        if section.policy != "off" and step % section.every_steps == 0 and dist.get_world_size() > 1:
            self._compare_ranks(step)

    def _compare_ranks(self, step: int) -> None:
        found: list[tuple[float, str]] = [(0.0, "")] * dist.get_world_size()
        dist.all_gather_object(found, (speed_probe(self.dist_env.device or "cpu"), platform.node()))
        times, hosts = zip(*found, strict=True)
        verdict = judge(times, self.job.recipe.guards.ranks, hosts, step=step)
        if verdict.action != "go" and self.dist_env.is_main:
            self._tell("slow_rank", verdict.sentence, step, "warning")
        if verdict.action == "stop":
            raise Stop(verdict, step)

    def log_val_metrics(self, val_name: str, log_data: Any, metric_logger: Any = None) -> None:
        """Called by AutoModel on every process after each validation."""
        step, loss, schedule = self.done + 1, float(log_data.metrics["val_loss"]), self.job.recipe.schedule
        self._validated_step = step
        if self.dist_env.is_main:
            self.journal.write(Validation(step, loss))
        self._write_samples(step)
        if step < schedule.max_steps and step % (schedule.validate_every_steps or schedule.max_steps):
            # Only because the run pauses here. It ends as one that does not: nothing may follow from this loss.
            return
        if self.dist_env.is_main:
            self.store.set_validation_loss(step, loss)
        # Before the save, so that a run resumed from it remembers this judgement; a stop is met again instead.
        verdict = self.guards.observe_validation(step, loss)
        if schedule.result == "best" and verdict.action != "stop" and not self.step_scheduler.is_ckpt_step:
            self._save(step)
        if verdict.sentence and self.dist_env.is_main:
            self._tell("guard", verdict.sentence, step, "warning", guard=verdict.guard, action=verdict.action)
        if verdict.action == "stop":
            raise Stop(verdict, step, validation_loss=loss)

    def _write_samples(self, step: int) -> None:
        settings = self.job.recipe.samples
        sharded = self.job.recipe.parallelism.pp > 1 or self.job.recipe.parallelism.cp > 1
        if not settings.prompts or self.job.validation_file is None or sharded:
            return
        with self.watch.allow("samples", LONG_S):
            if self._prompts is None:
                self._prompts = read_prompts(self.job.validation_file, self.job.base_dir, settings.prompts)
            for number, prompt in enumerate(self._prompts):
                text = answer(self.model_parts[0], prompt, settings.max_tokens, self.dist_env.device)
                if self.dist_env.is_main:
                    self.journal.write(Sample(step, number, prompt.text, text, prompt.reference))

    def _tell(self, kind: str, sentence: str, step: int, level: str = "info", **details: Any) -> None:
        self._tell_event(Event(kind, sentence, step, level, details))

    def _tell_event(self, event: Event) -> None:
        self.journal.write(Event(**{**vars(event), "attempt": self.attempt}))
        logger.log(logging.INFO if event.level == "info" else logging.WARNING, "%s", event.sentence)

    # ---- saving

    def save_checkpoint(
        self,
        epoch: int,
        step: int,
        train_loss: float,
        val_loss: dict[str, float] | None = None,
        best_metric_key: str = "default",
    ) -> None:
        """Called by AutoModel when a checkpoint is due, after the step's validation. The last step has both."""
        if step + 1 == self.job.last_step and self._validated_step != step + 1:
            for name, loader in self.val_dataloaders.items():
                self.log_val_metrics(name, self._run_validation_epoch(loader))
        if self._saved_step != step + 1:
            self._save(step + 1)

    def _save(self, step: int) -> None:
        # AutoModel asks for a notice only at steps that are not saved anyway: with a save at each step, never.
        ends = step >= self.job.last_step or self.step_scheduler.sigterm_received
        details = {"guards": self.guards.state(), "roll_backs": self.roll_backs.state()}
        with self.watch.allow("saving", LONG_S):
            self._settle()
            try:
                self._state.save(
                    self.store,
                    step,
                    details,
                    asynchronous=self.job.recipe.checkpoints.asynchronous and not ends,
                    beside=self.journal.files(),
                )
                self._saved_step = step
            except CheckpointFailed:
                # The store has told it. Training goes on from what was saved before, unless this was the last chance.
                if ends:
                    raise

    def _settle(self) -> None:
        """Wait for the save on its way. One that failed was told, and costs no more than the steps since the last."""
        with suppress(CheckpointFailed):
            self._state.wait()

    # ---- ending

    def _export(self, stopped: Stop | None) -> None:
        """The adapter or model as AutoModel saves it, and the scores of the probe prompts that belong to it."""
        done = stopped.step if stopped else self.done
        best = None
        if self.job.recipe.schedule.result == "best":
            best = self._agreed(self.store.best)
            if best is not None and stopped is not None and stopped.validation_loss < best.validation_loss:
                # Lower by less than the guard takes for a change; its step is not saved.
                best = None
            if best is not None and best.step != done:
                self._state.load(best)
        found = probe(self.model_parts[0], self.job.base_dir, self.dist_env.device)
        staging, target = self.job.work_dir / f".{EXPORT}", self.job.work_dir / EXPORT
        if self.dist_env.is_main:
            # What an attempt left that was killed here: an export counts once its outcome is written.
            shutil.rmtree(staging, ignore_errors=True)
            shutil.rmtree(target, ignore_errors=True)
        dist.barrier()
        self.model_parts[0].save_pretrained(
            save_directory=str(staging),
            checkpointer=self.checkpointer,
            tokenizer=None,
            peft_config=self.peft_config,
            is_final_checkpoint=True,
        )
        dist.barrier()
        used = best.step if best is not None else done
        if self.dist_env.is_main:
            write_probes(found, self.job.work_dir / PROBES_FILE)
            staging.replace(target)
        sentence = f"Finished after step {done}" + (f" with the weights of step {used}" if best else "")
        self._end(Outcome("finished", done, f"{sentence}. {stopped or ''}".strip(), used))

    def _end(self, outcome: Outcome) -> None:
        if self.dist_env.is_main:
            level = "error" if outcome.kind == "stopped" else "info"
            self._tell(outcome.kind, outcome.sentence, outcome.step, level)
            outcome.write(self.job.work_dir)
        dist.barrier()

    def _agreed(self, ask: Callable[[], Any]) -> Any:
        """What process 0 finds, on every process: files are looked at by one, so that all do the same."""
        found = [ask() if self.dist_env.is_main else None]
        dist.broadcast_object_list(found, src=0)
        return found[0]


def _memory_gib() -> float:
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return float(peak)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
