"""Supervision with tiny parts: what is killed comes back, what runs stays, nothing is left behind."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from sluice.infra.errors import ConflictError, InputError, UnavailableError
from sluice.infra.orphans import SUPERVISORD, end_processes, find_processes
from sluice.infra.ports import is_free
from sluice.infra.processes import Supervisor
from sluice.infra.services import HealthCheck, ServiceSpec, ServiceStatus
from sluice.infra.supervisord import socket_path

pytestmark = pytest.mark.integration

_PART = Path(__file__).parents[1] / "support" / "http_part.py"


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    made = Supervisor(tmp_path / "home")
    try:
        yield made
    finally:
        made.down()
        end_processes(find_processes(made.home), grace_s=0)


def part(name: str, port: int, *ways: str, depends_on: tuple[str, ...] = ()) -> ServiceSpec:
    return ServiceSpec(
        name=name,
        command=(sys.executable, str(_PART), str(port), *ways),
        health=replace(HealthCheck.http(f"http://127.0.0.1:{port}/", timeout_s=1.0), hang_s=2.0),
        environment={"WORD": 'it\'s 100% "quoted"; # and, = more\nlines'},
        ready_timeout_s=20.0,
        stop_wait_s=3,
        url=f"http://127.0.0.1:{port}",
        depends_on=depends_on,
    )


@pytest.fixture
def ports() -> list[int]:
    found: list[int] = []
    port = 30000 + os.getpid() % 1500
    while len(found) < 3:
        port += 1
        if is_free(port):
            found.append(port)
    return found


def pids(statuses: list[ServiceStatus]) -> dict[str, int | None]:
    return {status.name: status.pid for status in statuses}


def wait_until(true: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.1)


def test_parts_start_in_order_stay_untouched_and_change_alone(supervisor: Supervisor, ports: list[int]) -> None:
    said: list[str] = []
    specs = [part("second", ports[1], depends_on=("first",)), part("first", ports[0])]
    before = supervisor.up(specs, lambda done, total, message: said.append(f"{done:.0f}/{total:.0f} {message}"))
    assert [status.healthy for status in before] == [True, True]
    assert said.index("1/2 first serves") < said.index("2/2 second serves")
    started = {name: psutil.Process(pid).create_time() for name, pid in pids(before).items() if pid}
    assert started["first"] < started["second"]
    environment = psutil.Process(before[0].pid).environ()
    assert environment["WORD"] == specs[0].environment["WORD"]
    assert os.getpgid(before[0].pid or 0) == before[0].pid, "each part has a process group of its own"

    assert pids(supervisor.up(specs)) == pids(before), "a second up leaves everything alone"

    changed = [specs[0], replace(specs[1], environment={"WORD": "new"})]
    after = supervisor.up(changed)
    assert pids(after)["second"] == pids(before)["second"]
    assert pids(after)["first"] != pids(before)["first"], "a changed secret restarts its part, and only it"

    kept = supervisor.up([part("third", ports[2])], others="keep")
    assert pids(kept).keys() == {"third"}
    assert pids(supervisor.status()) == pids(after) | pids(kept)

    assert [status.name for status in supervisor.up([changed[1]])] == ["first"]
    assert is_free(ports[1]), "a part that is no longer wanted is stopped"
    assert is_free(ports[2])

    supervisor.down()
    assert find_processes(supervisor.home) == []
    assert [status.state for status in supervisor.status()] == ["stopped"]


def test_a_killed_part_comes_back_even_when_its_child_holds_the_port(supervisor: Supervisor, ports: list[int]) -> None:
    spec = part("parent", ports[0], "children")
    [before] = supervisor.up([spec])
    assert before.pid
    os.kill(before.pid, signal.SIGKILL)
    wait_until(lambda: pids(supervisor.status())["parent"] not in (before.pid, None))
    wait_until(lambda: supervisor.status()[0].healthy and supervisor.status()[0].state == "running")
    [after] = supervisor.up([spec])
    assert after.healthy
    assert len(find_processes(supervisor.home, "parent")) == 2, "one parent and one child: no leftover"


def test_a_killed_supervisord_leaves_no_orphan_behind(supervisor: Supervisor, ports: list[int]) -> None:
    specs = [part("one", ports[0], "children"), part("two", ports[1])]
    before = supervisor.up(specs)
    [daemon] = find_processes(supervisor.home, SUPERVISORD)
    os.kill(daemon.pid, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(daemon.pid))
    lost = supervisor.status()
    assert [status.state for status in lost] == ["lost", "lost"]
    assert all(status.healthy for status in lost)
    after = supervisor.up(specs)
    assert all(status.healthy for status in after)
    assert not set(pids(before).values()) & {process.pid for process in find_processes(supervisor.home)}
    assert len(find_processes(supervisor.home)) == 4, "supervisord, a parent, its child, the other part"


@pytest.mark.parametrize("harm", ["stopped", "socket removed"])
def test_a_supervisord_that_does_not_answer_is_replaced(supervisor: Supervisor, ports: list[int], harm: str) -> None:
    specs = [part("one", ports[0])]
    supervisor.up(specs)
    [daemon] = find_processes(supervisor.home, SUPERVISORD)
    if harm == "stopped":
        daemon.suspend()
    else:
        socket_path(supervisor.home).unlink()
    [after] = supervisor.up(specs)
    assert after.healthy
    # Until init reaps it, a dead supervisord is still listed.
    assert not daemon.is_running() or daemon.status() == psutil.STATUS_ZOMBIE
    assert len(find_processes(supervisor.home, "one")) == 1


def test_a_part_that_hangs_is_restarted(supervisor: Supervisor, ports: list[int], tmp_path: Path) -> None:
    spec = replace(part("one", ports[0]), directory=tmp_path, ready_timeout_s=4.0)
    [before] = supervisor.up([spec])
    (tmp_path / "hang").touch()
    wait_until(lambda: not supervisor.status()[0].healthy)
    threading.Timer(4.0, (tmp_path / "hang").unlink).start()
    # Stopped in the kernel: it neither answers nor ends on SIGTERM.
    psutil.Process(before.pid).suspend()
    [after] = supervisor.up([spec])
    assert after.healthy
    assert after.pid != before.pid


def test_the_failure_shows_the_end_of_the_log_and_the_next_up_goes_on(supervisor: Supervisor, ports: list[int]) -> None:
    specs = [part("good", ports[0]), part("bad", ports[1], "die")]
    with pytest.raises(UnavailableError) as refused:
        supervisor.up(specs)
    assert "'bad' did not start" in str(refused.value)
    assert "cannot read the flux 14" in str(refused.value)
    assert "cannot read the flux 4\n" not in str(refused.value), "ten lines, not all"
    assert refused.value.hint
    good = pids(supervisor.status())["good"]
    after = supervisor.up([specs[0], part("bad", ports[1])])
    assert all(status.healthy for status in after)
    assert pids(after)["good"] == good


def test_parts_that_cannot_be_are_refused_before_anything_starts(supervisor: Supervisor, ports: list[int]) -> None:
    with pytest.raises(UnavailableError, match="no program '/nowhere/weed'"):
        supervisor.up([replace(part("one", ports[0]), command=("/nowhere/weed",))])
    with pytest.raises(InputError, match="circle: one > two > one"):
        supervisor.up([part("one", ports[0], depends_on=("two",)), part("two", ports[1], depends_on=("one",))])
    assert find_processes(supervisor.home) == []


def test_one_up_at_a_time(supervisor: Supervisor, ports: list[int]) -> None:
    specs = [part("one", ports[0])]
    impatient = Supervisor(supervisor.home, lock_timeout_s=0.3)
    with supervisor.exclusive(), pytest.raises(ConflictError, match="Another process"):
        impatient.up(specs)
    results: list[list[ServiceStatus]] = []
    threads = [threading.Thread(target=lambda: results.append(Supervisor(supervisor.home).up(specs))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert len({status.pid for result in results for status in result}) == 1
    assert len(find_processes(supervisor.home, SUPERVISORD)) == 1


def test_a_long_home_gets_a_short_socket(tmp_path: Path, ports: list[int]) -> None:
    supervisor = Supervisor(tmp_path / ("a long 100% name " * 7) / "home")
    try:
        [status] = supervisor.up([part("one", ports[0])])
        assert status.healthy
        folder = socket_path(supervisor.home).parent
        assert len(str(folder)) < 90
        assert folder.stat().st_mode & 0o777 == 0o700
    finally:
        supervisor.down()
        end_processes(find_processes(supervisor.home), grace_s=0)
    assert find_processes(supervisor.home) == []
