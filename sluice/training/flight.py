"""What hung: a finding from the dumps that the processes' watches left in `flight/` of the work folder.

    flight/request          its appearance (or a newer one) asks every process for its dump; `ask` writes it
    flight/rank_<n>.json    a process's last beat, Python stacks, process groups and flight recorder (see `watch.py`)
    flight/rank_<n>.stack   only where the interpreter itself was stuck: faulthandler's text

torch's flight recorder keeps the last 2000 collectives of each process: name, sequence number, sizes, state. It is on
by default and works with gloo as with NCCL. Who is missing is found by torch's own analyser. Seen with torch 2.13 and
gloo: its dump describes every process group under the name "", on which the analyser fails; so the groups are those
that the watch wrote down. NCCL was never run here.
"""

from __future__ import annotations

import json
import logging
import re
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sluice.provenance.canonical import Json


def flight_dir(work_dir: Path) -> Path:
    return work_dir / "flight"


def request_file(work_dir: Path) -> Path:
    return flight_dir(work_dir) / "request"


def dump_file(work_dir: Path, rank: int) -> Path:
    return flight_dir(work_dir) / f"rank_{rank}.json"


def stack_file(work_dir: Path, rank: int) -> Path:
    return flight_dir(work_dir) / f"rank_{rank}.stack"


def ask(work_dir: Path) -> None:
    """Ask every process that shares this folder for a dump; they answer within a second, and go on."""
    flight_dir(work_dir).mkdir(parents=True, exist_ok=True)
    request_file(work_dir).write_text(f"asked at {time.time():.3f}\n")


def flight_environment(work_dir: Path) -> dict[str, str]:
    """Variables for torchrun, for what the watch cannot see from Python. None of them was ever run with NCCL here.

    Sources: ProcessGroupNCCL.hpp and FlightRecorder.hpp of torch 2.13, and its page "ProcessGroupNCCL Environment
    Variables".
    """
    return {
        # Collectives kept per process. An FSDP step of a large model has hundreds; 2000 reach back a few steps.
        "TORCH_FR_BUFFER_SIZE": "2000",
        # NCCL's own watchdog writes the recorder when a collective exceeds the group's timeout, Python stuck or not.
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        # Where to: <prefix><rank>, pickled, for `torchfrtrace`.
        "TORCH_FR_DUMP_TEMP_FILE": str(flight_dir(work_dir) / "nccl_rank_"),
        # A failed or late collective ends the process without aborting communicators first: aborting may hang too.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        # A thread that ends the process when NCCL's watchdog is stuck in a CUDA call, which Python cannot notice.
        "TORCH_NCCL_ENABLE_MONITORING": "1",
    }


def explain(work_dir: Path, world_size: int) -> str:
    """One to three sentences: who never joined which collective, where they stand, who waits, since when; who is dead.

    Reads whatever dumps are there and never fails for lack of them.
    """
    dumps = _read_dumps(work_dir, world_size)
    sentences = []
    if dead := [rank for rank in range(world_size) if rank not in dumps]:
        stuck = {rank: _stuck(work_dir, rank) for rank in dead}
        for rank in (rank for rank in dead if stuck[rank]):
            sentences.append(f"Rank {rank} did not give the interpreter free; it stands in {stuck[rank]}.")
        if gone := [rank for rank in dead if not stuck[rank]]:
            sentences.append(f"{_ranks(gone).capitalize()} left no dump: the process is dead, or its node is cut off.")
    if not dumps:
        return " ".join([*sentences, "Nothing is known of what the processes did."])
    found = None if dead else _first_incomplete(dumps)
    if found is not None:
        sentences.append(_describe(found, dumps))
    elif waiting := {rank: entry for rank, dump in dumps.items() if (entry := _pending(dump))}:
        entry = min(waiting.values(), key=lambda one: one["time_created_ns"])
        since = time.strftime("%H:%M:%S", time.gmtime(entry["time_created_ns"] / 1e9))
        sentences.append(
            f"{_ranks(waiting).capitalize()} {'waits' if len(waiting) == 1 else 'wait'} in {_collective(entry)} since {since} UTC."
        )
    if found is None:
        sentences.extend(_stands(rank, dump) for rank, dump in _by_oldest_beat(dumps)[:2])
    return " ".join(sentences)


def _describe(found: Any, dumps: dict[int, Json]) -> str:
    missing = sorted(found.missing_ranks or ())
    entries = {
        rank: entry
        for rank, dump in dumps.items()
        for entry in _entries(dump)
        if entry["collective_seq_id"] == found.collective_seq_id
        and entry["process_group"][0] == found.group_id
        and not entry["is_p2p"]
    }
    first = min(entries.values(), key=lambda one: one["time_created_ns"])
    since = time.strftime("%H:%M:%S", time.gmtime(first["time_created_ns"] / 1e9))
    group = f"of group {':'.join(first['process_group'])}"
    if missing:
        told = (
            f"{_ranks(missing).capitalize()} never joined {_collective(first)} {group}; {_ranks(entries)} "
            f"wait{'' if len(entries) > 1 else 's'} there since {since} UTC."
        )
        return " ".join([told, *(_stands(rank, dumps[rank]) for rank in missing[:2])])
    calls = "; ".join(f"rank {rank} {_collective(entry)}" for rank, entry in sorted(entries.items())[:4])
    told = (
        f"The ranks do not agree on collective {found.collective_seq_id} {group} ({found.type_of_mismatch}): {calls}."
    )
    return " ".join([told, *(_stands(rank, dumps[rank]) for rank in sorted(entries)[:2])])


def _first_incomplete(dumps: dict[int, Json]) -> Any:
    """The collective that somebody has waited for longest while somebody else is not in it, by torch's analyser.

    None when it finds none, or fails: it is a tool for people, and what it finds is worth having but not needed.
    """
    try:
        from torch.distributed.flight_recorder.components.builder import build_db
        from torch.distributed.flight_recorder.components.fr_logger import FlightRecorderLogger

        # Its log repeats the same at length.
        FlightRecorderLogger().set_log_level(logging.CRITICAL)
        details, version = {}, ""
        for rank, dump in dumps.items():
            # The recorder that has seen something: NCCL's where there is one, else gloo's.
            recorder = max(dump["recorders"], key=lambda one: len(one.get("entries", ())))
            version = str(recorder["version"])
            names = {entry["process_group"][0]: entry["process_group"][1] for entry in recorder["entries"]}
            details[str(rank)] = {
                "rank": rank,
                "version": version,
                "entries": recorder["entries"],
                "pg_config": {
                    name: {"name": name, "desc": names.get(name, ""), "ranks": str(ranks)}
                    for name, ranks in dump["groups"].items()
                },
            }
        options: Any = SimpleNamespace(
            verbose=False, just_print_entries=False, allow_incomplete_ranks=True, mismatch_cap=10
        )
        db = build_db(details, options, version)
    except Exception as error:  # noqa: BLE001  (the stacks alone are a finding too)
        logging.getLogger(__name__).warning("torch's flight recorder analyser failed: %r", error)
        return None
    broken = [one for one in db.collectives if one.missing_ranks or one.type_of_mismatch]
    return min(broken, key=lambda one: one.record_id, default=None)


def _read_dumps(work_dir: Path, world_size: int) -> dict[int, Json]:
    found = {}
    for rank in range(world_size):
        try:
            found[rank] = json.loads(dump_file(work_dir, rank).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return found


def _entries(dump: Json) -> list[Json]:
    return [entry for recorder in dump["recorders"] for entry in recorder.get("entries", ())]


def _pending(dump: Json) -> Json:
    """The collective this process has been in longest, or None."""
    pending = [entry for entry in _entries(dump) if not entry["retired"]]
    return min(pending, key=lambda one: one["time_created_ns"], default=None)


def _collective(entry: Json) -> str:
    sizes = ", ".join("x".join(map(str, size)) or "1" for size in entry["input_sizes"])
    return f"{entry['profiling_name']} number {entry['collective_seq_id']}" + (f" (sizes {sizes})" if sizes else "")


def _stands(rank: int, dump: Json) -> str:
    since = f", no sign of life for {dump['time'] - dump['last_beat']:.0f} s" if dump["last_beat"] else ""
    where = _place(dump["stacks"].get("MainThread", ()))
    return f"Rank {rank} ({dump['host']}) stands in {where}, step {dump['step']}, {dump['phase']}{since}."


def _place(frames: Sequence[Sequence[Any]]) -> str:
    """The innermost line of code that is neither an installed library's nor Python's own, and what it called."""
    if not frames:
        return "an unknown place"
    foreign = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")})
    own = [frame for frame in frames if not str(frame[0]).startswith((*foreign, "<"))]
    name, line, function = (own or frames)[-1]
    inner = frames[-1]
    inside = f", inside {Path(inner[0]).name}:{inner[1]} ({inner[2]})" if own and inner is not own[-1] else ""
    return f"{name}:{line} ({function}){inside}"


def _stuck(work_dir: Path, rank: int) -> str:
    """Where faulthandler found a process whose interpreter was held, or ""."""
    try:
        text = stack_file(work_dir, rank).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The last thread is the main one; its innermost frame comes first.
    found = re.findall(r'File "(.+)", line (\d+) in (.+)', text.rpartition("Thread 0x")[2])
    return _place([(name, line, function) for name, line, function in reversed(found)]) if found else ""


def _by_oldest_beat(dumps: dict[int, Json]) -> list[tuple[int, Json]]:
    return sorted(dumps.items(), key=lambda item: item[1]["last_beat"] or 0)


def _ranks(ranks: Any) -> str:
    """`rank 3`, `ranks 0, 1 and 5`, and beyond eight of them the first ones and their number."""
    numbers = sorted(ranks)
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    if len(numbers) > 8:
        return f"ranks {', '.join(map(str, numbers[:6]))} and {len(numbers) - 6} more"
    return f"ranks {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
