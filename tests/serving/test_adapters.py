from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sluice.infra.errors import ConflictError, InputError, IntegrityError, UnavailableError
from sluice.serving.adapters import AdapterShelf, check_adapter, load_adapter, unload_adapter
from sluice.serving.vllm import VllmClient, VllmSettings, served_name, vllm_service
from tests.serving.samples import digest
from tests.serving.vllm_server import VllmServer, digests_of, vllm_server


def adapter(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 8, "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"]} | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"r": 64}, "r = 64"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": []}, "target_modules"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"use_dora": True}, "use_dora"),
    ],
)
def test_an_adapter_that_would_be_served_in_part_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        check_adapter(adapter(tmp_path / "a", **changes), max_rank=16)


def test_the_shelf_keeps_whole_adapters_and_its_list(tmp_path: Path) -> None:
    shelf = AdapterShelf(tmp_path / "shelf")
    source = adapter(tmp_path / "source")
    placed = shelf.place("app-1", source, digests_of(source))
    assert (placed / "adapter_model.safetensors").read_bytes() == b"weights"
    shelf.remember("app-1")
    listed = json.loads(shelf.list_file.read_text())["lora-modules"]
    assert [json.loads(entry) for entry in listed] == [{"name": "app-1", "path": str(placed)}]
    # A name whose weights are gone would keep the server from starting.
    (placed / "adapter_model.safetensors").unlink()
    shelf.write_list()
    assert "lora-modules" not in json.loads(shelf.list_file.read_text())
    with pytest.raises(InputError, match="cannot be read"):
        shelf.place("app-2", tmp_path / "nowhere", {})


def test_what_lies_on_the_shelf_is_what_was_verified(tmp_path: Path) -> None:
    shelf = AdapterShelf(tmp_path / "shelf")
    source = adapter(tmp_path / "source")
    digests = digests_of(source)
    placed = shelf.place("app-1", source, digests)
    shelf.remember("app-1")
    (placed / "adapter_model.safetensors").write_bytes(b"swapped")
    # A server that starts now does not load it, and the next one who places it puts the verified bytes back.
    assert shelf.names() == ()
    shelf.place("app-1", source, digests)
    assert (placed / "adapter_model.safetensors").read_bytes() == b"weights"
    assert shelf.names() == ("app-1",)


def test_an_adapter_swapped_after_it_was_verified_is_caught(tmp_path: Path) -> None:
    shelf = AdapterShelf(tmp_path / "shelf")
    source = adapter(tmp_path / "source")
    digests = digests_of(source)
    with vllm_server(VllmServer("base")) as server, VllmClient(server.url) as client:
        # Between verification and copy: no server ever sees it.
        seen: list[Path] = []
        server.on_load = seen.append
        (source / "adapter_model.safetensors").write_bytes(b"swapped")
        with pytest.raises(IntegrityError, match=r"adapter_model.safetensors of the adapter 'app-1' is not the one"):
            load_adapter((client,), shelf, "app-1", source, digests)
        assert (seen, list(shelf.folder.glob("*app-1*"))) == ([], [])
        # Between copy and load: the server has it, and loses it again.
        adapter(source)
        server.on_load = lambda folder: (folder / "adapter_config.json").write_text("{}")
        with pytest.raises(IntegrityError, match=r"adapter_config\.json"):
            load_adapter((client,), shelf, "app-1", source, digests)
        assert server.adapters == {}
        assert shelf.names() == ()
        server.on_load = lambda _: None
        load_adapter((client,), shelf, "app-1", source, digests)
        assert server.adapters == {"app-1": shelf.path("app-1")}


def test_every_server_holds_it_or_none(tmp_path: Path) -> None:
    shelf = AdapterShelf(tmp_path / "shelf")
    source = adapter(tmp_path / "source")
    digests = digests_of(source)
    with vllm_server(VllmServer("base")) as first, vllm_server(VllmServer("base", refuses={"app-1"})) as second:
        clients = (VllmClient(first.url), VllmClient(second.url))
        with pytest.raises(UnavailableError, match=f"{second.url} refused the adapter 'app-1'.*no memory for it"):
            load_adapter(clients, shelf, "app-1", source, digests)
        assert first.adapters == second.adapters == {}
        assert not shelf.path("app-1").exists()
        # One that served users before keeps it, whatever a new replica says.
        load_adapter(clients[:1], shelf, "app-1", source, digests)
        with pytest.raises(UnavailableError):
            load_adapter(clients, shelf, "app-1", source, digests)
        assert (list(first.adapters), shelf.names()) == (["app-1"], ("app-1",))
        second.refuses.clear()
        load_adapter(clients, shelf, "app-1", source, digests)
        assert list(second.adapters) == ["app-1"]
        # A name is never given to another folder.
        with pytest.raises(ConflictError, match="already"):
            clients[0].load_adapter("app-1", source)
        assert unload_adapter((VllmClient("http://127.0.0.1:9"), *clients), shelf, "app-1")[0].startswith("http://")
        assert first.adapters == second.adapters == {}
        assert (shelf.names(), shelf.path("app-1").exists()) == ((), False)


def test_who_asks_an_adapter_or_keeps_it_is_known(tmp_path: Path) -> None:
    shelf = AdapterShelf(tmp_path / "shelf")
    with shelf.in_use("app-1"), shelf.in_use("app-1"), shelf.unused("app-1") as free, shelf.unused("app-2") as other:
        assert (free, other) == (False, True)
    with shelf.unused("app-1") as free:
        assert free
    shelf.keep("app-1", 5.0, "for a rollback")
    shelf.keep("app-2", 7.0, "to be released")
    shelf.drop("app-2")
    assert shelf.kept() == {"app-1": (5.0, "for a rollback")}


def test_the_server_is_described_with_its_environment(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    python = tmp_path / "python"
    python.touch()
    name = served_name("app", digest("b"))
    assert name == "app-bbbbbbbbbbbb"
    settings = VllmSettings(python, tmp_path / "base", name, AdapterShelf(tmp_path / "shelf"), 20001)
    spec = vllm_service(settings)
    assert spec.command[spec.command.index("--host") + 1] == "127.0.0.1"
    assert spec.command[spec.command.index("--served-model-name") + 1] == name
    assert spec.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert (Path(spec.environment["PYTHONPATH"]) / "grouped_lora.py").is_file()
    assert not spec.stop_group
    assert vllm_service(settings) == spec
    with pytest.raises(InputError, match="serve_python"):
        vllm_service(VllmSettings(tmp_path / "none", tmp_path / "base", name, AdapterShelf(tmp_path), 1))


@pytest.mark.parametrize("content", ["[]", '{"a": 1}', "{", "3"])
def test_a_damaged_note_of_the_shelf_is_an_empty_one(tmp_path: Path, content: str) -> None:
    shelf = AdapterShelf(tmp_path)
    for file in ("kept.json", "shelf.json"):
        (tmp_path / file).write_text(content)
    assert (shelf.kept(), shelf.names()) == ({}, ())
