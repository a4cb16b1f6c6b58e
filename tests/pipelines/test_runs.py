"""Runs of the local profile: found again, attached to, cancelled with everything they started."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from sluice.infra.errors import InputError, StepFailed
from sluice.infra.settings import Settings
from sluice.pipelines import runs
from sluice.pipelines.runs import Run, cancel, find_run, finish, list_runs, start_run


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


def _run(settings: Settings, name: str, **changes: object) -> Run:
    run = Run(name, "retrain", {}, folder=settings.runs / name)
    for key, value in changes.items():
        setattr(run, key, value)
    run.save()
    return run


def _sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)


def test_a_run_survives_the_round_trip(settings: Settings) -> None:
    run = _run(settings, "retrain-1", parameters={"seed": 3}, started=5.0, state="done")
    assert run.reload() == run
    assert [one.id for one in list_runs(settings)] == ["retrain-1"]


def test_a_run_whose_process_died_is_killed(settings: Settings) -> None:
    process = _sleeper()
    _run(settings, "retrain-1", state="running", pid=process.pid, pid_created=psutil.Process(process.pid).create_time())
    assert list_runs(settings)[0].state == "running"
    process.kill()
    process.wait()
    assert list_runs(settings)[0].state == "killed"
    ended = finish(list_runs(settings)[0])
    assert ended.state == "killed"
    assert ended.exit_code == 7


def test_another_process_with_the_same_number_is_not_ours(settings: Settings) -> None:
    run = _run(settings, "retrain-1", state="running", pid=os.getpid(), pid_created=1.0)
    assert not run.alive


def test_asking_again_attaches_to_the_live_run(settings: Settings) -> None:
    process = _sleeper()
    created = psutil.Process(process.pid).create_time()
    live = _run(settings, "retrain-1", parameters={"a": 1}, state="running", pid=process.pid, pid_created=created)
    try:
        assert start_run(settings, "retrain", {"a": 1}).id == live.id
    finally:
        process.kill()
        process.wait()


def test_cancel_ends_the_whole_group(settings: Settings) -> None:
    sleep = "import time; time.sleep(60)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleep!r}]); {sleep}"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    parent = psutil.Process(process.pid)
    deadline = time.monotonic() + 10
    while not parent.children() and time.monotonic() < deadline:
        time.sleep(0.05)
    child = parent.children()[0]
    run = _run(settings, "retrain-1", state="running", pid=process.pid, pid_created=parent.create_time())
    # Reap the parent as its starter does, so that it does not stay as a zombie.
    runs._children[run.id] = process
    cancel(run, grace_s=2)
    process.wait(timeout=5)
    child.wait(timeout=5)
    assert run.reload().state == "cancelled"


def test_find_by_end_last_and_with_a_sentence(settings: Settings) -> None:
    _run(settings, "retrain-1-aaaa", state="done", started=1.0)
    _run(settings, "retrain-2-bbbb", state="done", started=2.0)
    assert find_run(settings, "last").id == "retrain-2-bbbb"
    assert find_run(settings, "aaaa").id == "retrain-1-aaaa"
    with pytest.raises(InputError, match="2 runs"):
        find_run(settings, "retrain")
    with pytest.raises(InputError, match="no run"):
        find_run(settings, "zzzz")


def test_missing_values_are_named(settings: Settings) -> None:
    run = _run(settings, "retrain-1")
    with pytest.raises(StepFailed, match="gate"):
        run.value("gate", "verdict")


def test_a_damaged_run_does_not_hide_the_others(settings: Settings) -> None:
    _run(settings, "retrain-1", state="done")
    broken = settings.runs / "retrain-2"
    broken.mkdir()
    (broken / "run.json").write_text('{"id": "retr')
    assert [one.id for one in list_runs(settings)] == ["retrain-1"]


def test_two_command_lines_that_ask_at_once_share_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(home=tmp_path / "home")
    started: list[Run] = []

    def slowly(settings: Settings, pipeline: str, parameters: Any, key: str) -> Run:
        found = list(started)
        time.sleep(0.1)
        if found:
            return found[0]
        started.append(Run(f"{pipeline}-1", pipeline, dict(parameters)))
        return started[0]

    monkeypatch.setattr(runs, "_attach_or_start", slowly)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: runs.start_run(settings, "release", {"adapter": "x"}), range(2)))
    assert len(started) == 1


def test_an_interpreter_that_kfp_cannot_start_is_told(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/home/ann/my work/.venv/bin/python")
    with pytest.raises(InputError, match="my work"):
        start_run(settings, "reembed", {"source": "faq"})
    assert list_runs(settings) == []


def test_cancel_lets_a_task_give_back_what_it_holds(settings: Settings, tmp_path: Path) -> None:
    given_back = tmp_path / "given-back"
    task = (
        "import pathlib, signal, sys, time\n"
        f"def end(*_): time.sleep(0.5); pathlib.Path({str(given_back)!r}).touch(); sys.exit()\n"
        "signal.signal(signal.SIGTERM, end); print('ready', flush=True); time.sleep(60)"
    )
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {task!r}])"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    created = psutil.Process(process.pid).create_time()
    run = _run(settings, "retrain-1", state="running", pid=process.pid, pid_created=created)
    runs._children[run.id] = process
    cancel(run, grace_s=10)
    process.wait(timeout=5)
    process.stdout.close()
    assert given_back.exists()
