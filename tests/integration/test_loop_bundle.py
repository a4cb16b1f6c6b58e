"""The loop's champion leaves as a bundle, and a stranger verifies it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.installation import SLUICE, Installation

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1500)]


def test_stranger_verifies_the_champion_offline(installation: Installation, loop: Any, tmp_path: Path) -> None:
    made = installation.json("export", "champion", str(tmp_path / "champion.tar"), "--with-base")
    assert made["release"] == loop["retrain"]["adapter"]
    shutil.copyfile(made["public_key"], tmp_path / "site.pub")
    # A folder with a bundle and a key; no home, no settings, no address of any server.
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", "")}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    done = run(str(SLUICE), "verify", "champion.tar", "--key", "site.pub", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    told = {check["name"].split(" of ")[0]: check["detail"] for check in json.loads(done.stdout)["checks"]}
    assert "approved by policy:demo" in told["decision"]
    assert "is inside" in told["model"]
    assert not (tmp_path / ".sluice").exists()

    # And with public tools alone: securesystemslib and the standard library, in Python's isolated mode.
    shutil.unpack_archive(tmp_path / "champion.tar", tmp_path / "unpacked", filter="data")
    shutil.copyfile(tmp_path / "unpacked" / "verify_bundle.py", tmp_path / "verify_bundle.py")
    done = run(sys.executable, "-I", "verify_bundle.py", "champion.tar", "site.pub", "model")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"release {made['release']}" in done.stdout
    assert len(list((tmp_path / "model").rglob("*.safetensors"))) == 1

    damaged = bytearray((tmp_path / "champion.tar").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged.tar").write_bytes(damaged)
    assert run(str(SLUICE), "verify", "damaged.tar", "--key", "site.pub").returncode == 4
    assert run(sys.executable, "-I", "verify_bundle.py", "damaged.tar", "site.pub").returncode == 1
