from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sluice.infra.errors import InputError
from sluice.serving.adapters import AdapterShelf, check_adapter
from sluice.serving.vllm import VllmSettings, served_name, vllm_service
from tests.serving.samples import digest


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
    placed = shelf.place("app-1", adapter(tmp_path / "source"))
    assert (placed / "adapter_model.safetensors").read_bytes() == b"weights"
    shelf.remember("app-1")
    listed = json.loads(shelf.list_file.read_text())["lora-modules"]
    assert [json.loads(entry) for entry in listed] == [{"name": "app-1", "path": str(placed)}]
    # A name whose weights are gone would keep the server from starting.
    (placed / "adapter_model.safetensors").unlink()
    shelf.write_list()
    assert "lora-modules" not in json.loads(shelf.list_file.read_text())
    with pytest.raises(InputError, match="cannot be read"):
        shelf.place("app-2", tmp_path / "nowhere")


def test_what_lies_on_the_shelf_is_what_was_verified(tmp_path: Path) -> None:
    shelf = AdapterShelf(tmp_path / "shelf")
    source = adapter(tmp_path / "source")
    placed = shelf.place("app-1", source)
    shelf.remember("app-1")
    (placed / "adapter_model.safetensors").write_bytes(b"swapped")
    # A server that starts now does not load it, and the next one who places it puts the verified bytes back.
    assert shelf.names() == ()
    shelf.place("app-1", source)
    assert (placed / "adapter_model.safetensors").read_bytes() == b"weights"
    assert shelf.names() == ("app-1",)


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
