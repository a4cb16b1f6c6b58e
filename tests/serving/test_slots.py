from __future__ import annotations

from pathlib import Path

from sluice.serving.slots import server_memory, server_slots
from sluice.serving.vllm import VllmClient
from tests.serving.vllm_server import VllmServer, vllm_server


def test_a_server_tells_its_slots_and_who_holds_them() -> None:
    made = VllmServer("base", adapters={"app-a": Path("a"), "app-b": Path("b")}, slots=3)
    with vllm_server(made) as server, VllmClient(server.url) as client:
        found = server_slots(client, {"app-a": "stable, 90% of the users"}, total=9)
        assert (found.total, found.free, found.told) == (3, 1, True)
        assert found.sentence == (
            f"{server.url} holds 2 of 3 adapters: app-a (stable, 90% of the users); app-b (nothing leads to it)."
        )
        assert found.to_json()["free"] == 1
        # Before its first question it says nothing, and the setting counts.
        server.slots = None
        found = server_slots(client, {}, total=1)
        assert (found.total, found.free, found.told) == (1, -1, False)


def test_memory_is_known_of_this_machine_only(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       9000000 kB\nMemFree:           10 kB\nMemAvailable:    300000 kB\n")
    here = server_memory("http://127.0.0.1:8000", 10_000_000, meminfo=meminfo)
    assert (here.free, here.needed, here.enough) == (307_200_000, 288_435_456, True)
    assert not server_memory("http://127.0.0.1:8000", 100_000_000, meminfo=meminfo).enough
    far = server_memory("http://vllm.example:8000", 100_000_000, meminfo=meminfo)
    assert far.enough
    assert "is unknown" in far.sentence
    assert server_memory("http://localhost:1", 1, meminfo=tmp_path / "none").free is None
