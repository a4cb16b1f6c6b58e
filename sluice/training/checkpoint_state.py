"""What a run resumes from: trainable weights, optimizer, schedule, random numbers. Only training processes import this.

Tensors are written and read with torch.distributed.checkpoint (DCP), each process its own part, so that another number
of processes reads them too. Keys: `model/<parameter>`, `optimizer/<parameter>/<state>`, `rng/<process>`; what is no
tensor (the optimizer's groups, the schedulers) is in `state.json`. Nothing is unpickled that could run code: there are
no objects among the tensors, DCP's index is read by `checkpoint_reading`, tensors by torch.load's weights_only.

A parameter that several modules share is one key. Frozen parameters are the base model's and not written.
"""

from __future__ import annotations

import json
import math
import pickle
import shutil
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer

from sluice.infra.errors import InputError, IntegrityError, SluiceError
from sluice.provenance.canonical import Json
from sluice.training.checkpoint_files import Checkpoint, CheckpointFailed, write_failure
from sluice.training.checkpoint_reading import SafeReader
from sluice.training.checkpoint_store import CheckpointStore
from sluice.training.checkpoint_tensors import (
    cause_of,
    clean_name,
    empty_like,
    explained,
    merged_groups,
    plain,
    shape_in_words,
    written_bytes,
)
from sluice.training.random_state import random_state, restore_random_state

PLAIN = "state.json"
_MODEL, _OPTIMIZER, _RNG = "model/", "optimizer/", "rng/"
_T = TypeVar("_T")
# A single process is a run like any other; DCP warns of it at each save, and filters of warnings are no thread's own.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


@dataclass(frozen=True)
class _Report:
    """What each process tells all others before a save."""

    groups: list[dict[str, Json]]
    size: float
    failure: str | None


class TrainingState:
    """Saves and loads one run's state. Making one, `save`, `wait`, `load` and `close` are collective.

    Its collectives go over a gloo group of its own, so that they never mix with those of training, whatever backend
    that uses. Only one save is on its way at a time. Call `wait` or `close` before `destroy_process_group`.
    """

    def __init__(
        self,
        model_parts: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
        lr_schedulers: Sequence[Any] | None = None,
        *,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        self._parts = list(model_parts)
        self._optimizers = list(optimizers)
        self._schedulers = list(lr_schedulers or ())
        self._distributed = dist.is_available() and dist.is_initialized()
        self._group = dist.new_group(backend="gloo", timeout=timeout) if self._distributed else None
        self._rank = dist.get_rank() if self._distributed else 0
        self._world_size = dist.get_world_size() if self._distributed else 1
        accelerated = torch.cuda.is_available()
        # The copies are kept from save to save: pinning memory is slow, and so is asking for fresh pages.
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=accelerated,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=accelerated,
            )
        )
        self._running: threading.Thread | None = None
        self._failure: CheckpointFailed | None = None

    def save(
        self,
        store: CheckpointStore,
        step: int,
        details: dict[str, Json],
        asynchronous: bool,
        beside: Sequence[Path] = (),
    ) -> None:
        """Save the state of this moment as the checkpoint of `step`; waits for the save before.

        `beside` are files of process 0 that are copied into it as they are when it is written.
        Asynchronous: copies the state to memory, returns, and writes and publishes beside training. Raises
        `CheckpointFailed`, the same on all processes, when this save (synchronous) or the one before failed; the
        store has told it by then, and the next save may work.
        """
        self.wait()
        details = json.loads(json.dumps(details))
        failure, state, groups, schedulers = None, {}, [], []
        try:
            state, groups = self._tensors(), self._groups()
            schedulers = [plain(scheduler.state_dict(), "scheduler") for scheduler in self._schedulers]
            if asynchronous:
                state = self._stager.stage(state)
        except Exception as error:  # noqa: BLE001 - the others must hear of whatever it is, or they wait for ever
            failure = f"Process {self._rank} cannot copy its state: {error}."
        reports = self._gathered(_Report(groups, sum(map(written_bytes, state.values())), failure))
        if failures := [report.failure for report in reports if report.failure]:
            told = CheckpointFailed(f"The checkpoint of step {step} was not saved. {failures[0]}")
            if self._rank == 0:
                store.abandon(step, told)
            raise told
        needed = math.ceil(sum(report.size for report in reports))
        folder = self._from_first(lambda: self._prepared(store, step, needed))
        values = json.dumps({"groups": merged_groups([report.groups for report in reports]), "schedulers": schedulers})

        def write() -> None:
            try:
                self._write(folder, state)
                if self._rank == 0:
                    (folder / PLAIN).write_text(values)
                    for path in beside:
                        shutil.copyfile(path, folder / path.name)
                    store.publish(step, details=details, world_size=self._world_size)
            except (Exception, CheckpointException) as error:  # noqa: BLE001 - told to all at the next `wait`
                self._failure = explained(error, folder, needed)
                if self._rank == 0:
                    store.abandon(step, self._failure)

        self._running = threading.Thread(target=write, name=f"checkpoint-{step}")
        self._running.start()
        if not asynchronous:
            self.wait()

    def wait(self) -> None:
        """Return when the save on its way is published. Raises `CheckpointFailed` on all processes when it failed."""
        if self._running is None:
            return
        self._running.join()
        self._running = None
        failure, self._failure = self._failure, None
        for one in self._gathered(failure):
            if one is not None:
                raise one

    def newest_good(self, store: CheckpointStore) -> Checkpoint | None:
        """The newest checkpoint whose every byte is right, verified by process 0, known to all. Collective."""
        return self._from_first(store.newest_good)

    def load(self, checkpoint: Checkpoint) -> dict[str, Json]:
        """Put the saved state into model, optimizers, schedulers and generators; the details given to `save`.

        With another number of processes too. A process that had no generators of its own when the checkpoint was
        saved (there are more now) gets some seeded with the SHA-256 of its number and the saved state of process
        (its number modulo the saved number of processes). Raises `InputError` when the trainable parameters are not
        the saved ones, `IntegrityError` when the files cannot be read.
        """
        self.wait()
        failure: SluiceError | None = None
        state: dict[str, Tensor] = {}
        try:
            metadata = SafeReader(checkpoint.folder).read_metadata()
            state = self._targets(metadata, checkpoint.world_size)
        except SluiceError as error:
            failure = error
        except (OSError, ValueError, pickle.UnpicklingError, EOFError) as error:
            failure = IntegrityError(
                f"The checkpoint {checkpoint.folder} cannot be read by process {self._rank}: {error}."
            )
        self._raise_first(failure)
        self._require_same(checkpoint, metadata)
        try:
            dcp.load(
                state,
                storage_reader=SafeReader(checkpoint.folder),
                planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=self._group,
            )
            values = json.loads((checkpoint.folder / PLAIN).read_text())
        except (CheckpointException, OSError, ValueError) as error:
            failure = IntegrityError(f"The checkpoint {checkpoint.folder} cannot be loaded: {cause_of(error)}.")
        self._raise_first(failure)
        if len(values["schedulers"]) != len(self._schedulers):
            saved_number = len(values["schedulers"])
            raise InputError(f"The checkpoint has {saved_number} schedulers, this run {len(self._schedulers)}.")
        self._restore_optimizers(state)
        for scheduler, saved in zip(self._schedulers, values["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        # After the schedulers: some of them write a learning rate of their own when they are loaded.
        self._restore_groups(values["groups"])
        restore_random_state(state[self._rng_key(checkpoint.world_size)], self._rank, checkpoint.world_size)
        return dict(checkpoint.details)

    def close(self) -> None:
        """Wait for the save on its way and give the group and the copies' memory back."""
        try:
            self.wait()
        finally:
            self._stager.close()
            if self._group is not None:
                dist.destroy_process_group(self._group)
                self._group = None

    def _prepared(self, store: CheckpointStore, step: int, needed: int) -> Path:
        try:
            return store.staging(step, needed)
        except CheckpointFailed as error:
            store.abandon(step, error)
            raise

    # What is saved

    def _parameters(self) -> dict[str, Tensor]:
        """Trainable parameters by name. `named_parameters` gives one that modules share once, under its first name."""
        return {
            clean_name(name): parameter
            for part in self._parts
            for name, parameter in part.named_parameters()
            if parameter.requires_grad
        }

    def _buffers(self) -> dict[str, Tensor]:
        """Buffers that a model's own state holds: training may change them (an expert balance, a running mean)."""
        return {
            clean_name(f"{prefix}.{name}" if prefix else name): buffer
            for part in self._parts
            for prefix, module in part.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        }

    def _tensors(self) -> dict[str, Tensor]:
        parameters = self._parameters()
        state = {f"{_MODEL}{name}": value.detach() for name, value in {**self._buffers(), **parameters}.items()}
        for name, parameter in parameters.items():
            for key, value in self._optimizer_state(parameter).items():
                if not isinstance(value, Tensor):
                    raise InputError(f"The optimizer keeps {key!r} of {name} as {type(value).__name__}, not a tensor.")
                state[f"{_OPTIMIZER}{name}/{key}"] = value.detach()
        state[f"{_RNG}{self._rank:05d}"] = random_state()
        return state

    def _optimizer_state(self, parameter: Tensor) -> dict[str, Any]:
        for optimizer in self._optimizers:
            if parameter in optimizer.state:
                return dict(optimizer.state[parameter])
        return {}

    def _groups(self) -> list[dict[str, Json]]:
        """The optimizers' groups: their values (learning rate, betas, ...) and the names of their parameters."""
        names = {parameter: name for name, parameter in self._parameters().items()}
        return [
            {
                "values": {key: plain(value, key) for key, value in group.items() if key != "params"},
                "parameters": [names[parameter] for parameter in group["params"] if parameter in names],
            }
            for optimizer in self._optimizers
            for group in optimizer.param_groups
        ]

    def _write(self, folder: Path, state: dict[str, Tensor]) -> None:
        # Without copying ahead: that opens a stream, and with it a context, on the first GPU from every process.
        dcp.save(
            state,
            storage_writer=dcp.FileSystemWriter(folder, per_thread_copy_ahead=0),
            planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=self._group,
        )

    # What is loaded

    def _targets(self, metadata: Metadata, saved_world_size: int) -> dict[str, Tensor]:
        """Tensors to read into: the model's own, and fresh ones of the saved shapes for the optimizer."""
        found = metadata.state_dict_metadata
        parameters = self._parameters()
        state = {f"{_MODEL}{name}": value.detach() for name, value in {**self._buffers(), **parameters}.items()}
        for key, value in found.items():
            if key.startswith(_OPTIMIZER) and isinstance(value, TensorStorageMetadata):
                name = key.removeprefix(_OPTIMIZER).rpartition("/")[0]
                if (parameter := parameters.get(name)) is not None:
                    state[key] = empty_like(parameter, value)
        key = self._rng_key(saved_world_size)
        saved = found.get(key)
        if not isinstance(saved, TensorStorageMetadata):
            raise IntegrityError(f"{key} is not in the checkpoint.")
        state[key] = torch.empty(saved.size, dtype=saved.properties.dtype)
        return state

    def _rng_key(self, saved_world_size: int) -> str:
        return f"{_RNG}{self._rank % saved_world_size:05d}"

    def _require_same(self, checkpoint: Checkpoint, metadata: Metadata) -> None:
        """Raise `InputError` on all processes unless their trainable tensors together are those of the checkpoint."""
        own = {
            name: shape_in_words(value.shape, value.dtype)
            for name, value in {**self._buffers(), **self._parameters()}.items()
        }
        here: dict[str, str] = {}
        for part in self._gathered(own):
            here.update(part)
        there = {
            key.removeprefix(_MODEL): shape_in_words(value.size, value.properties.dtype)
            for key, value in metadata.state_dict_metadata.items()
            if key.startswith(_MODEL) and isinstance(value, TensorStorageMetadata)
        }
        for name in sorted(here.keys() | there.keys()):
            if here.get(name) != there.get(name):
                raise InputError(
                    f"The checkpoint of step {checkpoint.step} is of another model or recipe: {name} is "
                    f"{there.get(name, 'not trained')} there and {here.get(name, 'not trained')} here.",
                    hint="Resume with the recipe that the run began with, or start a new run.",
                )

    def _restore_optimizers(self, state: dict[str, Tensor]) -> None:
        saved: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith(_OPTIMIZER):
                name, _, kind = key.removeprefix(_OPTIMIZER).rpartition("/")
                saved.setdefault(name, {})[kind] = value
        names = {parameter: name for name, parameter in self._parameters().items()}
        for optimizer in self._optimizers:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                # Where torch's optimizers expect their counters: beside the parameter for these two kinds, else here.
                beside = group.get("fused") or group.get("capturable")
                for parameter in group["params"]:
                    if found := saved.get(names.get(parameter, "")):
                        optimizer.state[parameter] = {
                            kind: value.to(parameter.device) if beside else value for kind, value in found.items()
                        }

    def _restore_groups(self, saved: list[dict[str, Json]]) -> None:
        """Each parameter's group gets the values that its parameters had when saved, however they are grouped now."""
        values = {name: group["values"] for group in saved for name in group["parameters"]}
        names = {parameter: name for name, parameter in self._parameters().items()}
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                name = next((names[parameter] for parameter in group["params"] if parameter in names), None)
                for key, value in values.get(name, {}).items():
                    if isinstance(group.get(key), Tensor):
                        group[key].fill_(value)
                    else:
                        group[key] = tuple(value) if isinstance(group.get(key), tuple) else value

    # Between the processes

    def _gathered(self, value: _T) -> list[_T]:
        if not self._distributed:
            return [value]
        found: list[Any] = [None] * self._world_size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def _raise_first(self, failure: SluiceError | None) -> None:
        for one in self._gathered(failure):
            if one is not None:
                raise one

    def _from_first(self, work: Callable[[], _T]) -> _T:
        """What `work` gives process 0, on all processes; also its error."""
        answer: list[Any] = [None, None]
        if self._rank == 0:
            try:
                answer[0] = work()
            except SluiceError as error:
                answer[1] = error
            except OSError as error:
                answer[1] = write_failure(error, Path(error.filename or "?"), 0, 0)
        if self._distributed:
            dist.broadcast_object_list(answer, src=0, group=self._group)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]  # type: ignore[no-any-return]
