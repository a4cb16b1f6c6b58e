"""Looking by itself and being called lead to one release; a call that is not MLflow's leads to nothing."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sluice.infra.errors import InputError, UnavailableError
from sluice.infra.webhook_signature import signature_of
from sluice.pipelines import approval_watch, runs
from sluice.pipelines.approval_watch import PATH, Receiver, Watch, start_release
from sluice.pipelines.approvals import take_over
from sluice.pipelines.cli.approvals import seconds
from sluice.pipelines.runs import list_runs
from sluice.registry.webhooks import DELIVERY, LARGEST_BODY, SIGNATURE, TIMESTAMP, Deliveries
from tests.pipelines.approval_site import ApprovalSite

SECRET = "a secret of more than 24 characters"


@pytest.fixture
def wanted() -> list[int]:
    return []


@pytest.fixture
def receiver(wanted: list[int]) -> Iterator[Receiver]:
    with Receiver("assistant", Deliveries(SECRET), wanted.append) as running:
        yield running


def event(version: str = "3", model: str = "assistant", key: str = "approval") -> bytes:
    data = {"name": model, "version": version, "key": key, "value": "approved"}
    return json.dumps({"entity": "model_version_tag", "action": "set", "data": data}).encode()


def signed(body: bytes, delivery: str = "d-1", stamp: str = "") -> dict[str, str]:
    stamp = stamp or str(int(time.time()))
    return {DELIVERY: delivery, TIMESTAMP: stamp, SIGNATURE: signature_of(SECRET.encode(), delivery, stamp, body)}


def send(
    receiver: Receiver, body: bytes, headers: dict[str, str], method: str = "POST", path: str = PATH
) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", receiver.port, timeout=5)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_a_signed_call_leads_to_a_look_once(receiver: Receiver, wanted: list[int]) -> None:
    assert send(receiver, event(), signed(event()))[0] == 202
    assert wanted == [3]
    # Again, as MLflow does when our answer was lost, or as somebody who listened.
    assert send(receiver, event(), signed(event()))[0] == 409
    assert wanted == [3]


def test_a_signed_call_about_something_else_leads_nowhere(receiver: Receiver, wanted: list[int]) -> None:
    for number, body in enumerate((event(model="example_model"), event(key="gate"))):
        assert send(receiver, body, signed(body, f"d-{number}"))[0] == 202
    assert send(receiver, b"[]", signed(b"[]", "d-3"))[0] == 400
    assert wanted == []


def test_every_other_call_is_refused_and_changes_nothing(receiver: Receiver, wanted: list[int]) -> None:
    body = event()
    stale = str(int(time.time()) - 3600)
    assert send(receiver, body, {})[0] == 401
    assert send(receiver, body, {**signed(body), SIGNATURE: "v1,AAAA"})[0] == 401
    assert send(receiver, body, signed(body, stamp=stale))[0] == 401
    assert send(receiver, event("4"), signed(body))[0] == 401
    for path in ("/", f"{PATH}/", f"{PATH}?a=1", "/../webhooks/mlflow", "/webhooks"):
        assert send(receiver, body, signed(body), path=path)[0] == 404, path
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert send(receiver, b"", {}, method)[0] == 405
    assert send(receiver, b"", {}, "BREW")[0] == 501
    large = b"x" * (LARGEST_BODY + 1)
    assert send(receiver, b"", {"content-length": str(LARGEST_BODY + 1)})[0] == 413
    assert send(receiver, b"", {**signed(large), "content-length": "9" * 5000})[0] == 413
    assert send(receiver, b"", {**signed(body), "content-length": "-1"})[0] == 411
    assert wanted == []
    for _, said in (send(receiver, body, {}), send(receiver, body, {}, path="/")):
        assert SECRET not in said


def test_a_body_without_a_length_or_an_end_holds_nobody_up(
    receiver: Receiver, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    chunked = f"POST {PATH} HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    half = f"POST {PATH} HTTP/1.1\r\nhost: a\r\ncontent-length: 500\r\n\r\nhello"
    with (
        socket.create_connection(("127.0.0.1", receiver.port)) as one,
        socket.create_connection(("127.0.0.1", receiver.port)) as other,
    ):
        one.sendall(chunked.encode())
        other.sendall(half.encode())
        assert b" 411 " in one.recv(200)
        assert send(receiver, event(), signed(event()))[0] == 202
    assert wanted == [3]


def test_callers_that_send_drop_by_drop_hold_nobody_up(wanted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approval_watch, "CALL_TIMEOUT_S", 0.5)
    monkeypatch.setattr(approval_watch, "CALLS_AT_ONCE", 2)
    ended = threading.Event()

    def drip(connection: socket.socket) -> None:
        while not ended.wait(0.1):
            try:
                connection.sendall(b"x")
            except OSError:
                return

    with Receiver("assistant", Deliveries(SECRET), wanted.append) as receiver:
        slow = [socket.create_connection(("127.0.0.1", receiver.port)) for _ in range(4)]
        for connection in slow:
            threading.Thread(target=drip, args=[connection], daemon=True).start()
        try:
            assert send(receiver, event(), signed(event()))[0] == 202
            for connection in slow:
                connection.settimeout(10)
                with suppress(ConnectionResetError):
                    assert connection.recv(10) == b"", "it was let go on"
        finally:
            ended.set()
            for connection in slow:
                connection.close()
    assert wanted == [3]


def test_a_port_that_is_taken_is_told(receiver: Receiver) -> None:
    with pytest.raises(UnavailableError, match=f"127.0.0.1:{receiver.port} cannot be listened on"):
        Receiver("assistant", Deliveries(SECRET), lambda _: None, port=receiver.port)


@pytest.mark.parametrize(("text", "value"), [("10s", 10), ("2m", 120), ("1h", 3600), ("90", 90), (" 1.5s ", 1.5)])
def test_times_between_looks(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "soon", "0s", "0.1s", "-5s", "10 s", "1d", "nan", "9999999h"])
def test_times_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="--every"):
        seconds(text)


@pytest.fixture
def sleeping(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Releases whose process does nothing, and goes on until the test ends."""
    real = subprocess.Popen

    def started(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return real([sys.executable, "-c", "import time; time.sleep(120)", *command[3:]], **options)

    monkeypatch.setattr(subprocess, "Popen", started)
    yield
    for child in list(runs._children.values()):
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    runs._children.clear()


def approved(site: ApprovalSite) -> ApprovalSite:
    site.champion()
    site.candidate()
    site.mlflow.say(approval="approved", by="Anna")
    return site


@pytest.mark.usefixtures("sleeping")
def test_polling_and_webhooks_at_the_same_time_start_one_release(site: ApprovalSite) -> None:
    approved(site)
    told: list[str] = []
    watches = [Watch(site.workspace, told.append, every_s=0.05) for _ in range(3)]
    threads = [threading.Thread(target=watch.run) for watch in watches]
    with Receiver("assistant", Deliveries(SECRET), watches[0].look_at) as receiver:
        for thread in threads:
            thread.start()
        for number in range(5):
            assert send(receiver, event("1"), signed(event("1"), f"d-{number}"))[0] == 202
        deadline = time.monotonic() + 10
        while site.mlflow.see().get("approval.recorded") != "approved" and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        for watch in watches:
            watch.stop()
        for thread in threads:
            thread.join()
    (run,) = list_runs(site.workspace.settings)
    assert (run.pipeline, run.state) == ("release", "running")
    assert site.kinds() == ["approval by Anna"]
    assert any(f"release {run.id} is running" in sentence for sentence in told)


def test_a_watch_outlives_an_mlflow_that_does_not_answer(site: ApprovalSite, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    looked = threading.Event()

    def fails(*_: Any, **__: Any) -> Any:
        if told:
            looked.set()
        raise UnavailableError("The MLflow server does not answer.")

    monkeypatch.setattr(approval_watch, "take_over", fails)
    watch = Watch(site.workspace, told.append, every_s=0.05)
    thread = threading.Thread(target=watch.run)
    thread.start()
    assert looked.wait(10)
    watch.stop()
    thread.join()
    assert told.count("The MLflow server does not answer.") == 1


def finished(run: runs.Run, state: str) -> None:
    run = run.reload()
    run.state = state
    run.save()
    child = runs._children.pop(run.id)
    child.kill()
    child.wait()


@pytest.mark.usefixtures("sleeping")
@pytest.mark.parametrize("state", ["done", "failed", "cancelled"])
def test_a_release_that_has_ended_is_not_started_by_a_late_look(site: ApprovalSite, state: str) -> None:
    approved(site)
    settings = site.workspace.settings
    take_over(site.workspace, lambda decided: start_release(settings, decided))
    (run,) = list_runs(settings)
    finished(run, state)
    # Killed before the page said so, and looked at again when all is over.
    site.mlflow.versions["1"]["tags"].pop("approval.recorded")
    take_over(site.workspace, lambda decided: start_release(settings, decided))
    assert [one.id for one in list_runs(settings)] == [run.id]


@pytest.mark.usefixtures("sleeping")
def test_a_release_that_was_killed_is_started_again(site: ApprovalSite) -> None:
    approved(site)
    settings = site.workspace.settings
    ((decided,), _) = take_over(site.workspace)
    first = start_release(settings, decided)
    finished(first, "running")
    second = start_release(settings, decided)
    assert second.id != first.id
    assert start_release(settings, decided).id == second.id


@pytest.mark.usefixtures("sleeping")
def test_a_later_approval_does_not_take_the_run_of_an_earlier_one_for_its_own(site: ApprovalSite) -> None:
    approved(site)
    settings = site.workspace.settings
    ((decided,), _) = take_over(site.workspace)
    first = start_release(settings, decided)
    later = replace(decided, approval="sha256:" + "1" * 64)
    with pytest.raises(UnavailableError, match="earlier approval"):
        start_release(settings, later)
    finished(first, "failed")
    assert start_release(settings, later).id != first.id


def test_a_starter_that_is_killed_before_the_run_has_its_process_leaves_nothing_that_runs(
    site: ApprovalSite, tmp_path: Path
) -> None:
    """The process is there, and nobody knows its number: it must end without doing anything."""
    approved(site)
    settings = site.workspace.settings
    code = (
        "import os, sys; from pathlib import Path; from sluice.infra.settings import Settings;"
        "from sluice.pipelines import runs;"
        "save = runs.Run.save; runs.Run.save = lambda run: os._exit(9) if run.pid else save(run);"
        "runs.start_run(Settings(home=Path(sys.argv[1])), 'release', {'adapter': 'sha256:' + '0' * 64}, key='k')"
    )
    assert subprocess.run([sys.executable, "-c", code, str(settings.home)], check=False).returncode == 9
    (left,) = list_runs(settings)
    assert (left.state, left.key) == ("killed", "k")
    deadline = time.monotonic() + 60
    while _processes_of(left) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _processes_of(left)
    assert list((left.folder).glob("tasks/*")) == []
    assert not (left.folder / "dag.json").exists()


def _processes_of(run: runs.Run) -> list[int]:
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if str(run.folder) in process.cmdline():
                found.append(process.pid)
        except psutil.Error:
            continue
    return found
