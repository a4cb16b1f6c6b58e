"""Two sites with servers of their own: releases go from one to the other through a cut and a kill."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from sluice.infra.errors import GateRefused, InputError, IntegrityError
from sluice.infra.mlflow_database import default_cache, ensure_database
from sluice.infra.object_store import S3ObjectStore
from sluice.infra.settings import Settings
from sluice.pipelines.cli import app
from sluice.pipelines.sites import sync
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.attestation import Signer
from sluice.provenance.ledger import Ledger
from sluice.provenance.releases import read_state, record_approval
from sluice.registry.mlflow_registry import MlflowRegistry
from sluice.registry.transfer.acceptance import highest_accepted
from sluice.registry.transfer.export import write_bundle
from sluice.registry.transfer.sync import Received
from sluice.registry.versions import list_versions, register_version, set_gate
from tests.registry.mlflow_server import mlflow_server
from tests.registry.transfer.made_site import REPORT, MadeSite
from tests.support.installation import SLUICE
from tests.support.line import Line
from tests.support.seaweedfs import seaweedfs

pytestmark = pytest.mark.integration

WEIGHTS = 12_000_000


@dataclass
class Server:
    """One site's real servers."""

    objects: S3ObjectStore
    registry: MlflowRegistry


@dataclass
class World:
    """Two sites, the line to the first one's object store, and a folder with sites.yaml where `sluice sync` runs."""

    north: Server
    south: Server
    line: Line
    folder: Path
    made: MadeSite
    south_ledger: Ledger

    def start(self, *options: str) -> subprocess.Popen[str]:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")},
            "SLUICE_HOME": str(self.folder / "home"),
        }
        command = [str(SLUICE), "sync", "--from", "north", "--to", "south", "--json", *options]
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def sync(self, sites: str = "sites.yaml", limit_mbps: float | None = None) -> Received:
        """`sluice sync` in this process, which spares its start."""
        home = Settings(home=self.folder / "home")
        return sync(home, self.folder / sites, "north", "south", actor="test", limit_mbps=limit_mbps)

    def register_base(self) -> None:
        """The first champion, which has a version and stays where it is."""
        register_version(
            self.north.registry,
            application="assistant",
            kind="base",
            digest=self.made.base,
            tags={},
            description="",
            files={},
            run_id=None,
        )

    def register(self, release: str) -> None:
        """What the pipeline does at the end of a retraining."""
        metadata = self.made.artifacts.manifest(release).metadata
        decision = read_state(self.made.ledger).decision_for(release)
        assert decision is not None
        version = register_version(
            self.north.registry,
            application="assistant",
            kind="adapter",
            digest=release,
            tags={"base": str(metadata["base"]), "dataset": str(metadata["dataset"]), "owner": "ann"},
            description="",
            files={},
            run_id=None,
        )
        set_gate(self.north.registry, version, "pass", REPORT, decision.report)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("sites")
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        for name in ("a", "b", "c", "d"):
            (folder / name).mkdir()
        # The servers of both sites start at once: MLflow takes ten seconds, most of them waiting.
        stores = [
            pool.submit(stack.enter_context, seaweedfs(folder / name, secret))
            for name, secret in (("a", "north-secret"), ("b", "south-secret"))
        ]
        for name in ("c", "d"):
            # A copy of this user's migrated template: making the tables takes MLflow longer than to start.
            ensure_database(folder / name / "mlflow.db", default_cache())
        trackers = [pool.submit(stack.enter_context, mlflow_server(folder / name)) for name in ("c", "d")]
        store_a, store_b = (one.result() for one in stores)
        mlflow_a, mlflow_b = (one.result() for one in trackers)
        line = Line(int(urlsplit(store_a.endpoint_url).port or 0))
        stack.callback(line.close)
        north, south = (
            Server(S3ObjectStore(store), MlflowRegistry(uri, timeout_s=30))
            for store, uri in ((store_a, mlflow_a), (store_b, mlflow_b))
        )
        made = MadeSite(folder / "north", "north", north.objects)
        signer = Signer.load_or_create(folder / "south.pem")
        south_ledger = Ledger(south.objects, "assistant", signer)
        (folder / "sites.yaml").write_text(
            f"""
sites:
  north:
    object_store:
      endpoint_url: http://127.0.0.1:{line.port}
      access_key_env: SITE_KEY
      secret_key_env: NORTH_SECRET
    mlflow: {{tracking_uri: "{mlflow_a}"}}
    public_keys: [{made.public_key_file}]
    signing_key: {made.public_key_file.with_suffix("")}
  south:
    object_store: {{endpoint_url: "{store_b.endpoint_url}", access_key_env: SITE_KEY, secret_key_env: SOUTH_SECRET}}
    mlflow: {{tracking_uri: "{mlflow_b}"}}
    public_keys: [south.pem.pub]
    signing_key: south.pem
    accept_decisions_of: [north]
"""
        )
        world = World(north, south, line, folder, made, south_ledger)
        world.register_base()
        yield world


def wait_for(condition: Any, process: subprocess.Popen[str], what: str) -> None:
    deadline = time.monotonic() + 40
    while not condition():
        assert process.poll() is None, f"{what}: it ended before\n{process.communicate()}"
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("NORTH_SECRET", "north-secret"), ("SOUTH_SECRET", "south-secret"), ("SITE_KEY", "test-site")):
        monkeypatch.setenv(name, value)


def test_two_sites_converge_through_a_cut_and_a_kill(world: World, tmp_path: Path) -> None:
    release = world.made.release(1, weights=WEIGHTS)
    world.register(release)
    part = world.folder / "home" / "transfers" / "north-south" / "staging"

    def fetched() -> int:
        return sum(path.stat().st_size for path in part.glob("*.part")) if part.is_dir() else 0

    # A slow line that breaks after 3 MB; then the process is killed, with most of the model still to come.
    world.line.cut_after = world.line.bytes + 3_000_000
    process = world.start("--limit-mbps", "24")
    wait_for(lambda: fetched() > 5_000_000, process, "half of the model is here")
    process.kill()
    process.communicate()
    assert world.line.cuts == 1
    before = fetched()
    assert 5_000_000 < before < WEIGHTS, "the cut was survived, the kill came in the middle"
    assert highest_accepted(world.south.objects, "north") is None
    assert list_versions(world.south.registry, "assistant") == [], "nobody sees half of a release"

    carried = world.line.bytes
    done = world.sync()
    assert world.line.bytes - carried < WEIGHTS - before + 1_000_000, "what was here already did not come again"
    assert done.snapshot.number == 1
    (version,) = list_versions(world.south.registry, "assistant")
    assert (version.digest, version.tags["owner"], version.tags["site"]) == (release, "ann", "north")
    theirs = list_versions(world.north.registry, "assistant")[0]
    said = {name: version.tags[name] for name in ("base", "dataset", "gate", "kind")}
    assert said == {name: theirs.tags[name] for name in said}
    folder = ArtifactStore(world.south.objects, tmp_path / "cache").fetch(release)
    assert (folder / "adapter_model.safetensors").stat().st_size == WEIGHTS
    assert list(part.iterdir()) == []

    # Its people decide themselves: the gate's decision counts, the approval has to be theirs.
    state = read_state(world.south_ledger)
    assert [entry.kind for entry in state.entries] == ["import", "decision"]
    assert version.tags["approval"] == "pending"
    record_approval(world.south_ledger, adapter=release, approver="sue")

    again = world.sync()
    assert again.moved.files == 0
    assert [one.new for one in again.imported] == [False]
    assert len(read_state(world.south_ledger).entries) == 3

    # A second release: only what is new moves.
    second = world.made.release(2, weights=2_000_000)
    world.register(second)
    carried = world.line.bytes
    done = world.sync(limit_mbps=80)
    assert 0 < done.moved.size < 2_100_000
    assert world.line.bytes - carried < 3_000_000
    assert {one.digest for one in list_versions(world.south.registry, "assistant")} == {release, second}

    # A store that is offered without its newest snapshot, by somebody who holds no key that could make a new one.
    newest, _ = highest_accepted(world.south.objects, "north") or (0, b"")
    place = f"snapshots/{newest:08d}.json"
    kept = world.north.objects.get(place)
    world.north.objects.delete(place)
    file = (world.folder / "sites.yaml").read_text()
    signing = next(line for line in file.splitlines() if "signing_key: /" in line)
    (world.folder / "pull.yaml").write_text(file.replace(signing, ""))
    with pytest.raises(IntegrityError, match=f"is older than snapshot {newest}"):
        world.sync("pull.yaml")
    world.north.objects.put(place, kept)


def test_bundle_is_imported_and_waits_for_this_sites_people(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    release = world.made.release(9)
    write_bundle(tmp_path / "out.tar", world.made.publish(release), world.north.objects)
    home = tmp_path / "south-home"
    (home / "keys").mkdir(parents=True)
    shutil.copyfile(world.folder / "south.pem", home / "keys" / "signing.pem")
    (home / "keys" / "signing.pem").chmod(0o600)
    store = world.south.objects._settings
    environment = {
        "SLUICE_HOME": str(home),
        "SLUICE_OBJECT_STORE__ENDPOINT_URL": str(store.endpoint_url),
        "SLUICE_OBJECT_STORE__ACCESS_KEY": "test-site",
        "SLUICE_OBJECT_STORE__SECRET_KEY": "south-secret",
        "SLUICE_MLFLOW__TRACKING_URI": world.south.registry.uri,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)

    def run(*command: str) -> Any:
        app([*command, "--json"], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    with pytest.raises(InputError, match="trusts no other one yet"):
        run("import", "out.tar")
    run("sites", "trust", "north", str(world.made.public_key_file))
    first = run("import", "out.tar")["releases"][0]
    assert (first["release"], first["new"], first["decision_accepted"]) == (release, True, False)
    number = str(first["version"])
    with pytest.raises(GateRefused, match="no gate decision"):
        run("approve", number, "--no-release")
    # Where the policy lets that site's gate decide here, an approval by this site's people is still needed.
    monkeypatch.setenv("SLUICE_RELEASE__ACCEPT_DECISIONS_OF", '["north"]')
    again = run("import", "out.tar")
    assert (again["moved"]["files"], again["releases"][0]["new"]) == (0, False)
    assert again["releases"][0]["decision_accepted"]
    assert run("approve", number, "--no-release", "--by", "sue")["digest"] == release
    approval = read_state(world.south_ledger).approval_for(release)
    assert approval is not None
    assert approval.approver == "sue"
