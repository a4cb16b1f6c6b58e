"""The watch of one training process: a thread that notices when training stands still, and says where.

    watch = Watch(work_dir, rank=2, world_size=16, timeout_s=300, tell=journal_a_hang)
    with watch:
        with watch.allow("start-up", 1800): ...
        watch.beat(step, "forward")                        # as often as you like: it sets one attribute
        with watch.allow("checkpoint", 900): ...

When no beat came for the limit in force, the process writes `flight/rank_<n>.json` (last beat, every thread's Python
stack, torch's flight recorder), asks the others for theirs through `flight/request`, waits a moment for them, has
`flight.explain` find out who is missing, tells it, and ends with `HANG_EXIT`; torchrun then restarts or gives up. The
launcher may ask too (`flight.ask`). Without a shared work folder each node has only its own processes' dumps.

A main thread that holds the interpreter's lock stops this thread as well. For that case faulthandler's own C thread is
armed a little later than the watch: it leaves the stacks in `flight/rank_<n>.stack` and ends the process with code 1.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from sluice.infra.home import write_private
from sluice.provenance.canonical import Json
from sluice.training.flight import dump_file, explain, flight_dir, request_file, stack_file

HANG_EXIT = 76
"""A process that ends because training stood still."""


@dataclass(frozen=True)
class _Beat:
    step: int
    phase: str
    limit_s: float
    monotonic: float
    time: float


class Watch:
    """Watches from the first `beat` or `allow` on; before that nothing is late. Times in seconds.

    `grace_s` is how long the others get for their dumps once this process gave up; `margin_s` how much later than the
    watch faulthandler fires, less than `grace_s` so that the others see its text.
    """

    def __init__(
        self,
        work_dir: Path,
        rank: int,
        timeout_s: float,
        *,
        world_size: int = 1,
        tell: Callable[[str], None] = lambda _: None,
        poll_s: float = 0.5,
        grace_s: float = 10.0,
        margin_s: float = 5.0,
    ) -> None:
        self._work_dir = work_dir
        self._rank = rank
        self._timeout_s = timeout_s
        self._world_size = world_size
        self._tell = tell
        self._poll_s = poll_s
        self._grace_s = grace_s
        self._margin_s = margin_s
        self._beat: _Beat | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Self:
        folder = flight_dir(self._work_dir)
        folder.mkdir(parents=True, exist_ok=True)
        # What an earlier attempt left was told then.
        for path in (dump_file(self._work_dir, self._rank), stack_file(self._work_dir, self._rank)):
            path.unlink(missing_ok=True)
        if self._rank == 0:
            (folder / "finding.txt").unlink(missing_ok=True)
        self._stacks = stack_file(self._work_dir, self._rank).open("w")
        self._answered = _request(self._work_dir)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()

    def beat(self, step: int, phase: str) -> None:
        """Training moves: it is at this step (from 1), in this phase."""
        self._beat = _Beat(step, phase, self._timeout_s, time.monotonic(), time.time())

    @contextmanager
    def allow(self, phase: str, seconds: float) -> Iterator[None]:
        """A phase that may take this long without a beat (start-up, compile, checkpoint, validation, export)."""
        before = self._beat
        step = before.step if before else 0
        self._beat = _Beat(step, phase, seconds, time.monotonic(), time.time())
        try:
            yield
        finally:
            self.beat(step, before.phase if before else phase)

    def _run(self) -> None:
        while not self._ended.wait(self._poll_s):
            beat = self._beat
            if beat is not None:
                left = beat.monotonic + beat.limit_s - time.monotonic()
                if left <= 0 and self._beat is beat:
                    self._give_up(beat)
                faulthandler.dump_traceback_later(max(left, 0) + self._margin_s, exit=True, file=self._stacks)
            if (asked := _request(self._work_dir)) != self._answered:
                self._answered = asked
                self._dump(beat)

    def _give_up(self, beat: _Beat) -> None:
        """Dump, let the others dump, explain, end the process. Nothing that fails on the way keeps it alive."""
        faulthandler.dump_traceback_later(2 * self._grace_s + 2 * self._margin_s, exit=True, file=self._stacks)
        try:
            self._dump(beat)
            request_file(self._work_dir).write_text(f"rank {self._rank}: no beat for {beat.limit_s:g} s\n")
            deadline = time.monotonic() + self._grace_s
            while time.monotonic() < deadline and not all(map(self._has_spoken, range(self._world_size))):
                time.sleep(0.1)
            finding = explain(self._work_dir, self._world_size)
            print(finding, file=sys.stderr, flush=True)
            # All processes stand still together; the first to get here speaks for them.
            with (flight_dir(self._work_dir) / "finding.txt").open("x", encoding="utf-8") as stream:
                stream.write(finding + "\n")
            self._tell(finding)
        except FileExistsError:
            # torchrun ends everybody at the first exit: leave the speaker the time to finish.
            time.sleep(1)
        except Exception:  # noqa: BLE001  (the process ends, whatever the disk or the analyser does)
            traceback.print_exc()
        finally:
            os._exit(HANG_EXIT)

    def _has_spoken(self, rank: int) -> bool:
        stacks = stack_file(self._work_dir, rank)
        return dump_file(self._work_dir, rank).exists() or (stacks.exists() and stacks.stat().st_size > 0)

    def _dump(self, beat: _Beat | None) -> None:
        record = {
            "rank": self._rank,
            "pid": os.getpid(),
            "host": os.uname().nodename,
            "time": time.time(),
            "step": beat.step if beat else 0,
            "phase": beat.phase if beat else "before the first step",
            "last_beat": beat.time if beat else None,
            "stacks": _stacks(),
            "groups": _groups(),
            "recorders": _recorders(),
        }
        write_private(dump_file(self._work_dir, self._rank), json.dumps(record))


def _request(work_dir: Path) -> int | None:
    """Which request lies there, by its time of writing."""
    try:
        return request_file(work_dir).stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _stacks() -> dict[str, Json]:
    """Each Python thread's frames, [file, line, function], outermost first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        names.get(ident, str(ident)): [[one.filename, one.lineno, one.name] for one in traceback.extract_stack(frame)]
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    }


def _groups() -> dict[str, Json]:
    """The ranks of each process group, by the group's name. Gloo's recorder does not name them itself (torch 2.13)."""
    world: Any = getattr(sys.modules.get("torch.distributed.distributed_c10d"), "_world", None)
    if world is None:
        return {}
    return {str(world.pg_names[group]): sorted(ranks) for group, ranks in list(world.pg_group_ranks.items()) if group}


def _recorders() -> list[Json]:
    """What torch's flight recorders hold: gloo's, and on accelerators NCCL's."""
    c10d = sys.modules.get("torch._C._distributed_c10d")
    found = []
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        if (dump := getattr(c10d, name, None)) is not None:
            found.append(json.loads(dump()))
    return found
