"""The real parts of the local profile: SeaweedFS, MLflow and Milvus under supervision, and what is stored in them."""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from pydantic import SecretStr

from sluice.infra.errors import UnavailableError
from sluice.infra.local_parts import (
    LOCAL_PORTS,
    LocalSecrets,
    endpoints,
    load_or_create_secrets,
    local_parts,
    prepare_local_parts,
)
from sluice.infra.object_store import ObjectExists, ObjectMissing, S3ObjectStore
from sluice.infra.orphans import SUPERVISORD, end_processes, find_processes
from sluice.infra.ports import PortBook
from sluice.infra.processes import Supervisor
from sluice.infra.services import ServiceSpec
from sluice.infra.settings import ObjectStoreSettings, Settings, load_settings, write_endpoints

pytestmark = pytest.mark.integration


@dataclass(frozen=True)
class Stack:
    """One installation as `sluice up` makes it."""

    supervisor: Supervisor
    specs: list[ServiceSpec]
    settings: Settings
    ports: dict[str, int]
    secrets: LocalSecrets

    def pids(self) -> dict[str, int | None]:
        return {status.name: status.pid for status in self.supervisor.status()}


def make_stack(home: Path) -> Stack:
    settings = Settings(home=home)
    ports = PortBook(home, settings.ports.model_dump()).allocate(LOCAL_PORTS)
    secrets = load_or_create_secrets(settings)
    prepare_local_parts(settings)
    return Stack(Supervisor(home), local_parts(settings, ports, secrets), settings, ports, secrets)


def tear_down(home: Path) -> None:
    try:
        Supervisor(home).down()
    finally:
        end_processes(find_processes(home), grace_s=0)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("parts") / "home"
    try:
        made = make_stack(home)
        statuses = made.supervisor.up(made.specs)
        assert [(status.name, status.healthy) for status in statuses] == [
            ("seaweedfs", True),
            ("mlflow", True),
            ("milvus", True),
        ]
        write_endpoints(home, endpoints(made.settings, made.ports, made.secrets))
        yield made
    finally:
        tear_down(home)
        assert find_processes(home) == []


@pytest.fixture
def store(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> S3ObjectStore:
    monkeypatch.setenv("SLUICE_HOME", str(stack.settings.home))
    found = S3ObjectStore(load_settings().object_store)
    found.ensure_bucket()
    return found


def wait_until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.2)


def listeners() -> list[tuple[tuple[str, int], int | None]]:
    """((address, port), process id) of every TCP server that this user may see."""
    return [
        ((connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port), connection.pid)
        for connection in psutil.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr
    ]


def test_everything_listens_on_the_loopback_address_and_on_its_own_ports_only(stack: Stack) -> None:
    ours = {process.pid for process in find_processes(stack.supervisor.home)}
    listening = {address for address, pid in listeners() if pid in ours}
    assert listening == {("127.0.0.1", port) for port in stack.ports.values()}


def test_no_secret_shows_in_a_command_line_or_a_readable_file(stack: Stack) -> None:
    secret = stack.secrets.secret_key.get_secret_value()
    for process in find_processes(stack.supervisor.home):
        assert secret not in " ".join(process.cmdline())
    holding = [
        path
        for path in stack.settings.home.rglob("*")
        if path.is_file() and path.stat().st_size < 2**20 and secret.encode() in path.read_bytes()
    ]
    assert stack.settings.home / "secrets.json" in holding
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 for path in holding), holding


def test_objects_are_written_once_read_back_and_listed_in_key_order(store: S3ObjectStore, tmp_path: Path) -> None:
    store.put("plain/a", b"one", if_absent=True)
    with pytest.raises(ObjectExists, match="plain/a"):
        store.put("plain/a", b"two", if_absent=True)
    assert store.get("plain/a") == b"one"
    assert store.head("plain/a") is not None
    assert store.head("plain/none") is None
    with pytest.raises(ObjectMissing, match="plain/none"):
        store.get("plain/none")
    with pytest.raises(ObjectMissing, match="plain/none"):
        store.get_file("plain/none", tmp_path / "none")
    large = os.urandom(20 * 2**20)
    (tmp_path / "large").write_bytes(large)
    store.put_file("files/large", tmp_path / "large")
    store.get_file("files/large", tmp_path / "back" / "large")
    assert (tmp_path / "back" / "large").read_bytes() == large
    keys = [f"order/{name}" for name in ("b/1", "a", "b-1", "b", "a/x", "c0", "B")]
    keys += [f"order/many/{number:04d}" for number in range(1010)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b""), keys))
    assert [info.key for info in store.list("order/")] == sorted(keys), "more than one page, in key order"
    for number in range(12):
        store.put(f"ledger/{number:08d}.json", b"{}")
    assert [info.key for info in store.list("ledger/")] == [f"ledger/{number:08d}.json" for number in range(12)]
    store.delete("plain/a")
    store.delete("plain/a")
    assert store.head("plain/a") is None


def test_one_of_eight_wins_a_conditional_write(store: S3ObjectStore) -> None:
    for round_ in range(5):
        won: list[int] = []
        lost: list[int] = []
        gate = threading.Barrier(8)

        def race(number: int, key: str, won: list[int], lost: list[int], gate: threading.Barrier) -> None:
            gate.wait()
            try:
                store.put(key, f"by {number}".encode(), if_absent=True)
                won.append(number)
            except ObjectExists:
                lost.append(number)

        key = f"race/{round_}"
        threads = [threading.Thread(target=race, args=(number, key, won, lost, gate)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(lost)) == (1, 7)
        assert store.get(key) == f"by {won[0]}".encode()


def test_wrong_credentials_and_a_dead_endpoint_end_in_a_sentence(stack: Stack, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{stack.ports['s3']}"
    wrong = S3ObjectStore(
        ObjectStoreSettings(endpoint_url=address, access_key=stack.secrets.access_key, secret_key=SecretStr("wrong"))
    )
    (tmp_path / "file").write_bytes(b"x")
    attempts: list[Callable[[], object]] = [
        lambda: wrong.put("k", b"x"),
        lambda: wrong.get("k"),
        lambda: wrong.head("k"),
        lambda: list(wrong.list("")),
        lambda: wrong.put_file("k", tmp_path / "file"),
        wrong.ensure_bucket,
    ]
    for attempt in attempts:
        with pytest.raises(UnavailableError, match="refused") as refused:
            attempt()
        assert "SLUICE_OBJECT_STORE__SECRET_KEY" in refused.value.hint
    nobody = S3ObjectStore(
        ObjectStoreSettings(endpoint_url="http://127.0.0.1:9", access_key="a", secret_key=SecretStr("b"))
    )
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9/sluice does not answer") as refused:
        nobody.get("k")
    assert "sluice up" in refused.value.hint


def test_mlflow_keeps_artifacts_in_the_object_store(stack: Stack, store: S3ObjectStore, tmp_path: Path) -> None:
    uri = f"http://127.0.0.1:{stack.ports['mlflow']}"
    request = urllib.request.Request(
        f"{uri}/api/2.0/mlflow-artifacts/artifacts/0/run/artifacts/report.md", data=b"# Report", method="PUT"
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
        assert answer.status == 200
    assert [info.key for info in store.list("mlflow/")] == ["mlflow/0/run/artifacts/report.md"]
    assert store.get("mlflow/0/run/artifacts/report.md") == b"# Report"


def test_milvus_answers(stack: Stack) -> None:
    from pymilvus import MilvusClient

    client = MilvusClient(uri=f"http://127.0.0.1:{stack.ports['milvus']}")
    client.create_collection("faq_000000000000", dimension=4)
    assert client.list_collections() == ["faq_000000000000"]
    client.close()


def test_a_second_up_keeps_every_process(stack: Stack) -> None:
    before = stack.pids()
    assert None not in before.values()
    again = make_stack(stack.settings.home)
    assert again.specs == stack.specs, "ports, keys and database are the same"
    begun = time.monotonic()
    stack.supervisor.up(again.specs)
    assert time.monotonic() - begun < 5.0
    assert stack.pids() == before


@pytest.mark.parametrize("name", ["seaweedfs", "mlflow", "milvus"])
def test_a_killed_part_comes_back_with_its_data(stack: Stack, store: S3ObjectStore, name: str) -> None:
    store.put("kept/by-kill", name.encode())
    before = stack.pids()
    killed = before[name]
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    wait_until(
        lambda: any(
            status.name == name and status.healthy and status.pid not in (killed, None)
            for status in stack.supervisor.status()
        )
    )
    assert all(status.healthy for status in stack.supervisor.up(stack.specs))
    after = stack.pids()
    assert {other for other in after if after[other] != before[other]} == {name}
    assert store.get("kept/by-kill") == name.encode()


def test_a_killed_supervisord_is_mended_without_orphans(stack: Stack, store: S3ObjectStore) -> None:
    store.put("kept/by-supervisord", b"kept")
    old = {process.pid for process in find_processes(stack.supervisor.home)}
    [daemon] = find_processes(stack.supervisor.home, SUPERVISORD)
    os.kill(daemon.pid, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(daemon.pid))
    assert all(status.healthy for status in stack.supervisor.up(stack.specs))
    new = {process.pid for process in find_processes(stack.supervisor.home)}
    assert not old & new
    listening = [pid for (_, port), pid in listeners() if port in stack.ports.values()]
    assert set(listening) <= new
    assert store.get("kept/by-supervisord") == b"kept"


def test_two_installations_live_side_by_side(stack: Stack, tmp_path: Path) -> None:
    other = make_stack(tmp_path / "other")
    try:
        assert not set(other.ports.values()) & set(stack.ports.values())
        statuses = other.supervisor.up(other.specs[:1])
        assert statuses[0].healthy
        assert all(status.healthy for status in stack.supervisor.status())
    finally:
        tear_down(tmp_path / "other")
    assert all(status.healthy for status in stack.supervisor.status()), "down ends its own processes only"


def test_down_leaves_no_process_and_up_finds_the_data_again(stack: Stack, store: S3ObjectStore) -> None:
    store.put("kept/by-down", b"kept")
    assert stack.supervisor.down() == 0, "everything ended by itself when asked"
    assert find_processes(stack.supervisor.home) == []
    assert {status.state for status in stack.supervisor.status()} == {"stopped"}
    stack.supervisor.up(stack.specs)
    assert store.get("kept/by-down") == b"kept"
