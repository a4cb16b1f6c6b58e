from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from sluice.infra.errors import InputError, UnavailableError
from sluice.infra.ports import Holder, PortBook, find_holder, is_free

FOREIGN = Holder(4711, "postgres", ours=False)
OURS = Holder(4712, "weed", ours=True)


def test_ports_are_distinct_free_kept_and_below_the_outgoing_ones(tmp_path: Path) -> None:
    names = [f"part{number}" for number in range(12)]
    first = PortBook(tmp_path, {}).allocate(names)
    assert len(set(first.values())) == 12
    assert all(20000 <= port < 32000 and is_free(port) for port in first.values())
    assert PortBook(tmp_path, {}).allocate(reversed(names)) == first
    more = PortBook(tmp_path, {}).allocate(["vllm", *names])
    assert {name: more[name] for name in names} == first
    assert PortBook(tmp_path, {}).read() == more
    assert (tmp_path / "ports.json").stat().st_mode & 0o077 == 0


def test_a_kept_port_is_replaced_only_when_a_foreign_process_holds_it(tmp_path: Path) -> None:
    before = PortBook(tmp_path, {}).allocate(["s3", "mlflow"])
    holders = {before["s3"]: FOREIGN, before["mlflow"]: OURS}
    after = PortBook(tmp_path, {}, inspect=holders.get).allocate(["s3", "mlflow"])
    assert after["s3"] != before["s3"]
    assert after["mlflow"] == before["mlflow"]
    assert PortBook(tmp_path, {}).read()["s3"] == after["s3"]


def test_a_fixed_port_is_used_or_refused_never_replaced(tmp_path: Path) -> None:
    assert PortBook(tmp_path, {"s3": 8333, "mlflow": 0}, inspect=lambda _port: OURS).allocate(["s3"]) == {"s3": 8333}
    with pytest.raises(InputError) as refused:
        PortBook(tmp_path, {"s3": 8333}, inspect=lambda _port: FOREIGN).allocate(["s3"])
    assert "ports.s3 = 8333" in refused.value.message
    assert "postgres (process 4711)" in refused.value.message
    assert "ports.s3 to 0" in refused.value.hint
    with pytest.raises(InputError, match="process of another user"):
        PortBook(tmp_path, {"s3": 8333}, inspect=lambda _port: Holder(None, None, False)).allocate(["s3"])
    with pytest.raises(InputError, match=r"ports\.s3 and ports\.mlflow are both 8333"):
        PortBook(tmp_path, {"s3": 8333, "mlflow": 8333}, inspect=lambda _port: None).allocate(["s3", "mlflow"])


def test_a_port_that_was_chosen_gives_way_to_one_that_is_fixed_now(tmp_path: Path) -> None:
    before = PortBook(tmp_path, {}).allocate(["s3"])
    after = PortBook(tmp_path, {"mlflow": before["s3"]}).allocate(["s3", "mlflow"])
    assert after["mlflow"] == before["s3"]
    assert after["s3"] != before["s3"]


@pytest.mark.parametrize("damage", ["", "[", "[1]", '{"s3": "x"}', '{"s3": null}'])
def test_a_damaged_book_is_written_anew(tmp_path: Path, damage: str) -> None:
    (tmp_path / "ports.json").write_text(damage)
    assert PortBook(tmp_path, {}).allocate(["s3"])["s3"] in range(20000, 32000)


def test_the_holder_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert not is_free(port)
        holder = find_holder(port, tmp_path)
        assert holder is not None
        assert (holder.pid, holder.ours) == (os.getpid(), False)
    assert find_holder(port, tmp_path) is None


def test_a_home_that_cannot_be_written_ends_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match="cannot be written"):
        PortBook(tmp_path / "file", {}).allocate(["s3"])
