"""No secret of an installation is in anything that a whole loop wrote, but for the few files that hold it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from sluice.infra.object_store import S3ObjectStore
from sluice.infra.settings import ObjectStoreSettings
from tests.support.installation import Installation

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1500)]

_CHUNK = 8 * 2**20


def secrets_of(installation: Installation) -> dict[str, bytes]:
    """What must not be found, by name: the store's key, and a line from the middle of each private key."""
    found = {
        "secret key of the object store": json.loads((installation.home / "secrets.json").read_text())["secret_key"]
    }
    for path in sorted((installation.home / "keys").rglob("*")):
        text = path.read_text(errors="replace") if path.is_file() else ""
        if "PRIVATE KEY" in text:
            found[f"private key {path.name}"] = text.splitlines()[1]
    assert len(found) >= 2
    assert all(len(value) >= 20 for value in found.values())
    return {name: value.encode() for name, value in found.items()}


def holds_secrets(home: Path, path: Path) -> bool:
    """The files that are there to hold a secret: for their owner's eyes only."""
    inside = path.relative_to(home)
    return str(inside) in ("secrets.json", "endpoints.json") or inside.parts[0] in ("parts", "keys")


def found_in(path: Path, needles: dict[str, bytes]) -> list[str]:
    longest = max(map(len, needles.values()))
    found, tail = set(), b""
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            found |= {name for name, needle in needles.items() if needle in tail + chunk}
            tail = chunk[-longest:]
    return sorted(found)


def files(home: Path) -> Iterator[Path]:
    for path in sorted(home.rglob("*")):
        # Sockets and pipes of the parts are no files. SeaweedFS' own volumes are read through S3 below.
        if path.is_file() and not path.is_symlink():
            yield path


def test_nothing_that_the_loop_wrote_holds_a_secret(installation: Installation, loop: Any) -> None:
    needles = secrets_of(installation)
    looked, leaks, open_to_others = 0, [], []
    for path in files(installation.home):
        named = found_in(path, needles)
        looked += 1
        if named and not holds_secrets(installation.home, path):
            leaks.append(f"{path.relative_to(installation.home)}: {', '.join(named)}")
        if named and path.stat().st_mode & 0o077:
            open_to_others.append(str(path.relative_to(installation.home)))
    assert leaks == []
    assert open_to_others == []
    assert installation.home.stat().st_mode & 0o077 == 0
    # It did look where a run writes: tasks, logs, the tracking database.
    assert looked > 100
    for place in ("runs", "logs", "mlflow/mlflow.db"):
        assert (installation.home / place).exists()


def test_no_object_in_the_store_holds_a_secret(installation: Installation, loop: Any, tmp_path: Path) -> None:
    needles = secrets_of(installation)
    given = installation.endpoints()["object_store"]
    store = S3ObjectStore(
        ObjectStoreSettings(
            endpoint_url=given["endpoint_url"],
            bucket=given.get("bucket", "sluice"),
            access_key=given["access_key"],
            secret_key=SecretStr(given["secret_key"]),
        )
    )
    objects = list(store.list(""))
    # Ledger, artifacts, step records, attestations, MLflow's artifacts: all of it.
    assert {"ledger", "steps", "mlflow", "manifests"} <= {info.key.split("/")[0] for info in objects}
    leaks = []
    for info in objects:
        store.get_file(info.key, tmp_path / "object")
        leaks += [f"{info.key}: {name}" for name in found_in(tmp_path / "object", needles)]
    assert leaks == []


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    """The test above can fail: also over the border of two pieces."""
    (tmp_path / "log").write_bytes(b"x" * (_CHUNK - 5) + b"hunter2-secret" + b"y" * 100)
    assert found_in(tmp_path / "log", {"key": b"hunter2-secret"}) == ["key"]
    assert found_in(tmp_path / "log", {"key": b"hunter3-secret"}) == []


def test_a_secret_as_a_parameter_starts_no_run(installation: Installation, loop: Any) -> None:
    secret = secrets_of(installation)["secret key of the object store"].decode()
    runs = installation.json("runs")
    refused = installation.run("run", "retrain", "-p", f"overrides={secret}")
    assert refused.returncode == 2
    assert "holds a secret" in " ".join((refused.stdout + refused.stderr).split())
    assert secret not in refused.stdout + refused.stderr
    assert [run["id"] for run in installation.json("runs")] == [run["id"] for run in runs]


def test_what_the_loop_promoted_was_asked_for_and_is_in_the_history(installation: Installation, loop: Any) -> None:
    lines = installation.json("audit", "--limit", "0")
    assert {("demo", "allowed"), ("take over from MLflow", "allowed")} <= {(x["verb"], x["outcome"]) for x in lines}
    history = installation.json("history")
    assert [one["how"] for one in history][:2] == ["promotion", "promotion"]
    promoted = next(one for one in history if one["release"] == loop["retrain"]["adapter"])
    assert (promoted["version"], promoted["verdict"]) == (loop["retrain"]["version"], "pass")
    assert promoted["approver"] == "policy:demo"
    (then,) = installation.json("history", "--at", promoted["since"])
    assert then["release"] == promoted["release"]
    assert installation.json("history", "--at", "2000-01-01T00:00:00Z") == []
    # The index went live like a release, and MLflow shows it.
    import httpx

    uri = installation.endpoints()["mlflow"]["tracking_uri"]
    asked = {"name": "assistant-index"}
    model = httpx.get(f"{uri}/api/2.0/mlflow/registered-models/get", params=asked, timeout=30).json()
    assert [entry["alias"] for entry in model["registered_model"]["aliases"]] == ["champion"]
