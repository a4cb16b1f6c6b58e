from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from sluice.infra.errors import UnavailableError
from sluice.infra.home import publish_once, require_free_disk, write_private, writing
from sluice.infra.processes import Supervisor
from sluice.infra.readiness import tail


def test_a_full_disk_and_a_folder_that_is_none_end_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnavailableError, match="is full") as refused, writing(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "SLUICE_HOME" in refused.value.hint
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UnavailableError, match="cannot be written"):
        Supervisor(tmp_path / "file" / "home").up([])
    require_free_disk(tmp_path / "not" / "there" / "yet")
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UnavailableError, match="is full"):
        Supervisor(tmp_path / "home").up([])


def test_a_private_file_is_whole_and_for_its_owner_only(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    file.chmod(0o644)
    write_private(file, "new")
    assert file.read_text() == "new"
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_one_of_many_publishes(tmp_path: Path) -> None:
    gate = threading.Barrier(8)
    won: list[int] = []

    def publish(number: int) -> None:
        staging = tmp_path / f"staging-{number}"
        staging.write_text(str(number))
        gate.wait()
        if publish_once(staging, tmp_path / "file"):
            won.append(number)

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert (tmp_path / "file").read_text() == str(won[0])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_end_of_a_large_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert tail(log, 3) == []
    log.write_bytes(b"".join(b"line %d\n" % number for number in range(100_000)) + b"\xff broken\n")
    assert tail(log, 2) == ["line 99999", "\ufffd broken"]
