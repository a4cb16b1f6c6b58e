"""One process of the network preflight: `python -m sluice.training.preflight`, started by torchrun or `run_preflight`.

A roll call over a store, a look at devices and clocks, a ladder of all-reduces, a verdict that every process ends with:
exit code 0, or 1 and nobody trains. Each stage has a time-out of its own and names who is to blame; a collective that
hangs is ended by a thread that needs no collective. The variables are torchrun's: RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from sluice.training.node_types import NODE_TYPES
from sluice.training.preflight_floors import MIB, floor_of
from sluice.training.preflight_report import (
    Facts,
    Finding,
    PreflightReport,
    Rung,
    judge,
    read_nccl_log,
    report_from_json,
    size_text,
)

LADDER = {
    "nccl": (8, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB),
    "gloo": (8, 64 * 1024, MIB, 4 * MIB, 16 * MIB),
}
"""Message sizes in bytes: the smallest shows the latency, the largest the bandwidth."""
RUNG_S = 0.5
"""Seconds that one size is repeated for, at least three and at most fifty times."""


@dataclass(frozen=True)
class Place:
    """Where this process stands."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    port: int
    store_is_there: bool

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Place:
        """From torchrun's variables, whose own agent keeps a store already."""
        return cls(
            int(environment["RANK"]),
            int(environment["WORLD_SIZE"]),
            int(environment["LOCAL_RANK"]),
            int(environment["LOCAL_WORLD_SIZE"]),
            environment["MASTER_ADDR"],
            int(environment["MASTER_PORT"]),
            environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )

    @property
    def nodes(self) -> int:
        return self.world // self.local_world

    @property
    def node(self) -> int:
        return self.rank // self.local_world

    def named(self, ranks: Sequence[int]) -> str:
        """Processes in words, whole nodes as such."""
        whole = [
            node
            for node in range(self.nodes)
            if all(rank in ranks for rank in range(node * self.local_world, (node + 1) * self.local_world))
        ]
        rest = [rank for rank in ranks if rank // self.local_world not in whole]
        many = f"all {self.local_world} processes of " if self.local_world > 1 else ""
        words = [f"{many}node {node}" for node in whole]
        return ", ".join(words + [f"process {rank} (node {rank // self.local_world})" for rank in rest])


class Preflight:
    """The run of one process. `join_s` seconds for the roll call, `run_s` for all that follows."""

    def __init__(self, place: Place, node_type: str, backend: str, join_s: float, run_s: float, out: Path | None):
        self._place, self._node_type, self._backend = place, node_type, backend
        self._join_s, self._run_s, self._out = join_s, run_s, out
        self._started = time.monotonic()
        self._stage = "the roll call"
        self._rungs: list[Rung] = []
        self._store: Any = None
        self._ending = threading.Lock()

    def run(self) -> NoReturn:
        """Ends the process: 0 when training may start."""
        self._store = self._open_store()
        self._call_roll()
        self._store.set_timeout(timedelta(seconds=self._run_s))
        self._end_at(time.monotonic() + self._run_s)
        try:
            facts = self._measure()
        except Exception as error:  # noqa: BLE001  (the library's errors have no common class)
            self._explain(error)
        self._store.set(f"facts/{self._place.rank}", json.dumps(asdict(facts)))
        if self._place.rank != 0:
            self._follow()
        gathered = [Facts(**json.loads(self._store.get(f"facts/{rank}"))) for rank in range(self._place.world)]
        floor = floor_of(self._node_type, self._place.nodes)
        node = NODE_TYPES.get(self._node_type)
        # A machine without accelerators has no devices to count.
        self._conclude(judge(gathered, self._rungs, node if node and node.accelerators else None, floor), gathered)

    def _open_store(self) -> Any:
        from torch.distributed import PrefixStore, TCPStore

        # From here on: how long the imports took says nothing of the network.
        self._started = time.monotonic()
        place = self._place
        try:
            store = TCPStore(
                place.address,
                place.port,
                is_master=place.rank == 0 and not place.store_is_there,
                timeout=timedelta(seconds=self._join_s),
                wait_for_workers=False,
            )
        except Exception as error:  # noqa: BLE001
            if place.rank == 0:
                said = f"process 0 cannot listen on {place.address}:{place.port}: {_first_line(error)}."
                self._conclude((Finding("failed", said),))
            said = f"process 0 at {place.address}:{place.port} never came: waited {self._join_s:g} s."
            self._alone(Finding("rank_missing", said))
        return PrefixStore("preflight", store)

    def _call_roll(self) -> None:
        """Everybody is here afterwards. Process 0 names who is not, to all who are."""
        place, store = self._place, self._store
        store.set(f"here/{place.rank}", socket.gethostname())
        if place.rank != 0:
            store.wait(["call"], timedelta(seconds=2 * self._join_s))
            if store.get("call") != b"go":
                self._follow()
            return
        missing = list(range(1, place.world))
        while missing := [rank for rank in missing if not store.check([f"here/{rank}"])]:
            if time.monotonic() > self._started + self._join_s:
                break
            time.sleep(0.05)
        store.set("call", "missing" if missing else "go")
        if missing:
            came = place.world - len(missing)
            sentence = f"{place.named(missing)} never came: waited {self._join_s:g} s, {came} of {place.world} did."
            self._conclude((Finding("rank_missing", sentence),))

    def _measure(self) -> Facts:
        """Devices, clocks, the ladder, and what NCCL said meanwhile."""
        import torch
        import torch.distributed as dist

        place = self._place
        cuda = self._backend == "nccl"
        log = Path(tempfile.mkdtemp(prefix="sluice-preflight-")) / "nccl.log"
        os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET", "NCCL_DEBUG_FILE": str(log)}
        skew, error = self._compare_clocks()
        self._enter("the start of the process group")
        device = torch.device("cpu")
        if cuda:
            device = torch.device("cuda", place.local_rank % max(1, torch.cuda.device_count()))
            torch.cuda.set_device(device)
        options = {"device_id": device} if cuda else {}
        dist.init_process_group(
            self._backend,
            store=self._store,
            rank=place.rank,
            world_size=place.world,
            # Longer than this process's own deadline, which knows more than the library's.
            timeout=timedelta(seconds=2 * self._run_s),
            **options,
        )
        for size in LADDER[self._backend]:
            self._enter(f"the all-reduce of {size_text(size)}")
            self._rungs.append(measure_rung(size, place.rank, place.world, device))
        self._enter("the end")
        said = log.read_text(errors="replace") if log.is_file() else ""
        network, provider = read_nccl_log(said)
        return Facts(
            place.rank,
            socket.gethostname(),
            place.node,
            f"GPU {torch.cuda.get_device_properties(device).uuid}" if cuda else f"processor {os.getpid()}",
            torch.cuda.device_count() if cuda else place.local_world,
            count_efa_devices(),
            network,
            provider,
            skew,
            error,
        )

    def _compare_clocks(self) -> tuple[float | None, float]:
        """The first process of each node asks process 0 for the time, one after the other, as NTP does."""
        place, store = self._place, self._store
        self._enter("the comparison of clocks")
        if place.rank == 0:
            for node in range(1, place.nodes):
                store.set(f"clock/turn/{node}", "")
                store.wait([f"clock/ask/{node}"])
                store.set(f"clock/time/{node}", repr(time.time()))
            return 0.0, 0.0
        if place.local_rank != 0:
            return None, 0.0
        store.wait([f"clock/turn/{place.node}"])
        before = time.time()
        store.set(f"clock/ask/{place.node}", "")
        there = float(store.get(f"clock/time/{place.node}"))
        after = time.time()
        return (before + after) / 2 - there, (after - before) / 2

    def _enter(self, stage: str) -> None:
        self._stage = stage
        self._store.set(f"stage/{self._place.rank}", stage)

    def _end_at(self, deadline: float) -> None:
        """A thread that ends this process at `deadline`, whatever it hangs in; process 0's names who is behind."""

        def watch() -> None:
            time.sleep(max(0.0, deadline - time.monotonic()))
            sentence = f"{self._stage} did not end within {self._run_s:g} s."
            if self._place.rank == 0:
                behind = self._behind()
                sentence += f" Behind the others: {behind}." if behind else " All processes are in it."
                self._conclude((Finding("timeout", sentence),))
            self._follow(5.0)

        threading.Thread(target=watch, name="preflight-deadline", daemon=True).start()

    def _behind(self) -> str:
        """Processes that have not entered the stage that process 0 is in."""
        store = self._store.clone()
        stages = {
            rank: store.get(f"stage/{rank}").decode() if store.check([f"stage/{rank}"]) else ""
            for rank in range(self._place.world)
        }
        return self._place.named([rank for rank, stage in stages.items() if stage != self._stage])

    def _explain(self, error: Exception) -> NoReturn:
        """A collective failed. Who says nothing of it within a moment has died, and is the cause."""
        place = self._place
        self._store.set(f"failed/{place.rank}", _first_line(error))
        if place.rank != 0:
            self._follow()
        silent = list(range(place.world))
        deadline = time.monotonic() + 3
        while silent and time.monotonic() < deadline:
            silent = [rank for rank in silent if not self._store.check([f"failed/{rank}"])]
            time.sleep(0.05)
        if silent:
            finding = Finding("rank_died", f"{place.named(silent)} ended during {self._stage}.")
        else:
            finding = Finding("failed", f"{self._stage}: {_first_line(error)}.")
        self._conclude((finding,))

    def _conclude(self, findings: tuple[Finding, ...], facts: Sequence[Facts] = ()) -> NoReturn:
        """Process 0's verdict, for all. The store lives in this process: it stays until the others have read it."""
        self._ending.acquire()
        report = self._report(findings, facts)
        text = json.dumps(report.to_json())
        print(report.to_text(), flush=True)
        self._write(text)
        if self._store is not None:
            store = self._store.clone()
            store.set("verdict", text)
            came = sum(store.check([f"here/{rank}"]) for rank in range(self._place.world)) if not facts else len(facts)
            deadline = time.monotonic() + 3
            while store.add("read", 0) < came - 1 and time.monotonic() < deadline:
                time.sleep(0.02)
        os._exit(0 if report.passed else 1)

    def _follow(self, patience_s: float | None = None) -> NoReturn:
        """Another process's part: take process 0's verdict."""
        self._ending.acquire()
        try:
            store = self._store.clone()
            store.wait(["verdict"], timedelta(seconds=patience_s or self._run_s))
            text = store.get("verdict").decode()
            store.add("read", 1)
        except Exception:  # noqa: BLE001
            self._alone(Finding("rank_died", f"process 0 says nothing after {self._stage}: it ended, or hangs."))
        self._write(text)
        os._exit(0 if report_from_json(text).passed else 1)

    def _alone(self, finding: Finding) -> NoReturn:
        """Without process 0 there is no verdict but this process's own."""
        report = self._report((finding,))
        print(report.to_text(), flush=True)
        self._write(json.dumps(report.to_json()))
        os._exit(1)

    def _report(self, findings: tuple[Finding, ...], facts: Sequence[Facts] = ()) -> PreflightReport:
        place = self._place
        floor = floor_of(self._node_type, place.nodes)
        return PreflightReport(
            self._node_type,
            place.nodes,
            place.world,
            self._backend,
            time.monotonic() - self._started,
            tuple(self._rungs),
            floor.bandwidth if floor else {},
            floor.source if floor else "",
            tuple(facts),
            findings,
        )

    def _write(self, text: str) -> None:
        if self._out is not None and self._place.local_rank == 0:
            staging = self._out.with_name(f".{self._out.name}.{os.getpid()}")
            staging.write_text(text)
            staging.replace(self._out)


def measure_rung(size: int, rank: int, world: int, device: Any) -> Rung:
    """All-reduce `size` bytes of float32: checked once, then timed; the slowest process's mean counts."""
    import torch
    import torch.distributed as dist

    def agreed(value: float, operation: Any) -> float:
        tensor = torch.tensor([value], dtype=torch.float64, device=device)
        dist.all_reduce(tensor, op=operation)
        return float(tensor.item())

    def timed(count: int) -> float:
        agreed(0.0, dist.ReduceOp.SUM)
        started = time.perf_counter()
        for _ in range(count):
            dist.all_reduce(data)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return agreed((time.perf_counter() - started) / count, dist.ReduceOp.MAX)

    data = torch.full((max(1, size // 4),), float(rank + 1), dtype=torch.float32, device=device)
    dist.all_reduce(data)
    correct = agreed(float((data == world * (world + 1) / 2).all().item()), dist.ReduceOp.MIN) == 1.0
    # Zeros stay zeros, however often they are added up.
    data.zero_()
    once = timed(2)
    return Rung(size, timed(max(3, min(50, int(RUNG_S / once)))), world, correct)


def count_efa_devices(classes: Path = Path("/sys/class/infiniband"), handles: Path = Path("/dev/infiniband")) -> int:
    """RDMA devices that the kernel knows and this container may open: a pod that asked for fewer opens fewer."""
    known = len(list(classes.iterdir())) if classes.is_dir() else 0
    openable = len(list(handles.glob("uverbs*"))) if handles.is_dir() else 0
    return min(known, openable)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="One process of the network preflight.")
    parser.add_argument("--node-type", required=True)
    parser.add_argument("--backend", choices=sorted(LADDER), required=True)
    parser.add_argument("--join-seconds", type=float, default=60.0)
    parser.add_argument("--run-seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=None, help="the report as JSON, once a node")
    given = parser.parse_args(arguments)
    place = Place.of(os.environ)
    Preflight(place, given.node_type, given.backend, given.join_seconds, given.run_seconds, given.out).run()


if __name__ == "__main__":
    main(sys.argv[1:])
