"""Races between processes over a real SeaweedFS: one winner for each ledger entry, step key and promotion."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from sluice.infra.errors import ConflictError, UnavailableError
from sluice.infra.object_store import S3ObjectStore
from sluice.infra.program import program
from sluice.infra.settings import ObjectStoreSettings
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.attestation import Signer
from sluice.provenance.canonical import digest_bytes
from sluice.provenance.ledger import Draft, Ledger, LedgerEntry
from sluice.provenance.lineage import LineageGraph
from sluice.provenance.releases import promote, read_state, record_approval, record_decision
from sluice.provenance.steps import StepKey, StepOutput, StepRunner

pytestmark = pytest.mark.integration

RACERS = 8
CODE = digest_bytes(b"code")
KEY = StepKey("train", CODE, {"seed": 1})


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStoreSettings]:
    folder = tmp_path_factory.mktemp("seaweedfs")
    servers = ("s3", "master", "volume", "filer", "admin")
    ports = free_ports(2 * len(servers))
    options = [f"-{server}.port={port}" for server, port in zip(servers, ports[::2], strict=True)]
    options += [f"-{server}.port.grpc={port}" for server, port in zip(servers, ports[1::2], strict=True)]
    command = [program("weed"), "-logtostderr=true", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [*options, "-s3.port.iceberg=0", "-s3.port.lance=0", "-admin.ui=false", "-webdav=false"]
    command += ["-master.telemetry=false"]
    settings = ObjectStoreSettings(
        endpoint_url=f"http://127.0.0.1:{ports[0]}",
        bucket="sluice",
        access_key="provenance-test",
        secret_key=SecretStr("provenance-test-secret"),
    )
    keys = {"AWS_ACCESS_KEY_ID": "provenance-test", "AWS_SECRET_ACCESS_KEY": "provenance-test-secret"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **keys}, start_new_session=True, cwd=folder
        )
        try:
            wait_for(settings, process, folder / "log")
            yield settings
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(settings: ObjectStoreSettings, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            S3ObjectStore(settings).ensure_bucket()
            S3ObjectStore(settings).put("ready", b"")
            return
        except UnavailableError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "signer.pem"
    Signer.load_or_create(path)
    return path


class Racers:
    """Processes that wait for each other, then all do the same thing; kept from one race to the next."""

    def __init__(self, settings: ObjectStoreSettings, key_file: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["boto3", "securesystemslib.dsse", __name__])
        self._pool = ProcessPoolExecutor(
            RACERS, mp_context=context, initializer=_begin, initargs=(context.Barrier(RACERS), settings, key_file)
        )

    def race(self, worker: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`worker(number, *arguments)` for each number; what each returned. The barrier gives every process one."""
        running = [self._pool.submit(worker, number, *arguments) for number in range(RACERS)]
        return [one.result(timeout=60) for one in running]

    def close(self) -> None:
        self._pool.shutdown()


_state: dict[str, Any] = {}


def _begin(barrier: Barrier, settings: ObjectStoreSettings, key_file: Path) -> None:
    objects = S3ObjectStore(settings)
    objects.head("ready")
    _state.update(barrier=barrier, objects=objects, signer=Signer.load_or_create(key_file))


@pytest.fixture(scope="module")
def racers(store: ObjectStoreSettings, key_file: Path) -> Iterator[Racers]:
    racers = Racers(store, key_file)
    yield racers
    racers.close()


def open_ledger(settings: ObjectStoreSettings, key_file: Path) -> Ledger:
    return Ledger(S3ObjectStore(settings), "faq", Signer.load_or_create(key_file))


def append_once(number: int, head: str) -> str:
    ledger = Ledger(_state["objects"], "faq", _state["signer"])
    ledger.entries()
    _state["barrier"].wait(60)
    try:
        return ledger.append("note", {}, f"racer-{number}", expected_head=head).digest
    except ConflictError as error:
        return error.message


def append_often(number: int) -> list[int]:
    ledger = Ledger(_state["objects"], "faq", _state["signer"])
    _state["barrier"].wait(60)
    drafts = [Draft("count", {"racer": number, "turn": turn}) for turn in range(3)]
    return [ledger.transact(f"racer-{number}", lambda _, draft=draft: draft).sequence for draft in drafts]  # type: ignore[misc]


def run_step(number: int, work: Path) -> tuple[bool, str, int, bool]:
    artifacts = ArtifactStore(_state["objects"], work / f"cache-{number}")
    # Two machines with four processes each: the folder is the machine's.
    runner = StepRunner(_state["objects"], artifacts, _state["signer"], work / f"machine-{number % 2}")
    called: list[int] = []

    def function(folder: Path) -> StepOutput:
        called.append(number)
        time.sleep(0.2)
        digest = artifacts.put_files({"weights": f"by {number}".encode()}, "adapter").digest
        return StepOutput({"adapter": digest}, {"by": number})

    _state["barrier"].wait(60)
    record, hit = runner.run(KEY, function)
    return hit, record.statement, int(record.output.values["by"]), bool(called)


def promote_once(number: int, candidates: list[str]) -> str:
    ledger = Ledger(_state["objects"], "faq", _state["signer"])
    _state["barrier"].wait(60)
    try:
        promote(ledger, release=candidates[number], expected_champion=None, actor=f"racer-{number}")
        return candidates[number]
    except ConflictError as error:
        return error.message


def test_one_of_eight_processes_appends_after_a_head(
    store: ObjectStoreSettings, key_file: Path, racers: Racers
) -> None:
    first = open_ledger(store, key_file).append("note", {}, "test", expected_head=None)
    results = racers.race(append_once, first.digest)
    (winner,) = [result for result in results if result.startswith("sha256:")]
    assert sum("was first: note at" in result for result in results) == RACERS - 1
    assert [entry.digest for entry in open_ledger(store, key_file).entries()] == [first.digest, winner]


def test_eight_processes_that_go_on_lose_nothing(store: ObjectStoreSettings, key_file: Path, racers: Racers) -> None:
    before = len(open_ledger(store, key_file).entries())
    sequences = [one for taken in racers.race(append_often) for one in taken]
    assert sorted(sequences) == list(range(before + 1, before + 1 + 3 * RACERS))
    added = open_ledger(store, key_file).entries()[before:]
    assert {(entry.body["racer"], entry.body["turn"]) for entry in added} == {
        (racer, turn) for racer in range(RACERS) for turn in range(3)
    }


def test_eight_processes_with_one_step_key_end_with_one_record(
    store: ObjectStoreSettings, racers: Racers, tmp_path: Path
) -> None:
    results = racers.race(run_step, tmp_path)
    assert len({statement for _, statement, _, _ in results}) == 1
    winners = [number for number, (hit, _, _, _) in enumerate(results) if not hit]
    assert len(winners) == 1
    assert {by for _, _, by, _ in results} == set(winners)
    assert sum(called for *_, called in results) <= 2, "at most once on each machine"
    objects = S3ObjectStore(store)
    assert len(list(objects.list("steps/"))) == 1
    graph = LineageGraph.load(objects)
    (record,) = graph.steps.values()
    tree = graph.ancestors(record.output.artifacts["adapter"])
    assert [(node.kind, node.label) for node in tree.children] == [("step", "train")]


def test_one_of_eight_promoters_wins(store: ObjectStoreSettings, key_file: Path, racers: Racers) -> None:
    ledger = open_ledger(store, key_file)
    candidates = [digest_bytes(f"candidate {number}".encode()) for number in range(RACERS)]
    for candidate in candidates:
        record_decision(
            ledger,
            adapter=candidate,
            verdict="pass",
            report=CODE,
            expires="2999-01-01T00:00:00Z",
            holdout=None,
            champion=None,
            actor="gate",
        )
        record_approval(ledger, adapter=candidate, approver="ann")
    results = racers.race(promote_once, candidates)
    (winner,) = [result for result in results if result in candidates]
    assert read_state(ledger).champion() == winner
    assert sum("by a promotion of racer-" in result for result in results) == RACERS - 1


ROUNDS = 3


def _always(draft: Draft, entries: list[LedgerEntry]) -> Draft:
    return draft


def race_rounds(number: int, settings: ObjectStoreSettings, key_file: Path, folder: Path) -> None:
    """In each round append, promote, append; note on disk what was acknowledged, after it was."""
    ledger = open_ledger(settings, key_file)
    objects = S3ObjectStore(settings)
    with (folder / f"{number}.jsonl").open("a", buffering=1) as notes:
        for turn in range(ROUNDS):
            notes.write(json.dumps({"ready": turn}) + "\n")
            while objects.head(f"go/{turn}") is None:
                time.sleep(0.01)
            before = objects.get(f"go/{turn}").decode() or None
            for half in (1, 2):
                draft = Draft("count", {"racer": number, "turn": turn, "half": half})
                entry = ledger.transact(f"racer-{number}", partial(_always, draft))
                notes.write(json.dumps({"entry": entry.digest}) + "\n")
                try:
                    release = digest_bytes(f"round {turn} candidate {number}".encode())
                    promote(ledger, release=release, expected_champion=before, actor=f"racer-{number}")
                    notes.write(json.dumps({"won": turn, "release": release}) + "\n")
                except ConflictError as error:
                    notes.write(json.dumps({"lost": turn, "why": error.message}) + "\n")
            notes.write(json.dumps({"end": turn}) + "\n")


def test_promoters_that_are_killed_leave_one_champion_and_a_whole_chain(
    store: ObjectStoreSettings, key_file: Path, racers: Racers, tmp_path: Path
) -> None:
    """Eight processes, three rounds, one of them killed with -9 in the midst of each."""
    ledger, objects = open_ledger(store, key_file), S3ObjectStore(store)
    context = multiprocessing.get_context("forkserver")
    processes = [
        context.Process(target=race_rounds, args=(number, store, key_file, tmp_path), daemon=True)
        for number in range(RACERS)
    ]
    for process in processes:
        process.start()
    live = dict(enumerate(processes))

    def notes(number: int) -> list[dict[str, Any]]:
        file = tmp_path / f"{number}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait_until_all(said: dict[str, int]) -> None:
        deadline = time.monotonic() + 60
        while not all(said in notes(number) for number in live):
            assert time.monotonic() < deadline, {number: notes(number) for number in live}
            time.sleep(0.01)

    for turn in range(ROUNDS):
        champion = read_state(ledger).champion()
        for number in live:
            release = digest_bytes(f"round {turn} candidate {number}".encode())
            fields = {"report": CODE, "expires": "2999-01-01T00:00:00Z", "holdout": None, "champion": champion}
            record_decision(ledger, adapter=release, verdict="pass", actor="gate", **fields)  # type: ignore[arg-type]
            record_approval(ledger, adapter=release, approver="ann")
        wait_until_all({"ready": turn})
        objects.put(f"go/{turn}", (champion or "").encode())
        time.sleep(random.uniform(0, 0.1))
        killed = live.pop(turn)
        assert killed.pid is not None
        os.kill(killed.pid, signal.SIGKILL)
        killed.join(20)
        wait_until_all({"end": turn})
        promotions = [e for e in ledger.entries() if e.kind == "promotion" and e.body["previous"] == champion]
        assert len(promotions) == 1, "one winner in each round"
        for number in live:
            for one in notes(number):
                if one.get("won") == turn:
                    assert one["release"] == promotions[0].body["release"]
                elif one.get("lost") == turn:
                    assert f"by a promotion of {promotions[0].actor}" in one["why"]
    for process in live.values():
        process.join(30)
    entries = open_ledger(store, key_file).entries()
    digests = {entry.digest for entry in entries}
    assert all(one["entry"] in digests for number in range(RACERS) for one in notes(number) if "entry" in one)
    counts = [tuple(e.body.values()) for e in entries if e.kind == "count" and "half" in e.body]
    assert len(counts) == len(set(counts)), "nothing was appended twice"
    survived = [(number, turn, half) for number in live for turn in range(ROUNDS) for half in (1, 2)]
    found = {(e.body["racer"], e.body["turn"], e.body["half"]) for e in entries if "half" in e.body}
    assert found >= set(survived), "nothing is lost"
    line = [(e.body["previous"], e.body["release"]) for e in entries if e.kind == "promotion"]
    assert all(after[0] == before[1] for before, after in itertools.pairwise(line))


def test_a_folder_of_many_and_large_files_comes_back(store: ObjectStoreSettings, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    # Above boto3's 8 MiB threshold, so that it is moved in parts.
    (folder / "model.safetensors").write_bytes(os.urandom(20 * 2**20))
    for number in range(30):
        (folder / f"shard-{number}.json").write_text(f"{number}")
    artifacts = ArtifactStore(S3ObjectStore(store), tmp_path / "cache")
    manifest = artifacts.put_directory(folder, "base-model")
    fetched = artifacts.fetch(manifest.digest)
    assert len(list(fetched.iterdir())) == 31
    assert (fetched / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
