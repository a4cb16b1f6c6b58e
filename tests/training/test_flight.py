"""Findings from dumps: who is missing, who is dead, who waits. The dumps are as torch 2.13 with gloo makes them."""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sluice.training.flight import ask, dump_file, explain, flight_dir, flight_environment, stack_file
from sluice.training.watch import Watch

STACK = [["/opt/python/site/run.py", 3, "<module>"], ["/srv/train/rows.py", 33, "load"]]


def _entry(number: int, *, at: int, name: str = "all_reduce", group: str = "0", done: bool = True) -> dict[str, Any]:
    return {
        "record_id": number - 1,
        "collective_seq_id": number,
        "p2p_seq_id": 0,
        "op_id": number,
        "is_p2p": False,
        "pg_id": 0,
        "process_group": [group, "default_pg"],
        "profiling_name": f"gloo:{name}",
        "input_sizes": [[5, 7]],
        "output_sizes": [[5, 7]],
        "input_dtypes": ["Float"],
        "output_dtypes": ["Float"],
        "state": "scheduled",
        "retired": done,
        "time_created_ns": at * 10**9,
        "time_discovered_started_ns": 0,
        "time_discovered_completed_ns": 0,
    }


def _write(work_dir: Path, rank: int, entries: list[dict[str, Any]], ranks: list[int]) -> None:
    flight_dir(work_dir).mkdir(exist_ok=True)
    record = {
        "rank": rank,
        "host": f"node-{rank}",
        "time": 1000.0,
        "last_beat": 700.0,
        "step": 12,
        "phase": "backward",
        "stacks": {"MainThread": STACK},
        "groups": {"0": ranks},
        "recorders": [{"version": "2.10", "entries": entries}],
    }
    dump_file(work_dir, rank).write_text(json.dumps(record))


def test_who_never_joined_is_found_among_many(tmp_path: Path) -> None:
    for rank in range(12):
        entries = [_entry(1, at=100), _entry(2, at=101)]
        if rank != 7:
            entries.append(_entry(3, at=102, done=False))
        _write(tmp_path, rank, entries, list(range(12)))
    assert explain(tmp_path, 12) == (
        "Rank 7 never joined gloo:all_reduce number 3 (sizes 5x7) of group 0:default_pg; ranks 0, 1, 2, 3, 4, 5 and 5 "
        "more wait there since 00:01:42 UTC. Rank 7 (node-7) stands in /srv/train/rows.py:33 (load), step 12, "
        "backward, no sign of life for 300 s."
    )


def test_ranks_in_different_collectives_disagree(tmp_path: Path) -> None:
    _write(tmp_path, 0, [_entry(1, at=100), _entry(2, at=101, done=False)], [0, 1])
    _write(tmp_path, 1, [_entry(1, at=100), _entry(2, at=101, name="all_gather", done=False)], [0, 1])
    finding = explain(tmp_path, 2)
    assert "do not agree on collective 2" in finding
    assert "rank 0 gloo:all_reduce number 2" in finding
    assert "rank 1 gloo:all_gather number 2" in finding
    print(finding)


def test_of_two_groups_the_one_waited_in_for_longest_is_the_cause(tmp_path: Path) -> None:
    # 0 and 2 wait for 1 in group 0; 3 waits for 2, which stands in group 0, in group 5.
    ranks = [0, 1, 2, 3]
    _write(tmp_path, 0, [_entry(1, at=100, done=False)], ranks)
    _write(tmp_path, 1, [], ranks)
    _write(tmp_path, 2, [_entry(1, at=101, done=False)], ranks)
    _write(tmp_path, 3, [_entry(1, at=103, done=False, group="5")], ranks)
    for rank in ranks:
        dump = json.loads(dump_file(tmp_path, rank).read_text())
        dump["groups"] = {"0": [0, 1, 2], "5": [2, 3]}
        dump_file(tmp_path, rank).write_text(json.dumps(dump))
    assert "Rank 1 never joined gloo:all_reduce number 1 (sizes 5x7) of group 0" in explain(tmp_path, 4)


def test_a_rank_without_a_dump_is_dead_and_the_others_wait(tmp_path: Path) -> None:
    _write(tmp_path, 0, [_entry(1, at=100, done=False)], [0, 1])
    finding = explain(tmp_path, 2)
    assert finding.startswith("Rank 1 left no dump: the process is dead, or its node is cut off. Rank 0 waits in")
    assert "gloo:all_reduce number 1 (sizes 5x7) since 00:01:40 UTC" in finding


def test_a_rank_that_held_the_interpreter_is_not_dead(tmp_path: Path) -> None:
    _write(tmp_path, 0, [_entry(1, at=100, done=False)], [0, 1])
    stack_file(tmp_path, 1).write_text(
        'Timeout (0:05:00)!\nThread 0x1 (most recent call first):\n  File "/srv/other.py", line 1 in wait\n\n'
        'Thread 0x2 (most recent call first):\n  File "/srv/train/pack.py", line 8 in crunch\n'
        '  File "/srv/m.py", line 2 in m\n'
    )
    assert "Rank 1 did not give the interpreter free; it stands in /srv/train/pack.py:8 (crunch)." in explain(
        tmp_path, 2
    )


def test_nothing_and_damaged_dumps_are_a_finding_too(tmp_path: Path) -> None:
    assert "Ranks 0 and 1 left no dump" in explain(tmp_path, 2)
    flight_dir(tmp_path).mkdir()
    dump_file(tmp_path, 0).write_text('{"rank": 0,')
    assert "Ranks 0 and 1 left no dump" in explain(tmp_path, 2)


def test_stuck_without_any_collective(tmp_path: Path) -> None:
    _write(tmp_path, 0, [], [0])
    assert explain(tmp_path, 1) == (
        "Rank 0 (node-0) stands in /srv/train/rows.py:33 (load), step 12, backward, no sign of life for 300 s."
    )


def test_a_process_that_is_asked_dumps_and_goes_on(tmp_path: Path) -> None:
    with Watch(tmp_path, 3, 60.0, poll_s=0.02) as watch:
        watch.beat(5, "forward")
        ask(tmp_path)
        deadline = time.monotonic() + 10
        while not dump_file(tmp_path, 3).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
    dump = json.loads(dump_file(tmp_path, 3).read_text())
    assert (dump["step"], dump["phase"]) == (5, "forward")
    assert any(frame[0] == __file__ for frame in dump["stacks"]["MainThread"])


def test_a_request_of_an_earlier_attempt_and_its_dumps_do_not_count(tmp_path: Path) -> None:
    ask(tmp_path)
    _write(tmp_path, 0, [], [0])
    with Watch(tmp_path, 0, 60.0, poll_s=0.01):
        time.sleep(0.1)
        assert not dump_file(tmp_path, 0).exists()


def test_a_long_phase_that_is_allowed_is_no_hang(tmp_path: Path) -> None:
    # A watch that fired would end this very process.
    with Watch(tmp_path, 0, 0.2, poll_s=0.01) as watch:
        watch.beat(1, "forward")
        with watch.allow("checkpoint", 30):
            time.sleep(0.5)
        watch.beat(2, "forward")
    assert not dump_file(tmp_path, 0).exists()


def test_variables_are_those_of_torchs_headers(tmp_path: Path) -> None:
    spec = find_spec("torch")
    assert spec
    assert spec.origin
    headers = (Path(spec.origin).parent / "include/torch/csrc/distributed/c10d").glob("*.hpp")
    known = "".join(path.read_text() for path in headers)
    # This one stands in the library alone (and in torchtitan, which sets it).
    named = flight_environment(tmp_path).keys() - {"TORCH_FR_DUMP_TEMP_FILE"}
    assert [name for name in named if f'"{name}"' not in known] == []
