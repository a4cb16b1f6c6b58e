"""Checkpoints of a real model by real processes (gloo, FSDP2, a model of a few thousand weights): 2, then 1, then 2.

Each start of two processes costs seconds of imports, so two starts tell it all: a run that is killed while it saves;
and its resumption by two processes, by one alone, and by two from what the one went on with.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import resource
import signal
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sluice.infra.errors import InputError, IntegrityError
from sluice.training.checkpoint_files import Checkpoint, CheckpointFailed
from sluice.training.checkpoint_store import CheckpointStore
from sluice.training.journal import Event, Journal
from sluice.training.recipe_sections import CheckpointSection

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from sluice.training.checkpoint_state import TrainingState

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
KEEP_ALL = CheckpointSection(keep_last=9)


class Trainee:
    """A tiny model with what real ones have: tied weights, frozen ones, a bfloat16 pair, dropout, a schedule."""

    def __init__(self, *, sharded: bool = False, seed: int = 0, rank: int = 4) -> None:
        import torch
        from torch import nn
        from torch.nn import functional

        class Network(nn.Module):  # type: ignore[misc]
            def forward(self, tokens: torch.Tensor) -> Any:
                hidden = self.embedding(tokens)
                hidden = functional.dropout(self.frozen(hidden), 0.1 + 0.1 * random.random())
                return self.head(hidden + self.pair(hidden.bfloat16()).float())

        self.model = Network()
        # The base is the same for all, as it is not in a checkpoint.
        torch.manual_seed(0)
        self.model.frozen = nn.Linear(16, 16).requires_grad_(requires_grad=False)
        torch.manual_seed(seed)
        self.model.embedding = nn.Embedding(50, 16)
        self.model.pair = nn.Sequential(nn.Linear(16, rank, bias=False), nn.Linear(rank, 16, bias=False)).bfloat16()
        self.model.head = nn.Linear(16, 50, bias=False)
        self.model.head.weight = self.model.embedding.weight
        self.model.register_buffer("balance", torch.zeros(3))
        if sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
            fully_shard(self.model.pair, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        groups = [
            {"params": [self.model.embedding.weight], "weight_decay": 0.0},
            {"params": list(self.model.pair.parameters())},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)

    def state(self) -> TrainingState:
        from sluice.training.checkpoint_state import TrainingState

        return TrainingState([self.model], [self.optimizer], [self.scheduler])

    def step(self, number: int, part: slice = slice(None)) -> float:
        """One step on a batch that follows from its number; the loss of this process' part."""
        import torch
        from torch.nn import functional

        tokens = torch.randint(0, 50, (8, 5), generator=torch.Generator().manual_seed(number))[part]
        loss = functional.cross_entropy(self.model(tokens).flatten(0, 1), tokens.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.model.balance += 1
        return float(loss.item())

    def digest(self) -> str:
        """Of every weight, moment and counter, put together from all processes."""
        from torch.distributed.tensor import DTensor

        whole = hashlib.sha256()
        tensors: list[torch.Tensor] = [self.model.embedding.weight, *self.model.pair.parameters()]
        moments = [value for tensor in tensors for _, value in sorted(self.optimizer.state[tensor].items())]
        for tensor in (*tensors, *moments, self.model.balance):
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            whole.update(full.detach().float().numpy().tobytes())
        return whole.hexdigest()


@contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def process(rank: int, work: str, folder: Path) -> None:
    """One of two: run scenarios one after the other and leave what they found in a file."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = CheckpointStore(folder / "checkpoints", KEEP_ALL, Journal(folder).write)
    found: dict[str, Any] = {}
    for name in work.split():
        scenario, together = {"first": (first, 2), "resumed": (resumed, 2), "alone": (alone, 1), "grown": (grown, 2)}[
            name
        ]
        if together == 2:
            dist.init_process_group("gloo", init_method=f"file://{folder / name}", rank=rank, world_size=2)
        scenario(rank, store, found)
        if together == 2:
            dist.destroy_process_group()
    (folder / f"{work}-{rank}.json").write_text(json.dumps(found))


def run_two(work: str, folder: Path) -> list[dict[str, Any]]:
    """Run a scenario in two processes; what each found."""
    import torch.multiprocessing as mp

    mp.spawn(process, (work, folder), nprocs=2)
    return [json.loads((folder / f"{work}-{rank}.json").read_text()) for rank in range(2)]


def first(rank: int, store: CheckpointStore, found: dict[str, Any]) -> None:
    """Nine steps; saved after 3 and 6; refused after 5; killed while the ninth is being written."""
    import torch
    import torch.distributed.checkpoint as dcp

    trainee = Trainee(sharded=True)
    state = trainee.state()
    torch.manual_seed(rank)
    random.seed(rank)
    half = slice(rank, None, 2)
    losses = found["losses"] = [trainee.step(number, half) for number in (1, 2, 3)]
    found["digest 3"] = trainee.digest()

    # Training goes on, and changes every tensor, while the write waits.
    held = threading.Event()
    write = dcp.FileSystemWriter.write_data
    dcp.FileSystemWriter.write_data = lambda *arguments: (held.wait(30), write(*arguments))[1]
    state.save(store, 3, {"note": "three"}, asynchronous=True)
    losses += [trainee.step(number, half) for number in (4, 5)]
    found["still writing"] = not store.complete()
    held.set()
    state.wait()
    dcp.FileSystemWriter.write_data = write

    # The disk of one of the two is full: both hear it, of a synchronous save at once, of another one at `wait`.
    failures = found["failures"] = []
    for asynchronous in (False, True):
        with small_disk(100 if rank == 1 else 2**30):
            try:
                state.save(store, 5, {}, asynchronous)
                failures.append("nothing yet")
                state.wait()
            except CheckpointFailed as error:
                failures.append(error.message)
    losses += [trainee.step(6, half)]
    state.save(store, 6, {"note": "six"}, asynchronous=False)
    found["digest 6"] = trainee.digest()
    found["steps"] = [checkpoint.step for checkpoint in store.complete()]
    losses += [trainee.step(number, half) for number in (7, 8, 9)]
    name = f"first-{rank}.json"
    (store.folder.parent / name).write_text(json.dumps(found))

    def die(self: Any, plan: Any, planner: Any) -> Any:
        if rank == 1:
            (Path(self.path) / "__1_0.distcp").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, plan, planner)

    dcp.FileSystemWriter.write_data = die
    state.save(store, 9, {}, asynchronous=True)
    state.close()


def resumed(rank: int, store: CheckpointStore, found: dict[str, Any]) -> None:
    """Go on from the newest good one with as many processes."""
    import torch

    trainee = Trainee(sharded=True, seed=1)
    state = trainee.state()
    torch.manual_seed(77)
    checkpoint = state.newest_good(store)
    assert checkpoint is not None
    found["step"], found["details"] = checkpoint.step, state.load(checkpoint)
    found["digest"] = trainee.digest()
    found["losses"] = [trainee.step(number, slice(rank, None, 2)) for number in (7, 8, 9)]
    state.load(store.complete()[0])
    found["digest 3"] = trainee.digest()
    other = Trainee(sharded=True, rank=8).state()
    try:
        other.load(checkpoint)
    except InputError as error:
        found["refused"] = error.message
    other.close()
    state.close()


def alone(rank: int, store: CheckpointStore, found: dict[str, Any]) -> None:
    """Process 0 goes on as the only one, from the sixth step to the ninth."""
    if rank:
        return
    trainee = Trainee(seed=3)
    state = trainee.state()
    state.load(store.complete()[-1])
    found["digest 6 alone"] = trainee.digest()
    found["loss alone"] = trainee.step(7)
    for number in (8, 9):
        trainee.step(number)
    state.save(store, 9, {}, asynchronous=True)
    state.close()
    found["digest 9 alone"] = trainee.digest()


def grown(rank: int, store: CheckpointStore, found: dict[str, Any]) -> None:
    """Go on with two processes from what one saved."""
    import torch

    trainee = Trainee(sharded=True, seed=2)
    state = trainee.state()
    checkpoint = state.newest_good(store)
    assert checkpoint is not None
    for _ in range(2):
        state.load(checkpoint)
        found.setdefault("random", []).append([random.random(), torch.rand(1).item()])
    found["step grown"], found["digest grown"] = checkpoint.step, trainee.digest()
    trainee.step(10, slice(rank, None, 2))
    state.close()


def test_two_processes_one_and_two_again(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"SIGKILL|SIGABRT|Connection"):
        run_two("first", tmp_path)
    before = [json.loads((tmp_path / f"first-{rank}.json").read_text()) for rank in range(2)]
    assert before[0]["digest 3"] == before[1]["digest 3"] != before[0]["digest 6"]
    assert before[0]["still writing"]
    assert before[0]["steps"] == [3, 6]
    for one in before:
        refused_at_once, nothing, refused_at_wait = one["failures"]
        assert "the disk is full" in refused_at_once
        assert (nothing, refused_at_wait) == ("nothing yet", refused_at_once)
    assert before[0]["failures"] == before[1]["failures"]
    told = [event.sentence for event in Journal(tmp_path).read(Event) if event.kind == "checkpoint_failed"]
    assert len(told) >= 2
    assert told[0].startswith("The checkpoint of step 5 was not saved: ")
    assert told[0].endswith("The one of step 3 is still good.")

    after = run_two("resumed alone grown", tmp_path)
    for one, other in zip(before, after, strict=True):
        # As many processes: to the bit.
        assert (other["step"], other["details"]) == (6, {"note": "six"})
        assert other["digest"] == one["digest 6"]
        assert other["losses"] == one["losses"][6:]
        # The tensors of the moment of the call, although training went on.
        assert other["digest 3"] == one["digest 3"]
        assert "pair.0.weight is 4 x 16 bfloat16 there and 8 x 16 bfloat16 here" in other["refused"]

    # One process: the same state to the bit; its losses differ by the order of a sum, and by its own dropout.
    assert after[0]["digest 6 alone"] == before[0]["digest 6"]
    assert after[0]["loss alone"] == pytest.approx(sum(one["losses"][6] for one in before) / 2, rel=0.1)

    # And two again. The second one has no generators of its own in there: it gets the same ones each time.
    for one in after:
        assert (one["step grown"], one["digest grown"]) == (9, after[0]["digest 9 alone"])
        assert one["random"][0] == one["random"][1]
    assert after[0]["random"] != after[1]["random"]


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", KEEP_ALL, print)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_one_process_resumes_to_the_bit(store: CheckpointStore, asynchronous: bool) -> None:
    import torch

    trainee = Trainee()
    state = trainee.state()
    # Before the first step there is no optimizer state; saving must not make any.
    state.save(store, 0, {}, asynchronous)
    state.wait()
    losses = [trainee.step(number) for number in range(1, 4)]
    state.save(store, 3, {"losses": [float("nan"), 1.5]}, asynchronous)
    rest = [trainee.step(number) for number in range(4, 7)]
    state.close()

    again = Trainee(seed=5)
    state = again.state()
    torch.manual_seed(9)
    newest = store.newest_good()
    assert newest is not None
    details = state.load(newest)
    assert (str(details["losses"]), again.scheduler.last_epoch) == ("[nan, 1.5]", 3)
    assert [group["weight_decay"] for group in again.optimizer.param_groups] == [0.0, 0.1]
    assert [again.step(number) for number in range(4, 7)] == rest
    assert again.optimizer.state[again.model.pair[0].weight]["exp_avg"].dtype == torch.bfloat16
    state.load(store.complete()[0])
    assert not again.optimizer.state
    assert [again.step(number) for number in range(1, 4)] == losses
    state.close()


def test_what_is_written_is_what_training_changes(store: CheckpointStore) -> None:
    from sluice.training.checkpoint_reading import SafeReader

    trainee = Trainee()
    trainee.step(1)
    state = trainee.state()
    state.save(store, 1, {}, asynchronous=False)
    (checkpoint,) = store.complete()
    keys = sorted(SafeReader(checkpoint.folder).read_metadata().state_dict_metadata)
    trained = ("embedding.weight", "pair.0.weight", "pair.1.weight")
    assert keys == sorted(
        [
            "model/balance",
            "rng/00000",
            *(f"model/{name}" for name in trained),
            *(f"optimizer/{name}/{kind}" for name in trained for kind in ("exp_avg", "exp_avg_sq", "step")),
        ]
    )


def test_another_set_of_parameters_is_refused_by_name(store: CheckpointStore) -> None:
    trainee = Trainee()
    trainee.state().save(store, 1, {}, asynchronous=False)
    (checkpoint,) = store.complete()
    trainee.model.frozen.weight.requires_grad_()
    with pytest.raises(InputError, match=r"frozen\.weight is not trained there and 16 x 16 float32 here"):
        trainee.state().load(checkpoint)
    trainee.model.frozen.weight.requires_grad_(requires_grad=False)
    trainee.model.pair[1].weight.requires_grad_(requires_grad=False)
    with pytest.raises(InputError, match=r"pair\.1\.weight is 16 x 4 bfloat16 there and not trained here"):
        trainee.state().load(checkpoint)


class Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_a_pickle_in_a_checkpoint_is_not_run(store: CheckpointStore, tmp_path: Path) -> None:
    import torch
    import torch.distributed.checkpoint as dcp

    trainee = Trainee()
    trainee.state().save(store, 1, {}, asynchronous=False)
    (checkpoint,) = store.complete()
    index = checkpoint.folder / ".metadata"
    good = index.read_bytes()
    mark = tmp_path / "mark"
    index.write_bytes(pickle.dumps(Evil(f"touch {mark}")))
    with pytest.raises(IntegrityError, match=r"its index asks for posix\.system"):
        trainee.state().load(checkpoint)
    index.write_bytes(good[:-20])
    with pytest.raises(IntegrityError, match="cannot be read by process 0"):
        trainee.state().load(checkpoint)

    # An object among the tensors, which DCP would unpickle.
    folder = tmp_path / "objects"
    dcp.save({"model/embedding.weight": Evil(f"touch {mark}"), "rng/00000": torch.zeros(1)}, checkpoint_id=folder)
    with pytest.raises(IntegrityError, match=r"its index asks for .*\.BytesStorageMetadata"):
        trainee.state().load(replace(checkpoint, folder=folder))
    assert not mark.exists()


def test_an_error_at_copying_is_told_not_hung(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    trainee = Trainee()
    trainee.step(1)
    state = trainee.state()
    trainee.optimizer.state[trainee.model.pair[0].weight]["note"] = "text"
    with pytest.raises(CheckpointFailed, match=r"The optimizer keeps 'note' of pair\.0\.weight as str, not a tensor"):
        state.save(store, 1, {}, asynchronous=True)
    del trainee.optimizer.state[trainee.model.pair[0].weight]["note"]
    state.save(store, 1, {}, asynchronous=True)
    state.close()
    assert [checkpoint.step for checkpoint in store.complete()] == [1]


def test_a_lost_checkpoint_is_an_error_in_words(store: CheckpointStore, tmp_path: Path) -> None:
    trainee = Trainee()
    trainee.state().save(store, 1, {}, asynchronous=False)
    (checkpoint,) = store.complete()
    gone: Checkpoint = replace(checkpoint, folder=tmp_path / "gone")
    with pytest.raises(IntegrityError, match=r"cannot be read by process 0: .*No such file"):
        trainee.state().load(gone)
